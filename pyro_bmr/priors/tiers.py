"""Tiers of a weight tensor: which of its entries share a scale, from the whole tensor down to each
weight.

Owns the four tiers and the arithmetic of sharing: the shape of a tier's scales, spreading them over
the entries, summing entries by scale. Next: `gaussian.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import pyro
from torch import Tensor

from pyro_bmr.errors import ModelError, described

Tier = Literal["layer", "unit", "input", "weight"]
TIERS: tuple[Tier, ...] = ("layer", "unit", "input", "weight")


def check_tier(tier: Any, block: int, where: str) -> None:
    """Raises ModelError, which names `where`, unless `tier` is one of `TIERS` and `block` is a
    number of units or inputs that can share a scale of the tier.
    """
    if not isinstance(tier, str) or tier not in TIERS:
        raise ModelError(f"{where}: expected one of {', '.join(TIERS)}, got {described(tier)}")
    if not (isinstance(block, int) and block >= 1):
        raise ModelError(
            f"{where}: block: expected a number of neighbouring units or inputs, an integer >= 1,"
            f" got {described(block)}"
        )
    if block > 1 and tier not in ("unit", "input"):
        raise ModelError(
            f"{where}: block={described(block)} joins neighbouring units or inputs; it needs the"
            " tier unit or input"
        )


def tier_shape(shape: tuple[int, ...], tier: Tier, block: int = 1) -> tuple[int, ...]:
    """The shape of a tier's scales for a weight tensor of `shape` (out, in, ...): one number, one
    per output unit, one per input, or one per weight.

    A convolution's units are its output channels, its inputs the input channels. A vector (a bias)
    has units but no inputs, so its tier ``"input"`` is one number. `block` neighbouring units or
    inputs share a scale, such as the rows of one attention head.

    Raises:
        ModelError: `block` does not divide the units or inputs.
    """
    axis = {"unit": 0, "input": 1}.get(tier)
    if axis is None:
        return tuple(shape) if tier == "weight" else ()
    if axis >= len(shape):
        return ()
    if shape[axis] % block:
        raise ModelError(
            f"block={described(block)} does not divide the {shape[axis]} {tier}s of a weight of"
            f" shape {tuple(shape)}; give a divisor"
        )
    return tuple(size // block if k == axis else 1 for k, size in enumerate(shape))


def spread(scales: Tensor, tier: Tier, block: int = 1) -> Tensor:
    """The scales of a tier, repeated over their blocks, so that they broadcast against the weight
    tensor.
    """
    axis = {"unit": 0, "input": 1}.get(tier)
    return (
        scales
        if block == 1 or axis is None or axis >= scales.ndim
        else scales.repeat_interleave(block, axis)
    )


def tier_parts(values: Tensor, tier: Tier, block: int = 1) -> Tensor:
    """The entries of a weight tensor with the ones that share a scale in the last dimension; the
    dimensions before it are those of `tier_shape`.
    """
    rows = tier_shape(tuple(values.shape), tier, block)
    if tier == "input" and rows:
        values = values.transpose(0, 1)
    return values.reshape(*rows, -1)


def sample_scales(
    name: str,
    fn: Any,
    shape: tuple[int, ...],
    tier: Tier,
    block: int = 1,
    init: Tensor | None = None,
) -> Tensor:
    """The scales of a tier, drawn independently from `fn` at the site `name`, and spread so that
    they broadcast against a weight tensor of `shape`.

    `init`: the number at which a guide should start all of them, on the unconstrained scale.
    """
    rows = tier_shape(shape, tier, block)
    infer: Any = {} if init is None else {"init": init.expand(rows)}
    return spread(pyro.sample(name, fn.expand(rows).to_event(len(rows)), infer=infer), tier, block)
