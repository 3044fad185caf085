"""The latent sites of likelihoods: scales and other positive numbers, inferred with the weights.

Owns `noise_site` and `positive_site`. Next: `normal.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_bmr.errors import warn

_FAR = 50.0  # targets that much larger or smaller than 1 are warned of
_DECADES = 10.0  # standard deviation of log(noise): a prior that hardly says what the units are


def noise_site(like: Tensor, shape: Sequence[int], scale: float | None, y: Tensor | None) -> Tensor:
    """The site `noise`, the scale of the deviations from the network's output, in the units of y.

    Its prior is HalfNormal(`scale`), or, without a scale, log noise ~ N(0, 10²), which suits a
    target in any units. A guide of this library starts at the spread of the `y` that it is made
    with.
    """
    if scale is None:
        return positive_site("noise", like, shape, 0.0, _DECADES, lambda: _start(y, shape, like))
    prior = dist.HalfNormal(like.new_tensor(scale)).expand(shape).to_event(len(shape))
    return _sample("noise", prior, lambda: _spread(y, shape, like))


def positive_site(
    name: str,
    like: Tensor,
    shape: Sequence[int],
    log_median: float | Tensor,
    log_scale: float,
    start: Callable[[], Tensor | None] = lambda: None,
) -> Tensor:
    """A positive site with log value ~ N(`log_median`, `log_scale`²).

    Args:
        start: the logarithm at which a guide begins; None for the median of the prior.
    """
    loc = (like.new_zeros(()) + log_median).expand(tuple(shape))
    prior = dist.LogNormal(loc, like.new_tensor(log_scale)).to_event(len(shape))
    return _sample(name, prior, start)


def _sample(name: str, prior: Any, start: Callable[[], Tensor | None]) -> Tensor:
    infer: Any = {"start": start}
    return pyro.sample(name, prior, infer=infer)  # type: ignore[no-any-return]


def _start(y: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor | None:
    """`_spread`, with a warning if the targets are far from what a network starts with."""
    log_spread = _spread(y, shape, like)
    if y is None or log_spread is None:
        return log_spread
    known = y[~y.isnan()].to(like.dtype)
    mean, spread = float(known.mean()), float(log_spread.exp().mean())
    if max(abs(mean), spread) > _FAR or spread < 1 / _FAR:
        warn(
            f"y has a mean of {mean:.3g} and a standard deviation of {spread:.3g} in its first"
            f" {len(y)} rows. Weights of order 1 do not reach such targets, and the noise then"
            " takes what the network cannot explain; standardise y, (y - y.mean()) / y.std(), or"
            " give the likelihood its units, noise_scale="
        )
    return log_spread


def _spread(y: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor | None:
    """The logarithm of the standard deviation of the targets around their mean, and of a tenth of
    their size where that is more, as with rows that are sorted; of each entry, or of all.
    """
    if y is None:
        return None
    values = y.detach().to(like.dtype)
    axes = 0 if shape else tuple(range(values.ndim))
    known = ~values.isnan()
    count = known.sum(axes).clamp_min(1)
    values = values.masked_fill(~known, 0)
    mean, square = values.sum(axes) / count, values.square().sum(axes) / count
    deviation = (values - mean).masked_fill(~known, 0).square().sum(axes) / count
    spread = deviation.maximum(0.01 * square).sqrt()
    found = spread.isfinite() & (spread > 0)
    log = spread.where(found, 1.0).log()
    return log.expand(tuple(shape)) if math.prod(shape) else log
