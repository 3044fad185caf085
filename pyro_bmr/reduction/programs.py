r"""Reductions that are Pyro programs: hierarchies of scales with no quadrature, fitted by SVI on
ΔF, and ratios of whole priors.

Owns `reduction_program`, the guide `ScaleFlow`, and `log_prior_ratio`. Given all scales z a
hierarchical prior of a weight is N(0, γ²(z)), so that ΔF is the Gaussian form; a program that draws
z and has ΔF(γ²(z)) as its only factor has the posterior of z given the data, without the data.
Where the tiers are one global and one local scale per weight, `scale_mixture.py` is exact and much
faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyro_bmr.errors import ModelError, ReductionError, described
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.message import log_evidence_ratio, message
from pyro_bmr.guides.latent_sites import latent_sites
from pyro_bmr.posteriors.posterior import Posterior


@runtime_checkable
class ScaleHierarchy(Protocol):
    """A prior N(0, γ²) of each weight given scales that are themselves sites, such as a `Horseshoe`
    of any tiers.
    """

    def sample_scale(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """γ, broadcasting to `shape`, from `pyro.sample` statements, in the dtype and on the device
        of `like`.
        """
        ...


def reduction_program(posterior: Posterior, name: str, to: ScaleHierarchy) -> Callable[[], Tensor]:
    r"""A Pyro program without arguments whose latents are the scales z of the reduced prior `to`,
    whose factor is Σ ΔF(γ²(z)), and which returns γ².

    Fit it with `ScaleFlow` or any other guide; the negative loss is a lower bound on the gain in
    evidence. The site's prior is that of the fit, always: fitting the program again after a
    reduction does not shrink twice. To reduce by the scales found, condition the program on a point
    of them and hand the variance to `reduce`:

    >>> var = poutine.condition(program, data=guide.median())()
    >>> reduce(posterior, to={"fc1.weight": Diagonal(torch.zeros(()), var)})

    γ is in the units of the site. Sources: Piironen & Vehtari 2017, EJS 11(2); Marković, Friston &
    Kiebel 2024, IEEE Access 12 (the tiers, and SVI on ΔF).

    Raises:
        ReductionError: the site's prior in the fit is not Gaussian with mean 0, or `to` has no
            scales to sample.
    """
    site = posterior[name]
    if site.prior is None or bool(site.prior.mean.any()):
        raise ReductionError(
            f"site '{name}': a reduction to scales needs a Gaussian prior of mean 0 in the fit"
        )
    if not isinstance(to, ScaleHierarchy):
        raise ReductionError(
            f"site '{name}': {described(to)} has no sample_scale; a Horseshoe has, or a prior of"
            " your own with that method"
        )
    kept, shape = site.kept, site.mean.shape
    p = Diagonal(site.prior.mean.expand(shape), site.prior.var.expand(shape))
    data = message(Diagonal(site.mean, site.var.where(kept, p.var)), p)

    def program() -> Tensor:
        var = to.sample_scale(name, tuple(shape), site.mean).square()
        pyro.factor(
            "delta_f", log_evidence_ratio(data, p.var, var.expand(shape)).where(kept, 0).sum()
        )
        return var

    return program


class ScaleFlow(nn.Module):
    """A guide for a `reduction_program`: independent scales, each with a density of its own on the
    log scale, by a monotone spline of eight pieces.

    The posterior of a local scale is far from a log-normal: below what the data can tell it falls
    as the half-Cauchy does, above it is cut off. With log-normals (`MeanField`) the bound is loose
    by a fraction of a nat for each scale, enough to move τ; with splines it is tight. Source of the
    splines: Durkan, Bekasov, Murray & Papamakarios 2019, Neural Spline Flows, NeurIPS.

    Raises:
        ModelError: a latent of the program is not positive.

    Example:
        >>> program = reduction_program(posterior, "fc1.weight", to=Horseshoe.tiered())
        >>> guide = ScaleFlow(program)
        >>> svi = SVI(program, guide, ClippedAdam({"lr": 0.01}), Trace_ELBO(num_particles=8))
    """

    def __init__(self, program: Callable[..., Any]) -> None:
        super().__init__()
        self.latents = latent_sites(program)
        for latent in self.latents:
            if not isinstance(latent.transform, dist.transforms.ExpTransform):
                raise ModelError(
                    f"site '{latent.name}': a scale is positive; use another guide for programs"
                    " with other latents"
                )
        self.loc = nn.ParameterList(
            [nn.Parameter(latent.start.flatten().clone()) for latent in self.latents]
        )
        self.log_width = nn.ParameterList(
            [nn.Parameter(torch.full_like(loc, 0.4)) for loc in self.loc]
        )
        self.splines = nn.ModuleList(
            [
                dist.transforms.spline(loc.numel(), count_bins=8, bound=4.0).to(loc)
                for loc in self.loc
            ]
        )
        for name, parameter in self.splines.named_parameters():
            # slopes of softplus(·) = 1: all start as the identity
            nn.init.constant_(parameter, math.log(math.e - 1) if "derivatives" in name else 0.0)

    def forward(self) -> dict[str, Tensor]:
        """One draw: site name → value."""
        return {
            latent.name: pyro.sample(latent.name, self._density(k))
            for k, latent in enumerate(self.latents)
        }

    def median(self) -> dict[str, Tensor]:
        """Site name → the median of each scale."""
        with torch.no_grad():
            values = {}
            for k, latent in enumerate(self.latents):
                value = torch.zeros_like(self.loc[k])
                for transform in self._density(k).transforms:
                    value = transform(value)
                values[latent.name] = value
        return values

    def _density(self, k: int) -> Any:
        loc = self.loc[k]
        base = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        affine = dist.transforms.AffineTransform(loc, self.log_width[k].exp(), event_dim=1)
        shape = dist.transforms.ReshapeTransform(loc.shape, self.latents[k].shape)
        return dist.TransformedDistribution(
            base, [self.splines[k], affine, dist.transforms.ExpTransform(), shape]
        )


def log_prior_ratio(
    draws: Mapping[str, Tensor],
    program: Callable[..., Any],
    reduced_program: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """log p̃(θ_s) − log p(θ_s) of each draw, for two programs that differ in their priors; for
    `log_ratio_delta_f`.

    `draws`: latent site → tensor with the draws along its first dimension, for every latent site of
    both programs. Observed sites count nowhere.

    Raises:
        ReductionError: a latent site of a program has no draws, or sites have not as many.

    Example:
        >>> log_ratio_delta_f(log_prior_ratio(mcmc.get_samples(), program, reduced_program, x, y))
    """
    sizes = {
        name: len(each) if isinstance(each, Tensor) and each.ndim else 0
        for name, each in draws.items()
    }
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ReductionError(
            "draws: expected as many of each site, at least one, along the first dimension of a"
            f" tensor, got {sizes or 'none'}"
        )
    count = next(iter(sizes.values()))

    def log_prior(model: Callable[..., Any], draw: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), torch.random.fork_rng():
            trace = prune_subsample_sites(
                poutine.trace(poutine.condition(model, data=draw)).get_trace(*args, **kwargs)
            )
        for name, site in trace.iter_stochastic_nodes():  # what the draws did not fix
            if not (site["infer"] or {}).get("is_auxiliary"):
                raise ReductionError(
                    f"site '{name}': no draws of it; there are draws of: {', '.join(draws)}"
                )
        trace.compute_log_prob(lambda name, site: name in draw)
        return torch.stack(
            [
                trace.nodes[name]["log_prob"].sum(dtype=torch.float64)
                for name in draw
                if name in trace.nodes
            ]
        ).sum()

    single = ({name: each[s] for name, each in draws.items()} for s in range(count))
    ratio = torch.stack(
        [log_prior(reduced_program, draw) - log_prior(program, draw) for draw in single]
    )
    # summed in double precision
    return ratio.to(torch.promote_types(next(iter(draws.values())).dtype, torch.float32))
