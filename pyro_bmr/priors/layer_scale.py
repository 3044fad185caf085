"""The scale of a whole tensor, given as a number or inferred, for `Laplace` and `StudentT`.

Owns the hyper-prior s = c/√fan_in, c ~ C⁺(0, 1), and the checks of such a scale. Next:
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

from pyro_bmr.checks import check_arguments
from pyro_bmr.errors import ModelError, described
from pyro_bmr.priors.gaussian import SCALES, Prior, fan_in, has_square
from pyro_bmr.priors.line_densities import Density, LogHalfCauchy
from pyro_bmr.priors.weight_form import ScaleSite, WeightForm


def check_scale(family: str, scale: Any) -> None:
    """Raises ModelError unless the scale is a finite number > 0 with a variance, or "layer"."""
    check_arguments(
        family,
        scale == "layer" if isinstance(scale, str) else has_square(scale),
        f'a finite number > 0 ({SCALES}), or "layer" to infer it',
        scale=scale,
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
    """The weight tensor of a symmetric family, drawn from `family(scale)`. With the scale "layer",
    c is drawn at the site `<name>_scale` and w̄ ~ family(1) at the site `name`.
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
    fn = family(like.new_ones(())).expand(shape).to_event(len(shape))
    standardised: Tensor = pyro.sample(name, fn, infer=infer)
    return unit * c * standardised


def form_of_scaled(
    name: str, shape: tuple[int, ...], scale: Any, family: Callable[[float], Density]
) -> WeightForm:
    """The weight of `sample_scaled` and the densities of its sites, written out."""
    if not isinstance(scale, str):
        return WeightForm(density=family(float(scale)))
    c = ScaleSite(f"{name}_scale", LogHalfCauchy())
    return WeightForm(1 / math.sqrt(fan_in(shape)), factors=(c,), density=family(1.0))


def hyper_density(prior: Any) -> Callable[[float], float]:
    """The log density of the half-Cauchy hyper-prior on an inferred scale, up to a constant.

    Raises:
        AttributeError: the scale is a number, so that there is no hyper-prior.
    """
    if not isinstance(prior.scale, str):
        raise AttributeError(f"{described(prior)} has a known scale, and no hyper-prior on it")
    return log_half_cauchy


def log_half_cauchy(scale: float) -> float:
    """log C⁺(scale; 0, 1) up to a constant."""
    return -math.log1p(scale**2)
