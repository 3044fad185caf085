"""The spike-and-slab prior.

Owns `SpikeAndSlab` and the mixture distribution of its fitted form. Its reduction is in
`formulas/spike_and_slab.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_bmr.checks import check_arguments
from pyro_bmr.errors import ModelError, described, holds
from pyro_bmr.priors.gaussian import SCALES, fan_in, has_square, sample_normal, scaled_form
from pyro_bmr.priors.line_densities import LogitBeta, LogitConcrete, WeightSpikeSlab
from pyro_bmr.priors.tiers import Tier, check_tier, sample_scales, spread
from pyro_bmr.priors.weight_form import ScaleSite, WeightForm

# start value of the logit of a relaxed indicator: in the slab, with room for doubt
_START = 2.0


@dataclass(frozen=True)
class SpikeAndSlab:
    r"""Each weight, or each group of weights, is in a slab with probability π, in a spike at zero
    otherwise; π ~ Beta(α, β), one per tensor.

    As the target of a reduction (Mitchell & Beauchamp 1988, JASA 83(404); Marković, Friston &
    Kiebel 2024) the slab is the prior of the fit, the spike is the point zero unless `spike_scale`
    is given, and π is inferred from the weights themselves.

    A fit by SVI needs a density, and there are two:

    - the indicator summed out, with a spike of finite width r (George & McCulloch 1993, JASA
      88(423); Ishwaran & Rao 2005, Annals of Statistics 33(2)), the default: the site is w̄ ~ π
      N(0, 1) + (1 − π) N(0, r²) and w = s w̄;
    - with a `temperature` t, the indicator relaxed to z in (0, 1), binary concrete (Maddison, Mnih
      & Teh 2017, arXiv 1611.00712), the site `<name>_slab`:

      .. math:: z = \sigma\big((\operatorname{logit} \pi + \epsilon)/t\big), \quad
          \epsilon \sim \mathrm{Logistic}(0, 1), \quad
          w = s\,z\,\bar w, \quad \bar w \sim N(0, 1)

      so that the spike is near the point zero, with one z per weight, unit or input.

    Both have the layer scale s = c/√fan_in, c⁻² ~ Gamma(2, 2), of `Gaussian("layer")`; π is the
    site `<name>_inclusion`.

    Args:
        spike_scale: the spike's standard deviation in units of the site. None (default) is 0 in a
            reduction and r = 0.1 in a fit. It cannot be combined with a temperature.
        alpha, beta: the parameters of the Beta prior on π, as if `alpha` weights had been seen in
            the slab and `beta` in the spike. With the default Beta(1, 1) the data determine the
            sparsity. Beta(1, n), n the number of weights, expects few of them in the slab
            (Castillo, Schmidt-Hieber & van der Vaart 2015, Annals of Statistics 43(5)).
        temperature: None (default) sums the indicator out; a number t > 0 relaxes it. Near 0 the
            prior of z is close to 0 or 1, and the gradients are large. 0.5 is a fair start.
        per: what has a relaxed indicator of its own: each ``"weight"`` (default), each output
            ``"unit"``, or each ``"input"``.
        block: how many neighbouring units or inputs share an indicator, such as the rows of an
            attention head.
        slab_scale: the slab of a reduction. None (default): the prior of the fit. A number: N(0,
            slab_scale²), in units of the site. ``"empirical"``: the width with the best evidence,
            together with π. Use it if the prior's scale was fitted to all weights of a layer, most
            of which are not needed, and is too narrow to tell slab from spike. If the data say
            little about many weights, the evidence has no maximum; the width is then bounded by the
            widest weights, with a warning: give a number.
        inclusion: a known π for a reduction, instead of an inferred one.
    """

    spike_scale: float | None = None
    alpha: float = 1.0
    beta: float = 1.0
    temperature: float | None = None
    per: Tier = "weight"
    block: int = 1
    slab_scale: float | Literal["empirical"] | None = None
    inclusion: float | None = None
    shrinkage: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_arguments(
            "SpikeAndSlab",
            self.spike_scale is None
            or holds(lambda x: x == 0, self.spike_scale)
            or has_square(self.spike_scale),
            f"a finite number >= 0 ({SCALES}, or 0), or None",
            spike_scale=self.spike_scale,
        )
        check_arguments(
            "SpikeAndSlab",
            holds(lambda a, b: a > 0 and b > 0, self.alpha, self.beta),
            "two numbers > 0",
            alpha=self.alpha,
            beta=self.beta,
        )
        check_arguments(
            "SpikeAndSlab",
            self.inclusion is None or holds(lambda x: 0 < x < 1, self.inclusion),
            "a probability > 0 and < 1, or None",
            inclusion=self.inclusion,
        )
        self._check_indicator()
        self._check_slab()

    def _check_indicator(self) -> None:
        """Raises ModelError unless temperature, tier and spike make an indicator."""
        check_arguments(
            "SpikeAndSlab",
            self.temperature is None or holds(lambda x: 0 < x < math.inf, self.temperature),
            "a finite number > 0, or None",
            temperature=self.temperature,
        )
        check_tier(self.per, self.block, f"SpikeAndSlab(per={described(self.per)})")
        check_arguments(
            "SpikeAndSlab",
            self.temperature is not None or self.per == "weight",
            "a relaxed indicator for a group; give a temperature, such as 0.5",
            per=self.per,
            temperature=self.temperature,
        )
        check_arguments(
            "SpikeAndSlab",
            self.temperature is None or self.spike_scale is None,
            "no width of the spike with a relaxed indicator; leave spike_scale out",
            spike_scale=self.spike_scale,
            temperature=self.temperature,
        )

    def _check_slab(self) -> None:
        """Raises ModelError unless the slab is wider than the spike, "empirical" or None."""
        if isinstance(self.slab_scale, str):
            check_arguments(
                "SpikeAndSlab",
                self.slab_scale == "empirical",
                'a number > 0, "empirical", or None',
                slab_scale=self.slab_scale,
            )
        elif self.slab_scale is not None:
            check_arguments(
                "SpikeAndSlab",
                has_square(self.slab_scale) and self.slab_scale > (self.spike_scale or 0),
                f"a finite number ({SCALES}) above the spike's scale ({self.spike_scale or 0})",
                slab_scale=self.slab_scale,
            )

    @property
    def fitted_spike_scale(self) -> float:
        return 0.1 if self.spike_scale is None else self.spike_scale

    def sample(self, name: str, shape: tuple[int, ...], init: Tensor | None = None) -> Tensor:
        if not 0 < self.fitted_spike_scale < 1:
            raise ModelError(
                f"site '{name}': SpikeAndSlab(spike_scale={described(self.spike_scale)}) cannot be"
                " fitted: expected a spike with a width, narrower than the slab (1); leave"
                " spike_scale out for the default"
            )
        like = torch.zeros(shape) if init is None else init
        unit = 1 / math.sqrt(fan_in(shape))
        precision = pyro.sample(
            f"{name}_precision", dist.Gamma(like.new_tensor(2.0), like.new_tensor(2.0))
        )
        inclusion = pyro.sample(
            f"{name}_inclusion", dist.Beta(like.new_tensor(self.alpha), like.new_tensor(self.beta))
        )
        start = None if init is None else init / unit
        scale = unit * precision.rsqrt()
        if self.temperature is None:
            fn = (
                SpikeSlabMixture(inclusion, like.new_tensor(self.fitted_spike_scale))
                .expand(shape)
                .to_event(len(shape))
            )
            infer: Any = {"prior": self, "init": start}
            return scale * pyro.sample(name, fn, infer=infer)
        concrete = dist.RelaxedBernoulli(
            like.new_tensor(self.temperature), logits=torch.logit(inclusion)
        )
        slab = sample_scales(
            f"{name}_slab", concrete, shape, self.per, self.block, init=like.new_tensor(_START)
        )
        return (
            scale
            * slab
            * sample_normal(name, shape, like.new_zeros(()), like.new_ones(()), start, self)
        )

    def form(self, name: str, shape: tuple[int, ...]) -> WeightForm:
        """The weight and the densities of its sites, written out."""
        scaled, site = scaled_form(name, shape), f"{name}_inclusion"
        inclusion = ScaleSite(site, LogitBeta(self.alpha, self.beta), unit_interval=True)
        if self.temperature is None:
            mixture = WeightSpikeSlab(self.fitted_spike_scale, site)
            return replace(scaled, density=mixture, others=(inclusion,))
        concrete = LogitConcrete(self.temperature, site)
        slab = ScaleSite(f"{name}_slab", concrete, 1.0, self.per, self.block, unit_interval=True)
        return replace(scaled, factors=(*scaled.factors, slab), others=(inclusion,))

    def drop(self, name: str, mean: Tensor, var: Tensor, sites: Mapping[str, Any]) -> Tensor:
        """Log odds of pruning each weight, the prior's own decision after a fit: the log odds of
        its indicator at the posterior point of the other sites.
        """
        if self.temperature is not None:
            slab = sites[f"{name}_slab"].mean  # on the logit scale
            return -spread(slab, self.per, self.block).expand(mean.shape)
        inclusion = sites[f"{name}_inclusion"]
        return -SpikeSlabMixture(
            inclusion.value(inclusion.mean), mean.new_tensor(self.fitted_spike_scale)
        ).inclusion_log_odds(mean, var)


class SpikeSlabMixture(dist.TorchDistribution):
    r"""π N(0, 1) + (1 − π) N(0, r²), with the indicator summed out, so that the density is smooth.
    It has no reparametrised draws.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "inclusion": constraints.unit_interval,
        "spike_scale": constraints.positive,
    }
    support = constraints.real

    def __init__(self, inclusion: Tensor, spike_scale: Tensor, validate_args: Any = None) -> None:
        self.inclusion, self.spike_scale = torch.broadcast_tensors(inclusion, spike_scale)
        super().__init__(self.inclusion.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SpikeSlabMixture:
        return SpikeSlabMixture(
            self.inclusion.expand(batch_shape), self.spike_scale.expand(batch_shape)
        )

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            slab = (
                torch.rand(shape, dtype=self.inclusion.dtype, device=self.inclusion.device)
                < self.inclusion
            )
            return torch.randn_like(slab, dtype=self.inclusion.dtype) * torch.where(
                slab, torch.ones_like(self.inclusion), self.spike_scale
            )

    def log_prob(self, value: Tensor) -> Tensor:
        slab = self.inclusion.log() - 0.5 * value.square()
        spike = (
            (-self.inclusion).log1p()
            - self.spike_scale.log()
            - 0.5 * (value / self.spike_scale).square()
        )
        return torch.logaddexp(slab, spike) - 0.5 * math.log(2 * math.pi)

    def inclusion_log_odds(self, mean: Tensor, var: Tensor) -> Tensor:
        r"""Log odds of the slab under w ~ N(mean, var): logit π + E[log N(w; 0, 1) − log N(w; 0,
        r²)], the mean-field update of the indicator.
        """
        return (
            torch.logit(self.inclusion)
            + self.spike_scale.log()
            - 0.5 * (mean.square() + var) * (1 - self.spike_scale**-2)
        )
