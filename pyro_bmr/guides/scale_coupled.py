r"""The scale-coupled guide: the Gaussian of each weight is conditional on its scales.

Owns `ScaleCoupled`, its `conditional` Gaussian, and `multiplier`, the factor between a site and its
weight. Next: `gaussian_draws.py`.

Shrinkage priors write a weight as w = s w̄, w̄ ~ N(0, 1), with scales s = s(τ, λ, …) that are
inferred. The data depend on the product alone. If w̄ and the scales are independent in the guide,
the product has the spread of each factor. For a large weight that is certain, such a guide makes
both s and w̄ too certain, which lowers the evidence bound (Ghosh, Yao & Doshi-Velez 2018, arXiv
1806.05975, who couple w̄ and log s linearly; Ingraham & Marks 2017, arXiv 1602.03807). Here the
likelihood of one weight is approximated by a Gaussian factor N(w; m, 1/L), and the conditional
follows from the prior by Bayes' rule,

    q(w̄ | s) ∝ N(w̄; 0, 1) N(s w̄; m, 1/L) = N(s L m κ, κ),    κ = 1/(1 + s² L),

the idea of Johnson et al. 2016 (arXiv 1603.06277) with learned m and L. It is the exact conditional
if the likelihood is Gaussian and factorises over the weights. It has the funnel (at s → 0 it is the
prior), and as many parameters as mean field: m and L per weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bmr.guides.latent_sites import Latent
from pyro_bmr.guides.site_normal import Independent
from pyro_bmr.guides.site_wise import SiteWise


class ScaleCoupled(SiteWise):
    r"""q = q(scales) ∏ᵢ N(w̄ᵢ; sᵢLᵢmᵢκᵢ, κᵢ), κᵢ = 1/(1 + sᵢ²Lᵢ), for each site w̄ that its prior
    multiplies by inferred scales s; other sites are as in `MeanField`.

    A site is coupled if its prior declares further sites and its weight is a multiple of the site
    called `name`: `Horseshoe`, `SpikeAndSlab`, `Gaussian("layer")`, or a prior of your own.
    `table()` shows which sites are. The scales themselves are independent log-normals.

    Args: as `SiteWise`.
    """

    def site(self, latent: Latent, scale: Tensor) -> nn.Module | None:
        at, beside = (
            {
                other.name: z if other.transform is None else other.transform(z)
                for other, z in ((o, o.start + shift) for o in self.latents)
            }
            for shift in (0, 0.3)
        )
        if (
            latent.transform is not None
            or latent.prior is None
            or not any(name.startswith(f"{latent.name}_") for name in at)
        ):
            return None
        start = torch.ones_like(latent.start)
        at_zero, factor, at_two = (
            weight_at(latent.prior, latent.name, k * start, at) for k in (0, 1, 2)
        )
        is_multiple = not bool(at_zero.any()) and torch.allclose(at_two, 2 * factor)
        depends = not torch.allclose(
            multiplier(latent.prior, latent.name, latent.start, beside), factor
        )
        return CoupledSite(latent, scale, factor) if is_multiple and depends else None


class CoupledSite(nn.Module):
    """`estimate` m, in units of the weight, and `log_precision` log L."""

    structure = "given its scales"

    def __init__(self, latent: Latent, scale: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.name, self.prior = latent.name, latent.prior
        # with these, the standard deviations start at `scale`, given the start of s
        kappa = scale.square().clamp(max=0.9).expand(latent.shape)
        self.estimate = nn.Parameter((latent.start * factor / (1 - kappa)).clone())
        self.log_precision = nn.Parameter(((1 / kappa - 1) / factor.square()).log().clone())

    def message(self) -> tuple[Tensor, Tensor]:
        """(L m, L), the natural parameters of the Gaussian factor of each weight."""
        precision = self.log_precision.exp()
        return precision * self.estimate, precision

    def forward(self, values: Mapping[str, Tensor], mask: Tensor | None) -> Independent:
        return conditional(
            *self.message(), multiplier(self.prior, self.name, self.estimate, values), mask
        )


def conditional(h: Tensor, precision: Tensor, factor: Tensor, mask: Tensor | None) -> Independent:
    """q(w̄ | s) for the factor (h = Lm, L) and s = `factor`: mean s h κ, variance κ."""
    log_kappa = -(factor.square() * precision).log1p()
    return Independent.of(factor * h * log_kappa.exp(), 0.5 * log_kappa, mask)


def multiplier(prior: Any, name: str, like: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """The scale s in the weight w = s w̄ that `prior` computes from the site w̄ called `name`, at the
    given values of its other sites; `like` has the shape of the site.
    """
    return weight_at(prior, name, torch.ones_like(like), values)


def weight_at(prior: Any, name: str, site: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """The weight that `prior.sample(name, …)` computes from given values of its sites."""
    known = {other: value for other, value in values.items() if other.startswith(f"{name}_")}
    with poutine.block(), poutine.condition(data={**known, name: site}):
        return prior.sample(name, tuple(site.shape), site.detach()).expand(site.shape)
