"""`Posterior`: a fit as data — Gaussian moments per site and the prior each was fitted under; no Pyro program, no training.

Owns reading a posterior out of a guide or a param store, drawing from it, saving and loading it. Next: `reduction/sites.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_bmr import priors
from pyro_bmr.curvature import laplace_moments
from pyro_bmr.elbo import Values, collapsed
from pyro_bmr.errors import ModelError, ReductionError
from pyro_bmr.files import write_atomically
from pyro_bmr.guides.autoguides import Moments, autoguide_moments
from pyro_bmr.guides.mean_field import SUPPORTS, base_distribution, support_name
from pyro_bmr.guides.scale_coupled import CoupledSite, conditional, multiplier
from pyro_bmr.guides.site_wise import SiteWise
from pyro_bmr.priors import Gaussian, Prior
from pyro_bmr.reduction.gaussian import Dense, Diagonal, Message
from pyro_bmr.reduction.low_rank import LowRank
from pyro_bmr.reduction.matrix_normal import MatrixNormal

_FORMAT = "pyro_bmr posterior 1"
_JOINTS: dict[str | None, Any] = {structure.__name__: structure for structure in (Dense, LowRank, MatrixNormal)}


@dataclass(frozen=True)
class Site:
    """One latent site: q = N(`mean`, `var`) entry by entry, on the unconstrained scale (log for positive sites, logit on (0, 1)).

    `prior`: the Gaussian prior of the fit, its moments expanded lazily from numbers; None for a prior that is not Gaussian.
    `declared`: the prior object that declared the site, if one did. `mask`: the entries that live; None for all.
    Pruned entries have mean and variance 0.
    `given`: the latent sites on which the prior's moments depend; they stand at their posterior point (their median).
    `joint`: the correlations of the entries where q has them, over the flattened site (`MatrixNormal`: over its rows and the rest); `mean` and
    `var` are its marginals. None for independent entries.
    `message`: where q couples the site with the scales that `declared` multiplies it by (`ScaleCoupled`), what the data said of the weight, in the weight's
    units; a draw of the site then follows the draw of its scales, and `mean` and `var` are those given the scales at their medians. Else None.
    """

    mean: Tensor
    var: Tensor
    prior: Diagonal | None = None
    declared: Prior | None = None
    support: str = "real"
    mask: Tensor | None = None
    given: tuple[str, ...] = ()
    joint: Dense | LowRank | MatrixNormal | None = None
    message: Message | None = None

    @property
    def alive(self) -> Tensor:
        """The entries that live, as a bool tensor in the site's shape."""
        return torch.ones_like(self.mean, dtype=torch.bool) if self.mask is None else self.mask

    def value(self, unconstrained: Tensor) -> Tensor:
        """The constrained value, exactly 0 where the mask says so."""
        transform = SUPPORTS[self.support]
        value = unconstrained if transform is None else transform(unconstrained)
        return value if self.mask is None else value.where(self.mask, 0)

    def masked(self, mask: Tensor) -> Site:
        """The same site with `mask` in force: moments of pruned entries 0, and the joint covariance that of the others."""
        return replace(self, mean=self.mean.where(mask, 0), var=self.var.where(mask, 0), mask=mask, joint=_masked_joint(self.joint, mask))


@dataclass(frozen=True)
class Posterior:
    """Site name → `Site`, in the order of the program, and the temperature of the fit (1 is Bayes).

    `posterior["fc1.weight"].mean` and `.var` are the moments. Iterating gives the names.
    """

    sites: Mapping[str, Site]
    temperature: float = 1.0
    masks: dict[str, Tensor] = field(init=False, repr=False, compare=False)
    roots: dict[str, tuple[Tensor, ...]] = field(init=False, repr=False, compare=False, default_factory=dict)  # of joint covariances, once drawn from

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", {name: site.mask for name, site in self.sites.items() if site.mask is not None})

    def __getitem__(self, name: str) -> Site:
        if name not in self.sites:
            raise ModelError(f"the posterior has no site '{name}'; its sites are: {', '.join(self.sites)}")
        return self.sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def point(self) -> dict[str, Tensor]:
        """Site → the mean of real sites, the median of the others; pruned entries 0."""
        return {name: site.value(site.mean) for name, site in self.sites.items()}

    def draw(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Site → one draw from q; pruned entries 0."""
        values: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            like = site.mean

            def noise(*shape: int, like: Tensor = like) -> Tensor:
                return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

            if site.message is not None:
                q = conditional(*site.message, multiplier(site.declared, name, like, values), None)
                drawn = q.mean + q.std * noise(*like.shape)
            elif site.joint is None:
                drawn = like + site.var.sqrt() * noise(*like.shape)
            else:
                if name not in self.roots:
                    self.roots[name] = _roots(site.joint)
                drawn = _joint_draw(site.joint, self.roots[name], noise).view(like.shape)
            values[name] = site.value(drawn)
        return values

    def masked(self, masks: Mapping[str, Tensor]) -> Posterior:
        """The same posterior with `masks` (site → bool tensor) in force."""
        for name, mask in masks.items():
            if mask.dtype != torch.bool or mask.shape != self[name].mean.shape:
                raise ReductionError(
                    f"mask of site '{name}': expected a bool tensor of shape {tuple(self[name].mean.shape)}, got {mask.dtype} of shape {tuple(mask.shape)}"
                )
        pruned = {name: site.masked(masks[name]) for name, site in self.sites.items() if name in masks}
        return replace(self, sites={**self.sites, **pruned})

    @classmethod
    def from_guide(
        cls,
        guide: Callable[..., Any],
        program: Callable[..., Any],
        *args: Any,
        masks: Mapping[str, Tensor] | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> Posterior:
        """The posterior that `guide` holds for `program(*args, **kwargs)`, with the priors that the program declares.

        Read are the guides of this library, with the correlations they have within a site (`Site.joint`); Pyro's AutoNormal, AutoDelta, AutoDiagonalNormal,
        AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoLaplaceApproximation (a point, and after its `laplace_approximation(...)` the Gaussian) and
        AutoStructured, whose covariance between sites is dropped; and guides whose trace has a Normal or log-normal per site, or a point (variance 0).
        Random state and param store stay as they were. `args` is one batch; a handful of rows is enough.

        Raises:
            ModelError: a site's posterior cannot be read as Gaussian moments.
        """
        masks = masks or {}
        if isinstance(guide, SiteWise):
            return cls._with_priors(_site_wise(guide, masks), program, args, kwargs, masks, temperature)
        with torch.no_grad(), torch.random.fork_rng():
            trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
            moments = autoguide_moments(guide, *args, **kwargs)
        if moments is None:
            moments = {name: _guide_moments(name, trace) for name, site in trace.iter_stochastic_nodes() if not (site["infer"] or {}).get("is_auxiliary")}
        bare = {name: Site(m.mean, m.var, support=m.support, joint=m.joint) for name, m in moments.items()}
        return cls._with_priors(bare, program, args, kwargs, masks, temperature)

    @classmethod
    def from_param_store(
        cls, store: Any, program: Callable[..., Any], *args: Any, names: Mapping[str, tuple[str, str]] | None = None, temperature: float = 1.0, **kwargs: Any
    ) -> Posterior:
        """The posterior whose locations and scales (on the unconstrained scale) are in a Pyro param store, after any SVI script.

        Args:
            store: `pyro.get_param_store()` or any mapping from names to tensors.
            names: site → (name of its location, name of its scale) in the store. By default those that `AutoNormal` writes are looked for:
                names that end in ``locs.<site>`` and ``scales.<site>``.

        Raises:
            ModelError: a site of the program is not found in the store.
        """
        with torch.no_grad(), torch.random.fork_rng(), poutine.block():
            trace = prune_subsample_sites(poutine.trace(program).get_trace(*args, **kwargs))
        keys = list(store.keys())
        bare = {}
        for name, site in trace.iter_stochastic_nodes():
            if names is not None:
                pair = names.get(name, (None, None))
            else:
                pair = tuple(next((k for k in keys if k == f"{kind}.{name}" or k.endswith(f".{kind}.{name}")), None) for kind in ("locs", "scales"))  # type: ignore[assignment]
            if pair[0] not in keys or pair[1] not in keys:
                raise ModelError(
                    f"site '{name}': no location and scale in the param store ({', '.join(keys) or 'it is empty'}); "
                    f"pass names={{'{name}': ('<loc>', '<scale>'), ...}}"
                )
            support = support_name(name, base_distribution(site["fn"]).support)
            loc, scale = (store[key].detach().clone() for key in pair)
            bare[name] = Site(loc, scale.square().expand(loc.shape), support=support)
        return cls._with_priors(bare, program, args, kwargs, {}, temperature)

    @classmethod
    def from_moments(cls, mean: Mapping[str, Tensor], var: Mapping[str, Tensor], prior: Any, *, supports: Mapping[str, str] | None = None) -> Posterior:
        """The posterior of given means and variances, from wherever they come; independent entries.

        Args:
            mean, var: site → tensor; of one shape, or `var` one that broadcasts. On the unconstrained scale (`supports`).
            prior: under which they were found: ``Gaussian(<number>)`` or anything with `mean` and `var`; or patterns of site names → such, where None, and
                sites that no pattern names, have no Gaussian prior and are not reduced.
            supports: site → "positive" or "unit_interval" for those that are not real.

        Raises:
            ModelError: names or shapes disagree, a variance is negative or not finite, or a prior has no moments.
        """
        sites = {}
        for name, value in mean.items():
            if name not in var:
                raise ModelError(f"site '{name}': it has a mean and no variance; give var['{name}'] (0 for a point estimate)")
            spread = torch.as_tensor(var[name]).to(value)
            if spread.ndim > value.ndim or not bool(value.isfinite().all() & spread.isfinite().all() & (spread >= 0).all()):
                raise ModelError(
                    f"site '{name}': finite means and variances >= 0 are wanted, of one shape; got shapes {tuple(value.shape)}, {tuple(spread.shape)}"
                )
            support = support_name_of(name, (supports or {}).get(name, "real"))
            sites[name] = Site(value.detach().clone(), spread.detach().expand_as(value).clone(), *_given_prior(name, prior, value), support=support)
        return cls(sites)

    @classmethod
    def from_samples(cls, samples: Mapping[str, Tensor], prior: Any, *, supports: Mapping[str, str] | None = None, joint_up_to: int = 64) -> Posterior:
        """The posterior with the moments of draws, such as those of NUTS or of an ensemble.

        Args:
            samples: site → (draws, ...) tensor of constrained values, at least two draws.
            prior, supports: as for `from_moments`.
            joint_up_to: real sites of 2 to so many entries get the covariance of their draws too, if there are at least ten draws for each entry (fewer
                would make it too near to singular). Correlations between sites are not kept.

        Raises:
            ModelError: as `from_moments`, or there are fewer than two draws.
        """
        real = {}
        for name, draws in samples.items():
            if len(draws) < 2:
                raise ModelError(f"site '{name}': {len(draws)} draw; a variance needs at least two, in the first dimension")
            transform = SUPPORTS[support_name_of(name, (supports or {}).get(name, "real"))]
            real[name] = draws.detach() if transform is None else transform.inv(draws.detach())
        posterior = cls.from_moments({k: v.mean(0) for k, v in real.items()}, {k: v.var(0) for k, v in real.items()}, prior, supports=supports)
        sites = dict(posterior.sites)
        for name, draws in real.items():
            size = draws[0].numel()
            if sites[name].support == "real" and 1 < size <= joint_up_to and len(draws) >= 10 * size:
                flat = draws.flatten(1)
                sites[name] = replace(sites[name], joint=Dense(flat.mean(0), torch.cov(flat.mT)))
        return replace(posterior, sites=sites)

    @classmethod
    def from_curvature(
        cls,
        mean: Mapping[str, Tensor],
        curvature: Mapping[str, Tensor | tuple[Tensor, Tensor]],
        prior: Any,
        *,
        penalised: bool = True,
        temperature: float = 1.0,
    ) -> Posterior:
        r"""The Laplace posterior of a network trained in plain torch: precision = curvature of the negative log likelihood + prior precision.

        .. math:: P = H + \Pi, \qquad \mu = \hat w \text{ (MAP)}, \qquad \mu = \hat w - P^{-1}\Pi(\hat w - \eta) \text{ (maximum likelihood)}

        Sources: MacKay 1992; Ritter, Botev & Barber 2018 for Kronecker factors; Shen et al. 2024 (IVON), whose mean m, Hessian h, effective sample size λ and
        weight decay δ are `mean=m`, `curvature=λh`, `prior=Gaussian((λδ) ** -0.5)`.

        Args:
            mean: site → trained value ŵ; the names are those of the network's parameters, so that `export` finds them.
            curvature: site → H summed over the data, nats per squared unit: of the site's shape (the diagonal of the Hessian, Gauss–Newton or Fisher matrix),
                (d, d) for a site of d > 1 entries (all of it), or a pair (rows (n, n), columns (m, m)) of Kronecker factors, H = rows ⊗ columns. The prior is
                added to each of a pair, rows + (r√Π) I and columns + (√Π/r) I with r² the ratio of their mean eigenvalues (Martens & Grosse 2015): one prior
                variance for the site, and an approximation.
            prior: as for `from_moments`.
            penalised: whether ŵ was trained with the penalty that the prior is (weight decay). False: ŵ maximises the likelihood alone.
            temperature: T; the data count N/T times, H becomes H/T. 1 is Bayes. The diagonal of a curvature knows nothing of correlations, and the
                sum of many gains in evidence is too good then; a small T, chosen on held-out rows, prunes what the loss hardly feels first.

        Raises:
            ModelError: as `from_moments`, or a curvature does not fit its site or is negative.
        """
        if not 0 < temperature < math.inf:
            raise ModelError(f"temperature={temperature}: a finite number > 0 is wanted (1 is Bayes)")
        sites = {}
        for name, value in mean.items():
            if name not in curvature:
                raise ModelError(f"site '{name}': it has no curvature; leave it out of mean, or give curvature['{name}']")
            moments_, declared = _given_prior(name, prior, value)
            if moments_ is None:
                raise ModelError(f"site '{name}': a Laplace posterior needs a Gaussian prior; give prior={{'{name}': Gaussian(1.0), ...}}")
            given = curvature[name]
            cooled = (given[0] / temperature, given[1]) if isinstance(given, tuple) else given / temperature
            location, var, joint = laplace_moments(name, value.detach(), cooled, moments_, penalised)
            sites[name] = Site(location, var, moments_, declared, joint=joint)
        return cls(sites, temperature)

    @classmethod
    @torch.enable_grad()
    def _with_priors(
        cls,
        read: Mapping[str, Site],
        program: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        masks: Mapping[str, Tensor],
        temperature: float,
    ) -> Posterior:
        bare = {name: site.masked(masks[name]) if name in masks else site for name, site in read.items()}
        values = {name: site.value(site.mean).detach().requires_grad_() for name, site in bare.items()}
        with torch.random.fork_rng(), Values(values) as run:
            program(*args, **kwargs)
        sites = {}
        for name, msg in run.latent.items():
            base = base_distribution(msg["fn"])
            if bare[name].support == "real" and not bool(bare[name].var.any()):  # a point guide gives the value itself
                support = support_name(name, base.support)
                transform = SUPPORTS[support]
                bare[name] = replace(bare[name], mean=bare[name].mean if transform is None else transform.inv(bare[name].mean), support=support)
            prior = None
            given: tuple[str, ...] = ()
            if isinstance(base, torch.distributions.Normal):
                loc, scale = collapsed(base.loc), collapsed(base.scale)
                given = _dependencies(loc, scale, {k: v for k, v in values.items() if k != name})
                prior = Diagonal(loc.detach(), scale.detach().square())
            sites[name] = replace(bare[name], prior=prior, declared=msg["infer"].get("prior"), given=given)
        missing = set(bare) - set(sites)
        if missing:
            raise ModelError(f"the guide has sites that the program has not: {', '.join(sorted(missing))}; use the program that the guide was fitted to")
        return cls(sites, temperature)

    def save(self, path: str | Path) -> None:
        """One safetensors file; the description of the sites is in its metadata as JSON. Priors of the user's own are kept as moments only."""
        tensors: dict[str, Tensor] = {}
        about = {}
        for name, site in self.sites.items():
            parts = {
                "mean": site.mean,
                "var": site.var,
                "mask": site.mask,
                "prior_mean": site.prior.mean if site.prior else None,
                "prior_var": site.prior.var if site.prior else None,
                **{f"joint_{part.name}": getattr(site.joint, part.name) for part in (fields(site.joint) if site.joint else ())},
                **({f"message_{part}": value for part, value in site.message._asdict().items()} if site.message else {}),
            }
            tensors |= {f"{name}/{part}": t.contiguous().clone() for part, t in parts.items() if t is not None}
            known = type(site.declared) in vars(priors).values()
            values = dict(vars(site.declared)) if known else {}
            tensors |= {f"{name}/declared_{key}": t.contiguous().clone() for key, t in values.items() if isinstance(t, Tensor)}
            declared = {"type": type(site.declared).__name__, **{k: v for k, v in values.items() if not isinstance(v, Tensor)}} if known else None
            joint = type(site.joint).__name__ if site.joint else None
            about[name] = {"support": site.support, "given": site.given, "declared": declared, "joint": joint}
        metadata = {"format": _FORMAT, "posterior": json.dumps({"sites": about, "temperature": self.temperature})}
        write_atomically(Path(path), lambda p: save_file(tensors, p, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Posterior:
        """A posterior saved by `save`; nothing is unpickled.

        Raises:
            ModelError: the file is not one, or is damaged.
        """
        try:
            opened: AbstractContextManager[Any] = safe_open(Path(path), framework="pt")
            with opened as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: not a readable safetensors file ({error})") from None
        if metadata.get("format") != _FORMAT:
            raise ModelError(f"{path}: not a saved posterior (format {metadata.get('format')!r}, expected {_FORMAT!r})")
        about = json.loads(metadata["posterior"])
        sites = {}
        for name, entry in about["sites"].items():
            part: dict[str, Any] = {key: tensors.get(f"{name}/{key}") for key in ("mean", "var", "mask", "prior_mean", "prior_var")}
            values = (entry["declared"] or {}) | {k.removeprefix(f"{name}/declared_"): t for k, t in tensors.items() if k.startswith(f"{name}/declared_")}
            declared = getattr(priors, values.pop("type"))(**values) if values else None
            prior = Diagonal(part["prior_mean"], part["prior_var"]) if part["prior_var"] is not None else None
            structure = _JOINTS.get(entry.get("joint"))
            joint = structure and structure(**{f.name: tensors[f"{name}/joint_{f.name}"] for f in fields(structure)})
            message = Message(*(tensors[f"{name}/message_{field}"] for field in Message._fields)) if f"{name}/message_h" in tensors else None
            sites[name] = Site(part["mean"], part["var"], prior, declared, entry["support"], part["mask"], tuple(entry["given"]), joint, message)
        return cls(sites, about["temperature"])


def support_name_of(name: str, support: str) -> str:
    """`support`, or a ModelError with the ones there are."""
    if support not in SUPPORTS:
        raise ModelError(f"site '{name}': support {support!r}; one of {', '.join(map(repr, SUPPORTS))} is wanted")
    return support


def _given_prior(name: str, prior: Any, like: Tensor) -> tuple[Diagonal | None, Prior | None]:
    """The moments of the prior that the user names for a site, and the prior itself if it is one of the library's."""
    if isinstance(prior, Mapping):
        prior = next((prior[pattern] for pattern in (name, *prior) if pattern in prior and fnmatchcase(name, pattern)), None)
    if prior is None:
        return None, None
    if isinstance(prior, type) or not (hasattr(prior, "mean") and hasattr(prior, "var")):
        raise ModelError(f"site '{name}': {prior!r} has no mean and variance; give the prior of the fit as Gaussian(<number>) or Diagonal(mean, var)")
    mean, var = (torch.as_tensor(part, dtype=like.dtype, device=like.device) for part in (prior.mean, prior.var))
    if not bool((var > 0).all()) or torch.broadcast_shapes(mean.shape, var.shape, like.shape) != like.shape:
        raise ModelError(f"site '{name}': the prior's variance must be > 0 and fit the shape {tuple(like.shape)}; got {prior!r}")
    return Diagonal(mean, var), prior if isinstance(prior, Gaussian) else None


@torch.no_grad()
def _site_wise(guide: SiteWise, masks: Mapping[str, Tensor]) -> dict[str, Site]:
    sites = {}
    for latent, part, q in zip(guide.latents, guide.parts.values(), guide.at_point(masks).values(), strict=True):
        message = Message(*(t.clone() for t in part.message())) if isinstance(part, CoupledSite) else None
        support = next(key for key, transform in SUPPORTS.items() if transform is latent.transform)
        sites[latent.name] = Site(q.mean.clone(), q.var.clone(), support=support, joint=q.joint(), message=message)
    return sites


def _masked_joint(joint: Dense | LowRank | MatrixNormal | None, mask: Tensor) -> Dense | LowRank | MatrixNormal | None:
    """The covariance of the living entries, rows and columns of the others 0; None where a matrix normal loses its form."""
    flat = mask.flatten()
    if isinstance(joint, Dense):
        return Dense(joint.mean.where(flat, 0), joint.cov * (flat[:, None] & flat))
    if isinstance(joint, LowRank):
        return LowRank(joint.mean.where(flat, 0), joint.var.where(flat, 0), joint.factor * flat[:, None])
    if isinstance(joint, MatrixNormal):
        alive = mask.reshape(joint.mean.shape)
        rows, columns = alive.any(1), alive.any(0)
        if bool((alive == rows[:, None] & columns).all()):
            return MatrixNormal(joint.mean.where(alive, 0), joint.row_cov * (rows[:, None] & rows), joint.col_cov * (columns[:, None] & columns))
    return None


def _roots(joint: Dense | LowRank | MatrixNormal) -> tuple[Tensor, ...]:
    """T of each covariance TTᵀ in `joint`, rows of pruned entries 0."""
    covariances = {Dense: ("cov",), LowRank: (), MatrixNormal: ("row_cov", "col_cov")}[type(joint)]
    roots = []
    for cov in (getattr(joint, name) for name in covariances):
        alive = cov.diagonal() > 0
        root, info = torch.linalg.cholesky_ex(cov + (~alive).to(cov.dtype).diag())
        if int(info) != 0:  # singular to working precision
            values, vectors = torch.linalg.eigh(cov)
            root = vectors * values.clamp_min(0).sqrt()
        roots.append(root * alive[:, None])
    return tuple(roots)


def _joint_draw(joint: Dense | LowRank | MatrixNormal, roots: tuple[Tensor, ...], noise: Callable[..., Tensor]) -> Tensor:
    if isinstance(joint, Dense):
        return joint.mean + roots[0] @ noise(len(joint.mean))
    if isinstance(joint, LowRank):
        return joint.mean + joint.var.sqrt() * noise(len(joint.mean)) + joint.factor @ noise(joint.factor.shape[1])
    return joint.mean + roots[0] @ noise(*joint.mean.shape) @ roots[1].mT


def _guide_moments(name: str, trace: Any) -> Moments:
    """The moments of one site of a guide's trace, on the unconstrained scale."""
    unconstrained = trace.nodes.get(f"{name}_unconstrained")
    fn = base_distribution(trace.nodes[name]["fn"])
    if unconstrained is not None:
        base = base_distribution(unconstrained["fn"])
        if isinstance(base, torch.distributions.Normal):
            return Moments(base.loc.detach().clone(), base.variance.detach(), _autoguide_support(trace.nodes, name))
    if isinstance(fn, torch.distributions.Normal):
        return Moments(fn.loc.detach().clone(), fn.variance.detach(), "real")
    if isinstance(fn, torch.distributions.TransformedDistribution) and len(fn.transforms) == 1:
        base = base_distribution(fn.base_dist)
        if isinstance(base, torch.distributions.Normal):
            return Moments(base.loc.detach().clone(), base.variance.detach(), support_name(name, fn.support))
    if isinstance(fn, dist.Delta) and not any(site["infer"].get("is_auxiliary") for site in trace.nodes.values() if site["type"] == "sample"):
        return Moments(fn.v.detach().clone(), torch.zeros_like(fn.v), "real")
    raise ModelError(
        f"site '{name}': the guide's {type(fn).__name__} cannot be read as independent Gaussian moments; use MeanField or AutoNormal, or a guide "
        "with a Normal or log-normal per site"
    )


def _autoguide_support(nodes: Mapping[str, Any], name: str) -> str:
    """AutoNormal's value site is a Delta, which knows no support: the transform it applied tells."""
    value, raw = nodes[name]["value"], nodes[f"{name}_unconstrained"]["value"]
    for support, transform in SUPPORTS.items():
        if torch.allclose(raw if transform is None else transform(raw), value, rtol=1e-5, atol=1e-8):
            return support
    raise ModelError(f"site '{name}': its support is not the reals, the positives or the unit interval, so its posterior cannot be read as Gaussian moments")


def _dependencies(loc: Tensor, scale: Tensor, values: Mapping[str, Tensor]) -> tuple[str, ...]:
    if not (loc.requires_grad or scale.requires_grad) or not values:
        return ()
    grads = torch.autograd.grad(loc.sum() + scale.sum(), list(values.values()), allow_unused=True, retain_graph=True)
    return tuple(name for name, grad in zip(values, grads, strict=True) if grad is not None and math.isfinite(float(grad.abs().sum())))
