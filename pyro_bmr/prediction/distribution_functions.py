"""The distribution function P(Y ≤ y) of each entry of an observed distribution.

Owns `cdf`. torch has none of counts and of Student's t; these are SciPy's. Next: `quantiles.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td


def cdf(fn: Any, value: Tensor) -> Tensor:
    """P(Y ≤ value) of each entry, in the shape of a draw; of a multivariate Normal the marginal
    ones.

    Raises:
        NotImplementedError: the distribution has no distribution function.
    """
    while isinstance(fn, td.Independent) or hasattr(fn, "marker") or hasattr(fn, "_mask"):
        fn = fn.base_dist
    if isinstance(fn, (td.MultivariateNormal, td.LowRankMultivariateNormal)):
        fn = td.Normal(fn.mean, fn.variance.sqrt())
    for family, function in _FUNCTIONS.items():
        if isinstance(fn, family):
            return function(fn, value)
    if len(fn.event_shape):
        raise NotImplementedError
    low = getattr(fn.support, "lower_bound", None)
    if low is None:
        return fn.cdf(value)  # type: ignore[no-any-return]
    below = value <= low  # the lower end of the support, or outside of it
    found = fn.cdf(torch.where(below, torch.as_tensor(low).to(value), value))
    return found.masked_fill(below, 0.0)  # type: ignore[no-any-return]


def is_discrete(fn: Any) -> bool:
    """Whether the values are whole numbers."""
    while hasattr(fn, "base_dist") and not isinstance(fn, td.TransformedDistribution):
        fn = fn.base_dist
    return bool(fn.support.is_discrete)


def _poisson(fn: Any, value: Tensor) -> Tensor:
    k = value.floor()
    return torch.special.gammaincc(k.clamp_min(0) + 1, fn.rate).masked_fill(k < 0, 0.0)


def _bernoulli(fn: Any, value: Tensor) -> Tensor:
    inside = (1 - fn.probs).expand(value.shape).masked_fill(value >= 1, 1.0)
    return inside.masked_fill(value < 0, 0.0)


def _negative_binomial(fn: Any, value: Tensor) -> Tensor:
    from scipy import special

    k = value.floor()
    c, failure = fn.total_count, torch.sigmoid(-fn.logits)
    found = _by_scipy(special.betainc, c, k.clamp_min(0) + 1, failure)
    return found.masked_fill(k < 0, 0.0)


def _student(fn: Any, value: Tensor) -> Tensor:
    from scipy import special

    return _by_scipy(special.stdtr, fn.df, (value - fn.loc) / fn.scale)


def _by_scipy(function: Any, *arguments: Tensor) -> Tensor:
    """A function of SciPy at tensors, in their dtype and on their device."""
    like = torch.broadcast_tensors(*arguments)[-1]
    found = function(*(t.detach().double().cpu().numpy() for t in arguments))
    return torch.as_tensor(found).to(like)


_FUNCTIONS: dict[type, Callable[[Any, Tensor], Tensor]] = {
    td.Poisson: _poisson,
    td.Bernoulli: _bernoulli,
    td.NegativeBinomial: _negative_binomial,
    td.StudentT: _student,
}
