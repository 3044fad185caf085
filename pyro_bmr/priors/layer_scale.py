"""One scale for a whole tensor, given as a number or inferred: what `Laplace` and `StudentT` share.

Owns the hyper-prior s = c/√fan_in, c ~ C⁺(0, 1) and the checks of such a scale. Next:
`half_cauchy.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bmr.errors import ModelError, described
from pyro_bmr.priors.gaussian import SCALES, Prior, fan_in, has_square


def check_scale(family: str, scale: Any) -> None:
    """Raises a ModelError unless the scale is a finite number > 0 with a variance, or "layer"."""
    if scale != "layer" if isinstance(scale, str) else not has_square(scale):
        raise ModelError(
            f"{family}(scale={described(scale)}): the scale is a finite number > 0 ({SCALES}), or"
            ' "layer" to infer it'
        )


def number(prior: Any, scale: float | None = None) -> float:
    """`scale`, or the prior's own where that is None.

    Raises:
        ModelError: neither is a number.
    """
    found = prior.scale if scale is None else scale
    if isinstance(found, str):
        raise ModelError(
            f"{described(prior)} has no density of its own before its scale is known; give a number"
        )
    return float(found)


def sample_scaled(
    prior: Prior,
    name: str,
    shape: tuple[int, ...],
    init: Tensor | None,
    scale: Any,
    family: Callable[[Tensor], Any],
) -> Tensor:
    """The weight tensor of a symmetric family, `family(scale)`; with "layer" the site
    `<name>_scale` of c too, and w̄ ~ family(1) at the site `name`.
    """
    like = torch.zeros(shape) if init is None else init
    infer: Any = {"prior": prior, "init": init}
    if not isinstance(scale, str):
        return pyro.sample(
            name, family(like.new_tensor(scale)).expand(shape).to_event(len(shape)), infer=infer
        )
    unit = 1 / math.sqrt(fan_in(shape))
    c: Tensor = pyro.sample(f"{name}_scale", dist.HalfCauchy(like.new_ones(())))
    infer["init"] = None if init is None else init / unit
    return (
        unit
        * c
        * pyro.sample(
            name, family(like.new_ones(())).expand(shape).to_event(len(shape)), infer=infer
        )
    )  # type: ignore[no-any-return]


def log_half_cauchy(scale: float) -> float:
    """log C⁺(scale; 0, 1) up to a constant."""
    return -math.log1p(scale**2)
