r"""Reductions that are Pyro programs: hierarchies of scales with no quadrature, fitted by SVI on ΔF, and ratios of whole priors.

Owns `HorseshoeTiers`, `reduction_program`, the guide `ScaleFlow`, and `log_prior_ratio`. Given all scales z a hierarchical prior of a weight is
N(0, γ²(z)), so that ΔF is the Gaussian form; a program that draws z and has ΔF(γ²(z)) as its only factor has the posterior of z given
the data, without the data. Where the tiers are
one global and one local scale per weight, `scale_mixture.py` is exact and some hundred times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyro_bmr.errors import ModelError, ReductionError
from pyro_bmr.guides.mean_field import latent_sites
from pyro_bmr.posterior import Posterior
from pyro_bmr.reduction.gaussian import Diagonal, log_evidence_ratio, message


@dataclass(frozen=True)
class HorseshoeTiers:
    r"""Scales of a hierarchical horseshoe: ψ = τ₀ times a half-Cauchy(0, 1) for each tier, under a slab.

    .. math:: \psi_{ij} = \tau_0\, \epsilon\, \tau_i\, \lambda_{ij}, \qquad \gamma^2_{ij} = \frac{c^2\psi^2_{ij}}{c^2 + \psi^2_{ij}}

    Sources: Piironen & Vehtari 2017, EJS 11(2); Marković, Friston & Kiebel 2024, IEEE Access 12 (the tiers).

    Args:
        tiers: those of ``"layer"`` (ε), ``"unit"`` (τ_i, one per row) and ``"weight"`` (λ_ij) that are there.
        tau0: τ₀, in units of the site.
        slab: c; ``"inferred"`` for c⁻² ~ Gamma(2, 6); None for no slab.
    """

    tiers: tuple[Literal["layer", "unit", "weight"], ...] = ("layer", "unit")
    tau0: float = 1.0
    slab: float | Literal["inferred"] | None = 2.0

    def __post_init__(self) -> None:
        if not self.tiers or not set(self.tiers) <= {"layer", "unit", "weight"} or len(set(self.tiers)) < len(self.tiers):
            raise ModelError(f'HorseshoeTiers(tiers={self.tiers!r}): some of "layer", "unit" and "weight", each once')
        if not self.tau0 > 0 or (self.slab != "inferred" and self.slab is not None and not float(self.slab) > 0):
            raise ModelError(f'HorseshoeTiers(tau0={self.tau0}, slab={self.slab!r}): tau0 > 0, and a slab > 0, "inferred", or None')

    def sample_var(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """γ², broadcasting to `shape`, from `pyro.sample` statements at `<name>_<tier>` and `<name>_slab_precision`."""
        shapes: dict[str, tuple[int, ...]] = {"layer": (), "unit": shape[:1] + (1,) * (len(shape) - 1), "weight": shape}
        psi = like.new_tensor(self.tau0)
        for tier in self.tiers:
            psi = psi * pyro.sample(f"{name}_{tier}", dist.HalfCauchy(like.new_ones(())).expand(shapes[tier]).to_event(len(shapes[tier])))
        if self.slab is None:
            return psi.square()
        if self.slab == "inferred":
            inverse = pyro.sample(f"{name}_slab_precision", dist.Gamma(like.new_tensor(2.0), like.new_tensor(6.0)))
        else:
            inverse = like.new_tensor(float(self.slab)) ** -2
        return 1 / (1 / psi.square() + inverse)


def reduction_program(posterior: Posterior, name: str, tiers: Any) -> Callable[[], Tensor]:
    r"""A Pyro program without arguments whose latents are the scales of `tiers`, whose factor is Σ ΔF(γ²(z)), and which returns γ².

    Fit it with `ScaleFlow` or any other guide; the negative loss is a lower bound on the gain in evidence.
    The site's prior is that of the fit, always: fitting the program again after a reduction does not shrink twice.
    To reduce by the scales found, condition the program on a point of them and hand the variance to `reduce`:

    >>> var = poutine.condition(program, data=guide.median())()
    >>> reduce(posterior, to={"fc1.weight": Diagonal(torch.zeros(()), var)})

    `tiers`: `HorseshoeTiers`, or anything with `sample_var(name, shape, like)`.

    Raises:
        ReductionError: the site's prior in the fit is not Gaussian with mean 0.
    """
    site = posterior[name]
    if site.prior is None or bool(site.prior.mean.any()):
        raise ReductionError(f"site '{name}': a reduction to scales needs a Gaussian prior of mean 0 in the fit")
    alive, shape = site.alive, site.mean.shape
    p = Diagonal(site.prior.mean.expand(shape), site.prior.var.expand(shape))
    data = message(Diagonal(site.mean, site.var.where(alive, p.var)), p)

    def program() -> Tensor:
        var = tiers.sample_var(name, tuple(shape), site.mean)
        pyro.factor("delta_f", log_evidence_ratio(data, p.var, var.expand(shape)).where(alive, 0).sum())
        return var

    return program


class ScaleFlow(nn.Module):
    """A guide for a `reduction_program`: independent scales, each with a density of its own on the log scale, by a monotone spline of eight pieces.

    The posterior of a local scale is far from a log-normal: below what the data can tell it falls as the half-Cauchy does, above it is cut off.
    With log-normals (`MeanField`) the bound is loose by a fraction of a nat for each scale, enough to move τ by a factor of two; with splines it is tight.
    Source of the splines: Durkan, Bekasov, Murray & Papamakarios 2019, Neural Spline Flows, NeurIPS.

    Raises:
        ModelError: a latent of the program is not positive.
    """

    def __init__(self, program: Callable[..., Any]) -> None:
        super().__init__()
        self.latents = latent_sites(program)
        for latent in self.latents:
            if not isinstance(latent.transform, dist.transforms.ExpTransform):
                raise ModelError(f"site '{latent.name}': a scale is positive; use another guide for programs with other latents")
        self.loc = nn.ParameterList([nn.Parameter(latent.start.flatten().clone()) for latent in self.latents])
        self.log_width = nn.ParameterList([nn.Parameter(torch.full_like(loc, 0.4)) for loc in self.loc])
        self.splines = nn.ModuleList([dist.transforms.spline(loc.numel(), count_bins=8, bound=4.0).to(loc) for loc in self.loc])
        for name, parameter in self.splines.named_parameters():
            nn.init.constant_(parameter, math.log(math.e - 1) if "derivatives" in name else 0.0)  # slopes of softplus(·) = 1: all start as the identity

    def forward(self) -> dict[str, Tensor]:
        """One draw: site name → value."""
        return {latent.name: pyro.sample(latent.name, self._density(k)) for k, latent in enumerate(self.latents)}

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
        return dist.TransformedDistribution(base, [self.splines[k], affine, dist.transforms.ExpTransform(), shape])


def log_prior_ratio(draws: Mapping[str, Tensor], program: Callable[..., Any], reduced_program: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """log p̃(θ_s) − log p(θ_s) of each draw, for two programs that differ in their priors; for `log_ratio_delta_f`.

    `draws`: latent site → tensor with the draws along its first dimension, for every latent site of both programs. Observed sites count nowhere.

    Raises:
        ReductionError: a latent site of a program has no draws.
    """
    count = len(next(iter(draws.values())))

    def log_prior(model: Callable[..., Any], draw: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), torch.random.fork_rng():
            trace = prune_subsample_sites(poutine.trace(poutine.condition(model, data=draw)).get_trace(*args, **kwargs))
        for name, site in trace.iter_stochastic_nodes():  # what the draws did not fix
            if not (site["infer"] or {}).get("is_auxiliary"):
                raise ReductionError(f"site '{name}': no draws of it; there are draws of: {', '.join(draws)}")
        trace.compute_log_prob(lambda name, site: name in draw)
        return torch.stack([trace.nodes[name]["log_prob_sum"] for name in draw if name in trace.nodes]).sum()

    single = ({name: each[s] for name, each in draws.items()} for s in range(count))
    return torch.stack([log_prior(reduced_program, draw) - log_prior(program, draw) for draw in single])
