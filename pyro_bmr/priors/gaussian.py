"""Gaussian priors over the weights of a site, with a fixed, an inferred or an empirical scale.

Owns `Gaussian` and what every prior shares: the protocols `Prior` and `ScaleMixture`, and the start value of a weight. Next: `horseshoe.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bmr.errors import ModelError


@runtime_checkable
class Prior(Protocol):
    """What is believed of one weight tensor before the data. A prior declares a site (`sample`) and names the target of a reduction."""

    shrinkage: ClassVar[bool]  # whether fitting it says by itself which weights are zero

    def sample(self, name: str, shape: tuple[int, ...], init: Tensor | None = None) -> Tensor:
        """The weight tensor of `shape`, drawn by `pyro.sample` statements of which the one called `name` holds the entries that a mask
        can prune. `init` is where a guide should start, and fixes dtype and device."""
        ...


@runtime_checkable
class ScaleMixture(Protocol):
    """A prior that is a scale mixture of zero-mean Gaussians, so that a reduction to it is exact by quadrature over the scale.

    Where the global scale is to be found by its evidence the prior also has `log_hyper(scale)`, the log density of its hyper-prior up to a constant.
    """

    def mixture(self, scale: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Variances v_k and log weights log w_k of p(w) ≈ Σ_k w_k N(w; 0, v_k), Σ w_k = 1, for weights in units of the site. `scale`: the global
        scale; None for the prior's own value."""
        ...


@dataclass(frozen=True)
class Gaussian:
    r"""w ~ N(mean, s²), independently for each entry of a weight tensor.

    Args:
        scale: where s comes from.

            - a number: s itself. As the target of a reduction, 0 is the point spike at `mean`.
            - ``"empirical"`` (default): one s per tensor. It starts at 1, so that the data speak first, and after some hundred steps of the fit
              is set, after each epoch, to the value that maximises the evidence bound, s² ← mean of μ² + σ² over the surviving weights
              (the M-step of empirical Bayes).
            - ``"layer"``: one s = c/√fan_in per tensor, inferred, with c⁻² ~ Gamma(`concentration`, `rate`). The site is then the standardised weight
              w̄ ~ N(0, 1) and the weight is s·w̄, so that the site's prior does not depend on s and w̄ = 0 means w = 0.
        mean: the prior mean; for ``"layer"`` it must be 0.
        concentration, rate: of the Gamma hyper-prior of ``"layer"``; the default Gamma(2, 2) has mean 1. Source: Marković, Friston & Kiebel 2024.
    """

    scale: float | Literal["layer", "empirical"] = "empirical"
    mean: float = 0.0
    concentration: float = 2.0
    rate: float = 2.0
    shrinkage: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.scale, str):
            if self.scale not in ("layer", "empirical"):
                raise ModelError(f'Gaussian(scale={self.scale!r}): the scale is a number >= 0, "layer" or "empirical"')
            if self.scale == "layer" and self.mean != 0:
                raise ModelError(f'Gaussian(scale="layer", mean={self.mean}): an inferred layer scale needs mean 0; give a number or "empirical"')
        elif not 0 <= self.scale < math.inf:
            raise ModelError(f'Gaussian(scale={self.scale}): the scale is a finite number >= 0, "layer" or "empirical"')

    @property
    def var(self) -> float:
        """s² of a fixed scale, so that the prior can stand in `delta_f`."""
        if isinstance(self.scale, str):
            raise ModelError(f'Gaussian(scale="{self.scale}") has no variance of its own before a fit; give a number')
        return float(self.scale) ** 2

    def sample(self, name: str, shape: tuple[int, ...], init: Tensor | None = None) -> Tensor:
        like = torch.zeros(shape) if init is None else init
        if self.scale == "layer":
            fan_in_scale = 1 / math.sqrt(fan_in(shape))
            precision = pyro.sample(f"{name}_precision", dist.Gamma(like.new_tensor(self.concentration), like.new_tensor(self.rate)))
            start = None if init is None else init / fan_in_scale
            return fan_in_scale * precision.rsqrt() * sample_normal(name, shape, like.new_zeros(()), like.new_ones(()), start, self)
        if self.scale == 0:
            raise ModelError(f"site '{name}': Gaussian(scale=0) is a point and cannot be declared; it is only the target of a reduction")
        return sample_normal(name, shape, like.new_tensor(self.mean), like.new_tensor(1.0 if isinstance(self.scale, str) else self.scale), init, self)


def fan_in(shape: tuple[int, ...]) -> int:
    """The number of inputs that one output of a weight tensor (out, in, ...) sums over; 1 for vectors."""
    return math.prod(shape[1:]) if len(shape) > 1 else 1


def sample_normal(name: str, shape: tuple[int, ...], loc: Tensor, scale: Tensor, init: Tensor | None, prior: Prior) -> Tensor:
    """The site `name` of independent Normals; `init` and `prior` travel in its `infer` dictionary to guides and posteriors."""
    infer: dict[str, Any] = {"prior": prior, "init": init}
    return pyro.sample(name, dist.Normal(loc, scale).expand(shape).to_event(len(shape)), infer=infer)  # type: ignore[arg-type]
