"""Gaussian priors over the weights of a site, with a fixed, an inferred or an empirical scale.

Owns `Gaussian` and what every prior shares: the protocols `Prior` and `ScaleMixture`, the range of
scales, and the site of independent Normals. Next: `layer_scale.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bmr.checks import check_arguments
from pyro_bmr.errors import ModelError, described, holds
from pyro_bmr.priors.line_densities import LogGamma
from pyro_bmr.priors.tiers import Tier, check_tier, sample_scales, tier_shape
from pyro_bmr.priors.weight_form import ScaleSite, WeightForm


@runtime_checkable
class Prior(Protocol):
    """A prior over one weight tensor. It declares a site (`sample`), and it names the target of a
    reduction.
    """

    shrinkage: ClassVar[bool]  # whether fitting it says by itself which weights are zero

    def sample(self, name: str, shape: tuple[int, ...], init: Tensor | None = None) -> Tensor:
        """The weight tensor of `shape`, drawn by `pyro.sample` statements. The site called `name`
        holds the entries that a mask can prune. `init` is where a guide should start; it also sets
        dtype and device.
        """
        ...


@runtime_checkable
class ScaleMixture(Protocol):
    """A prior that is a scale mixture of zero-mean Gaussians, so that a reduction to it is exact by
    quadrature over the scale.

    If the evidence is to determine the global scale, the prior also has `log_hyper(scale)`, the log
    density of its hyper-prior up to a constant.
    """

    def mixture(self, scale: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Variances v_k and log weights log w_k of p(w) ≈ Σ_k w_k N(w; 0, v_k), Σ w_k = 1, for
        weights in units of the site. `scale`: the global scale; None for the prior's own value.
        """
        ...


@dataclass(frozen=True)
class Gaussian:
    r"""w ~ N(mean, s²), independently for each entry of a weight tensor.

    Args:
        scale: where s comes from.

            - a number: s itself. As the target of a reduction, 0 is the point spike at `mean`.
            - ``"empirical"`` (default): s starts at 1, which is wide for a weight, and after some
              hundred steps of the fit is set, after each epoch, to the value that maximises the
              evidence bound, s² ← mean of (μ − mean)² + σ² over the kept weights that share it
              (the M-step of empirical Bayes). With the mean ``"init"`` s starts at 0.3 times the
              root mean square of the start values, as the standard deviations of `MeanField` do: a
              wide prior would let the noise destroy what the network has learned.
            - ``"layer"``: s = c/√fan_in, inferred, with c⁻² ~ Gamma(`concentration`, `rate`) at the
              site `<name>_precision`. The site of the weights is the standardised w̄ ~ N(0, 1) and
              the weight is s·w̄, so that the site's prior does not depend on s and w̄ = 0 means w =
              0.
        mean: the prior mean: a number (default 0), a tensor that broadcasts to the weight, or
            ``"init"``, the weight's own start value. With a pretrained network ``"init"`` is the
            prior of MOPED, which keeps weights near the pretrained ones unless the data disagree
            (Krishnan, Subedar & Tickoo 2020, AAAI, arXiv 1906.05323). For an inferred scale it must
            be 0.
        concentration, rate: of the Gamma hyper-prior of ``"layer"``; the default Gamma(2, 2) has
            mean 1. Source: Marković, Friston & Kiebel 2024.
        per: which weights share an inferred or empirical scale: the whole ``"layer"`` (default),
            each output ``"unit"`` or each ``"input"`` (automatic relevance determination; MacKay
            1994, Neal 1996), or each ``"weight"`` alone. With a scale inferred per weight, the
            prior of w is a Student-t with 2·`concentration` degrees of freedom. An empirical scale
            per weight pools nothing: the best scale of a weight without evidence is as small as its
            posterior, and both shrink together to zero. Use an inferred scale there.
        block: how many neighbouring units or inputs share a scale. With the head dimension, each
            attention head has a scale of its own.

    Example:
        >>> BayesianNetwork(net, prior=Gaussian("layer", per="input"), likelihood=Categorical())
    """

    scale: float | Literal["layer", "empirical"] = "empirical"
    mean: float | Tensor | Literal["init"] = field(default=0.0, hash=False)
    concentration: float = 2.0
    rate: float = 2.0
    per: Tier = "layer"
    block: int = 1
    shrinkage: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_tier(self.per, self.block, f"Gaussian(per={described(self.per)})")
        self._check_mean()
        if isinstance(self.scale, str):
            self._check_named_scale()
            return
        check_arguments(
            "Gaussian",
            holds(lambda x: x == 0, self.scale) or has_square(self.scale),
            f'a finite number >= 0 ({SCALES}, or 0), "layer" or "empirical"',
            scale=self.scale,
        )
        check_arguments(
            "Gaussian",
            self.per == "layer",
            'no per, since a given scale is shared by all; per is for "layer" and "empirical"',
            scale=self.scale,
            per=self.per,
        )

    def _check_mean(self) -> None:
        """Raises ModelError unless the mean is finite, or "init"."""
        if isinstance(self.mean, str):
            expected = 'a number, a tensor, or "init" for the start value of the weight'
            check_arguments("Gaussian", self.mean == "init", expected, mean=self.mean)
        else:
            finite = holds(lambda m: torch.as_tensor(m, device="cpu").isfinite().all(), self.mean)
            check_arguments("Gaussian", finite, "finite numbers", mean=self.mean)

    def _check_named_scale(self) -> None:
        """Raises ModelError unless the scale is "layer", with mean 0, or "empirical"; either with
        a proper hyper-prior.
        """
        check_arguments(
            "Gaussian",
            self.scale in ("layer", "empirical"),
            'a number >= 0, "layer" or "empirical"',
            scale=self.scale,
        )
        check_arguments(
            "Gaussian",
            self.scale != "layer" or (isinstance(self.mean, (int, float)) and self.mean == 0),
            'mean 0 with an inferred scale; give the scale as a number, or "empirical"',
            scale=self.scale,
            mean=self.mean,
        )
        check_arguments(
            "Gaussian",
            holds(
                lambda a, b: 0 < a < math.inf and 0 < b < math.inf, self.concentration, self.rate
            ),
            "two finite numbers > 0",
            concentration=self.concentration,
            rate=self.rate,
        )

    def __eq__(self, other: object) -> bool:
        """Equal fields; means that are tensors by their values."""
        if not isinstance(other, Gaussian):
            return NotImplemented
        a, b = self.mean, other.mean
        tensors = isinstance(a, Tensor), isinstance(b, Tensor)
        same = (
            torch.equal(a, b)
            if isinstance(a, Tensor) and isinstance(b, Tensor)
            else not any(tensors) and a == b
        )
        return bool(same) and all(
            getattr(self, f.name) == getattr(other, f.name)
            for f in fields(self)
            if f.name != "mean"
        )

    @property
    def var(self) -> float:
        """s² of a fixed scale; with it the prior can be an argument of `delta_f`."""
        if isinstance(self.scale, str):
            raise ModelError(
                f"Gaussian(scale={described(self.scale)}) has no variance of its own before a"
                " fit; give a number"
            )
        return float(self.scale) ** 2

    def sample(self, name: str, shape: tuple[int, ...], init: Tensor | None = None) -> Tensor:
        like = torch.zeros(shape) if init is None else init
        if self.scale == "layer":
            unit = 1 / math.sqrt(fan_in(shape))
            hyper = dist.Gamma(like.new_tensor(self.concentration), like.new_tensor(self.rate))
            precision = sample_scales(f"{name}_precision", hyper, shape, self.per, self.block)
            start = None if init is None else init / unit
            return (
                unit
                * precision.rsqrt()
                * sample_normal(name, shape, like.new_zeros(()), like.new_ones(()), start, self)
            )
        if self.scale == 0:
            raise ModelError(
                f"site '{name}': Gaussian(scale=0) is a point and cannot be declared; it is only"
                " the target of a reduction"
            )
        tier_shape(shape, self.per, self.block)  # refuses a block that does not fit
        scale = self._start_scale(init, like)
        return sample_normal(name, shape, self._mean(name, shape, init, like), scale, init, self)

    def _start_scale(self, init: Tensor | None, like: Tensor) -> Tensor:
        """The scale that is given, or at which an empirical one starts."""
        if not isinstance(self.scale, str):
            return like.new_tensor(self.scale)
        if init is None or not isinstance(self.mean, str):
            return like.new_ones(())
        # the M-step of a guide whose means are at the start values
        start = _START * init.detach().square().mean().sqrt()
        return start.where(start > 0, 1.0)

    def form(self, name: str, shape: tuple[int, ...]) -> WeightForm:
        """The weight and the densities of its sites, written out."""
        if self.scale != "layer":
            return WeightForm()
        return scaled_form(name, shape, self.concentration, self.rate, self.per, self.block)

    def _mean(self, name: str, shape: tuple[int, ...], init: Tensor | None, like: Tensor) -> Tensor:
        if isinstance(self.mean, str):
            if init is None:
                raise ModelError(
                    f"site '{name}': Gaussian(mean=\"init\") is centred at the start value; pass"
                    " it, sample(name, shape, init)"
                )
            return init.detach()
        mean = torch.as_tensor(self.mean, dtype=like.dtype, device=like.device)
        try:
            return mean if mean.ndim == 0 else mean.expand(shape)
        except RuntimeError:
            raise ModelError(
                f"site '{name}': expected a prior mean that broadcasts to the weight's shape"
                f" {tuple(shape)}, got shape {tuple(mean.shape)}"
            ) from None


_START = 0.3  # of the root mean square of the weights, as `MeanField`
SCALES = "from 1e-150 to 1e150"  # whose squares are floats


def has_square(scale: Any) -> bool:
    """Whether a scale is a number > 0 whose square neither underflows nor overflows."""
    return holds(lambda x: 1e-150 <= x <= 1e150, scale)


def fan_in(shape: tuple[int, ...]) -> int:
    """The number of inputs that one output of a weight tensor (out, in, ...) sums over; 1 for
    vectors.
    """
    return math.prod(shape[1:]) if len(shape) > 1 else 1


def scaled_form(
    name: str,
    shape: tuple[int, ...],
    concentration: float = 2.0,
    rate: float = 2.0,
    per: Tier = "layer",
    block: int = 1,
) -> WeightForm:
    """The form w = c w̄/√fan_in with c⁻² ~ Gamma at the site `<name>_precision`."""
    density = LogGamma(concentration, rate)
    precision = ScaleSite(f"{name}_precision", density, -0.5, per, block)
    return WeightForm(1 / math.sqrt(fan_in(shape)), factors=(precision,))


def sample_normal(
    name: str, shape: tuple[int, ...], loc: Tensor, scale: Tensor, init: Tensor | None, prior: Prior
) -> Tensor:
    """The site `name` of independent Normals. Its `infer` dictionary carries `init` and `prior` to
    guides and posteriors.
    """
    infer: Any = {"prior": prior, "init": init}
    normal = dist.Normal(loc, scale).expand(shape).to_event(len(shape))
    return pyro.sample(name, normal, infer=infer)
