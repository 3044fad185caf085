"""`Posterior`: a fit as data — Gaussian moments per site and the prior each was fitted under; no
Pyro program, no training.

Owns `Posterior`: drawing from it, and masks. How it is read is in `from_guides.py` and
`from_numbers.py`, its file in `posterior_file.py`. Next: `reduction/programs.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.checks import check_arguments, is_whole
from pyro_bmr.errors import ModelError, ReductionError, described
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.guides.scale_coupled import conditional, multiplier
from pyro_bmr.isolation import isolated, seed_generators
from pyro_bmr.posteriors.curvature import Curvature
from pyro_bmr.posteriors.declared_priors import with_priors
from pyro_bmr.posteriors.from_arviz import samples_of_arviz
from pyro_bmr.posteriors.from_draws import sites_of_samples
from pyro_bmr.posteriors.from_guides import masks_in_force, sites_of_guide, undisturbed
from pyro_bmr.posteriors.from_numbers import sites_of_curvature, sites_of_moments
from pyro_bmr.posteriors.from_param_store import sites_of_param_store
from pyro_bmr.posteriors.posterior_file import read_posterior, write_posterior
from pyro_bmr.posteriors.products import with_products
from pyro_bmr.posteriors.site import Site
from pyro_bmr.posteriors.weights import declared_weights, weight_moments


@dataclass(frozen=True, repr=False)
class Posterior:
    """Site name → `Site`, in the order of the program, and the temperature of the fit (1 is Bayes).

    `posterior["fc1.weight"].mean` and `.var` are the moments. Iterating gives the names. `rows`:
    how many rows of data the fit had, None if nobody said; `reduce` warns where parameters
    outnumber them.
    """

    sites: Mapping[str, Site]
    temperature: float = 1.0
    rows: int | None = None
    masks: dict[str, Tensor] = field(init=False, repr=False, compare=False)
    # of joint covariances, once drawn from
    roots: dict[str, tuple[Tensor, ...]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, (int, float)) or not 0 < self.temperature < math.inf:
            raise ModelError(
                f"temperature: expected a finite number > 0 (1 is Bayes), got"
                f" {described(self.temperature)}"
            )
        if self.rows is not None and (
            isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 1
        ):
            raise ModelError(
                f"rows={described(self.rows)}: the number of rows of data is an integer >= 1, or"
                " None if it is not known"
            )
        object.__setattr__(
            self,
            "masks",
            {name: site.mask for name, site in self.sites.items() if site.mask is not None},
        )

    def __getitem__(self, name: str) -> Site:
        if name not in self.sites:
            raise ModelError(
                f"the posterior has no site '{name}'; its sites are: {', '.join(self.sites)}"
            )
        return self.sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def point(self) -> dict[str, Tensor]:
        """Site → the mean of real sites, the median of the others; pruned entries 0."""
        return {name: site.value(site.mean) for name, site in self.sites.items()}

    def draw(
        self, generator: torch.Generator | None = None, *, weights: bool = False
    ) -> dict[str, Tensor]:
        """Site → one draw from q; pruned entries 0. With `weights` the sites that a prior declared
        are drawn as their weight, w and not a standardised w̄, without the scales of that prior.
        """
        values = self._draw(generator, 1.0)
        return declared_weights(self.sites, values) if weights else values

    def draws(self, count: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        r"""`count` draws from q, site → value; pruned entries 0.

        They come in antithetic pairs, from standard normal numbers ε and −ε. Each is a draw from
        q. The mean of any function over them has the same expectation as over independent draws,
        and less variance where the function is nearly linear, since the odd part of its deviation
        cancels in a pair (Hammersley & Morton 1956). A mean of what is even, as a variance is, has
        that of half as many independent draws at worst.
        """
        for _ in range(0, count - 1, 2):
            state = generator.get_state()
            yield self._draw(generator, 1.0)
            after = generator.get_state()
            generator.set_state(state)
            yield self._draw(generator, -1.0)
            generator.set_state(after)
        if count % 2:
            yield self._draw(generator, 1.0)

    def _draw(self, generator: torch.Generator | None, sign: float) -> dict[str, Tensor]:
        """Site → the draw from q at `sign` times the next standard normal numbers."""
        values: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            like = site.mean

            def noise(*shape: int, like: Tensor = like) -> Tensor:
                numbers = torch.randn(
                    shape, generator=generator, dtype=like.dtype, device=like.device
                )
                return numbers if sign == 1 else numbers.neg_()

            if site.message is not None:
                q = conditional(*site.message, multiplier(site.declared, name, like, values), None)
                drawn = q.mean + q.std * noise(*like.shape)
            elif site.joint is None:
                drawn = like + site.var.sqrt() * noise(*like.shape)
            else:
                if name not in self.roots:
                    self.roots[name] = site.joint.roots()
                drawn = site.joint.draw(self.roots[name], noise).view(like.shape)
            values[name] = site.value(drawn)
        return values

    @isolated()
    def weight(self, name: str, *, draws: int = 256, seed: int = 0) -> Diagonal:
        r"""Mean and variance of the weight of a site, entry by entry, in the units of the program.

        A prior with scales of its own declares a standardised w̄, whose moments are
        ``posterior[name]``. Here they are those of w = γ w̄: E[w] = μ E[γ] and Var[w] = σ² E[γ²] +
        μ² Var[γ], with the moments of γ from `draws` of the scales.

        Raises:
            ModelError: there is no such site, it is not real, or a scale of its prior is missing.

        Example:
            >>> posterior.weight("fc1.weight").mean
        """
        check_arguments("weight", is_whole(draws, 1), "a whole number >= 1", draws=draws)
        self[name]
        seed_generators(seed)
        return weight_moments(
            self.sites, name, lambda parts: replace(self, sites=parts).draw, draws
        )

    def __repr__(self) -> str:
        size = sum(site.mean.numel() for site in self.sites.values())
        kept = sum(site.kept_count for site in self.sites.values())
        said = [f"{len(self.sites)} sites", f"{size:,} entries"]
        said += [f"{kept:,} kept"] if kept < size else []
        said += [f"temperature {self.temperature:g}"] if self.temperature != 1 else []
        said += [f"{self.rows:,} rows"] if self.rows else []
        return f"Posterior({', '.join(said)})"

    def masked(self, masks: Mapping[str, Tensor]) -> Posterior:
        """The same posterior with `masks` (site → bool tensor) in force."""
        for name, mask in masks.items():
            if mask.dtype != torch.bool or mask.shape != self[name].mean.shape:
                raise ReductionError(
                    f"mask of site '{name}': expected a bool tensor of shape"
                    f" {tuple(self[name].mean.shape)}, got {mask.dtype} of shape"
                    f" {tuple(mask.shape)}"
                )
        pruned = {
            name: site.masked(masks[name]) for name, site in self.sites.items() if name in masks
        }
        return replace(self, sites={**self.sites, **pruned})

    def widened(self, factor: float) -> Posterior:
        """The same posterior with `factor` times the covariance of every real site, pruned entries
        still 0: what to draw predictions from after a fit at a temperature below 1
        (`best_widening`). What `reduce` says of a posterior holds for the one that was fitted, not
        for this one.

        Raises:
            ModelError: `factor` is not a number ≥ 0, or a site's draws follow those of its scales
                (`ScaleCoupled`).
        """
        if (
            isinstance(factor, bool)
            or not isinstance(factor, (int, float))
            or not 0 <= factor < math.inf
        ):
            raise ModelError(
                f"widened: expected a finite number >= 0, got {described(factor)}; of a tensor"
                " give its .item()"
            )
        if coupled := [name for name, site in self.sites.items() if site.message is not None]:
            raise ModelError(
                f"site '{coupled[0]}': its draws follow those of its scales (ScaleCoupled) and have"
                " no variance of their own to widen"
            )
        return replace(
            self, sites={name: site.widened(factor) for name, site in self.sites.items()}
        )

    @classmethod
    @isolated()
    def from_guide(
        cls,
        guide: Callable[..., Any],
        program: Callable[..., Any],
        *args: Any,
        masks: Mapping[str, Tensor] | None = None,
        temperature: float = 1.0,
        rows: int | None = None,
        products: bool = True,
        **kwargs: Any,
    ) -> Posterior:
        """The posterior that `guide` holds for `program(*args, **kwargs)`, with the priors that the
        program declares.

        Read are the guides of this library, and any guide whose sites are Gaussian or points on the
        unconstrained scale: Pyro's, in an AutoGuideList too, and your own. Each site has its
        marginal, with the correlations within it (`Site.joint`), also where it follows other sites,
        linearly and with a constant scale; covariance between sites is dropped.
        AutoLaplaceApproximation is a point, its `laplace_approximation(...)` the Gaussian. Two
        calls give the same to the bit; random state and param store stay as they were. `args` is
        one batch; a handful of rows is enough. `rows`: of all the data of the fit. `products`:
        whether to look for sites that multiply each other (`Site.multiplies`), by a few runs of the
        program at other values.

        Raises:
            ModelError: a site's marginal is not Gaussian, it stands in a subsampled plate, or a
                shape, a support, a mask or a moment is not what it must be.
        """
        device = next((t.device for t in args if isinstance(t, Tensor)), None)
        masks = masks_in_force(program, masks or {}, device)
        with undisturbed(guide, program):
            sites = sites_of_guide(guide, program, args, kwargs, masks)
            sites = with_priors(sites, program, args, kwargs, masks)
            sites = with_products(sites, program, args, kwargs) if products else sites
            return cls(sites, temperature, rows)

    @classmethod
    @isolated()
    def from_param_store(
        cls,
        store: Any,
        program: Callable[..., Any],
        *args: Any,
        names: Mapping[str, tuple[str, str]] | None = None,
        temperature: float = 1.0,
        rows: int | None = None,
        **kwargs: Any,
    ) -> Posterior:
        """The posterior whose locations and scales (on the unconstrained scale) are in a Pyro param
        store, after any SVI script.

        Args:
            store: `pyro.get_param_store()`, after its `load()` if it comes from a file; or its
                `get_state()`, with the constraints. In any other mapping values are taken as they
                stand, so it needs `names`: Pyro's own names there may hold unconstrained values.
            names: site → (name of its location, name of its scale) in the store. By default those
                that `AutoNormal` writes are looked for: names that end in ``locs.<site>`` and
                ``scales.<site>``, with one prefix.
            rows: of all the data of the fit.

        Raises:
            ModelError: a site is not found, or twice; a value does not fit it; a scale is not > 0,
                or not known to be one, or not all that its guide keeps.
        """
        masks = masks_in_force(program, {})
        with undisturbed(program):
            sites = sites_of_param_store(store, program, args, kwargs, names)
            return cls(with_priors(sites, program, args, kwargs, masks), temperature, rows)

    @classmethod
    def from_moments(
        cls,
        mean: Mapping[str, Tensor],
        var: Mapping[str, Tensor],
        prior: Any,
        *,
        supports: Mapping[str, str] | None = None,
        rows: int | None = None,
    ) -> Posterior:
        """The posterior of given means and variances, from wherever they come; independent entries.

        Args:
            mean, var: site → tensor; of one shape, or `var` one that broadcasts. On the
                unconstrained scale (`supports`). Lower precision than float32 is raised to it.
            prior: under which they were found: ``Gaussian(<number>)`` or anything with `mean` and
                `var`; or patterns of site names → such, where None, and sites that no pattern
                names, have no Gaussian prior and are not reduced.
            supports: site → "positive" or "unit_interval" for those that are not real.
            rows: how many rows of data they were found with, if known.

        Raises:
            ModelError: names or shapes disagree, a variance is negative or not finite, a prior has
                no finite moments, or a pattern names no site.
        """
        return cls(sites_of_moments(mean, var, prior, supports), rows=rows)

    @classmethod
    @isolated()
    def from_samples(
        cls,
        samples: Mapping[str, Tensor],
        prior: Any,
        *,
        supports: Mapping[str, str] | None = None,
        joint_up_to: int = 64,
        chains: bool | None = None,
        rows: int | None = None,
    ) -> Posterior:
        """The posterior with the moments of draws, such as those of NUTS or of an ensemble.

        Args:
            samples: site → (draws, ...) tensor of constrained values, at least two draws, as many
                for each site. An entry that is 0 in all draws is pruned.
            prior, supports, rows: as for `from_moments`.
            joint_up_to: real sites of 2 to so many entries get the covariance of their draws too,
                if there are at least ten draws for each entry (fewer would make it too near to
                singular). Correlations between sites are not kept.
            chains: True: the samples are (chains, draws, ...), as of
                ``MCMC.get_samples(group_by_chain=True)``. False: they are (draws, ...). None: the
                same, but refused where they may be chains, or entries before draws: all shapes
                begin with the same (c, n), n ≥ 20, 1 < c < n, and c ≤ 32 or the means of the n
                columns differ no more than those of draws of one number; or, for any c, far less.
                An ensemble of few may have to say False.

        Raises:
            ModelError: as `from_moments`, or there are fewer than two draws, an entry does not
                move, or the shapes may be those of chains.

        Warns: PyroBMRWarning: chains disagree (split R-hat > 1.1), or one draw of 100 or more makes
            up a quarter of a variance, as in heavy tails.
        """
        return cls(sites_of_samples(samples, prior, supports, joint_up_to, chains), rows=rows)

    @classmethod
    @isolated()
    def from_arviz(
        cls,
        tree: Any,
        prior: Any,
        *,
        var_names: Collection[str] | None = None,
        supports: Mapping[str, str] | None = None,
        joint_up_to: int = 64,
        rows: int | None = None,
    ) -> Posterior:
        """The posterior with the moments of draws that ArviZ has, of PyMC, Stan, NumPyro or Pyro.

        Args:
            tree: a DataTree or InferenceData with a group "posterior", or that group's Dataset.
                Each variable is a site; its dimensions after chain and draw are those of the site.
            var_names: the variables to take, by default all. Leave out those that are functions of
                others.
            prior, supports, joint_up_to, rows: as for `from_samples`.

        Raises:
            ModelError: as `from_samples`, or there is no such group or variable.

        Warns: PyroBMRWarning: as `from_samples`.
        """
        samples = samples_of_arviz(tree, var_names)
        return cls(sites_of_samples(samples, prior, supports, joint_up_to, True), rows=rows)

    @classmethod
    @isolated()
    def from_curvature(
        cls,
        mean: Mapping[str, Tensor],
        curvature: Mapping[str, Curvature],
        prior: Any,
        *,
        penalised: bool = True,
        temperature: float = 1.0,
        rows: int | None = None,
    ) -> Posterior:
        r"""The Laplace posterior of a network trained in plain torch: precision = curvature of the
        negative log likelihood + prior precision.

        .. math:: P = H + \Pi, \qquad \mu = \hat w \text{ (MAP)}, \qquad
            \mu = \hat w - P^{-1}\Pi(\hat w - \eta) \text{ (maximum likelihood)}

        Sources: MacKay 1992; Ritter, Botev & Barber 2018 for Kronecker factors; Shen et al. 2024
        (IVON), whose mean m, Hessian h, effective sample size λ and weight decay δ are `mean=m`,
        `curvature=λh`, `prior=Gaussian((λδ) ** -0.5)`. An entry of h may be negative as long as h +
        δ > 0.

        Args:
            mean: site → trained value ŵ; the names are those of the network's parameters, so that
                `export` finds them.
            curvature: site → H summed over the data, nats per squared unit: of the site's shape
                (the diagonal of the Hessian, Gauss–Newton or Fisher matrix), (d, d) for a site of d
                > 1 entries (all of it), or a pair (rows (n, n), columns (m, m)) of Kronecker
                factors, H = rows ⊗ columns. The prior is added to each of a pair, rows + (r√Π) I
                and columns + (√Π/r) I with r² the ratio of their mean eigenvalues (Martens & Grosse
                2015): one prior variance for the site, and an approximation.
            prior, rows: as for `from_moments`. ``Gaussian()``, whose scale is "empirical", gets for
                each site the s of the most evidence (`formulas.LaplaceEvidence`; Immer et al.
                2021, arXiv 2104.04975), where ŵ counts as the maximum of the likelihood. After a
                training with that penalty give the number of ``penalised=True`` there.
            penalised: whether ŵ was trained with the penalty that the prior is (weight decay).
                False: ŵ maximises the likelihood alone.
            temperature: T; the data count N/T times, H becomes H/T. 1 is Bayes. The diagonal of a
                curvature knows nothing of correlations, and the sum of many gains in evidence is
                too good then; a small T, chosen on held-out rows, prunes what the loss hardly feels
                first.

        Raises:
            ModelError: as `from_moments`, or a curvature does not fit its site, is not symmetric,
                or curvature + prior precision is not > 0; or the evidence has no maximum over an
                empirical scale.
        """
        return cls(
            sites_of_curvature(mean, curvature, prior, penalised, temperature), temperature, rows
        )

    def save(self, path: str | Path) -> None:
        """One safetensors file; the description of the sites is in its metadata as JSON. Priors of
        the user's own are kept as moments only.
        """
        write_posterior(Path(path), self.sites, self.temperature, self.rows)

    @classmethod
    def load(cls, path: str | Path) -> Posterior:
        """A posterior saved by `save`; nothing is unpickled.

        Raises:
            ModelError: the file is not one, or is damaged.
        """
        return cls(*read_posterior(Path(path)))
