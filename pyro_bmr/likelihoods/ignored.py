"""Targets that are ignored: a distribution whose log density is 0 at a marked value.

Owns `Ignoring`. Next: `noise.py`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


class Ignoring(dist.TorchDistribution):
    """The distribution `base_dist`, with log density 0 where the value is `marker` (NaN, or a class
    such as −100): such an entry is not observed. Draws have no marked values.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, base_dist: Any, marker: float = math.nan) -> None:
        self.base_dist, self.marker = base_dist, marker
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    def marked(self, value: Tensor) -> Tensor:
        """Which entries are ignored, bool."""
        return value.isnan() if math.isnan(self.marker) else value == self.marker

    def log_prob(self, value: Tensor) -> Tensor:
        marked = self.marked(value)
        # 0 is in every support; a NaN would reach the gradient through `where`
        known = value.masked_fill(marked, 0)
        return self.base_dist.log_prob(known).masked_fill(marked, 0.0)  # type: ignore[no-any-return]

    @property
    def support(self) -> Any:
        return _OrMarked(self.base_dist.support, self)

    @property
    def mean(self) -> Tensor:
        return self.base_dist.mean  # type: ignore[no-any-return]

    @property
    def variance(self) -> Tensor:
        return self.base_dist.variance  # type: ignore[no-any-return]

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.base_dist.sample(sample_shape)  # type: ignore[no-any-return]

    def expand(self, batch_shape: Any, _instance: Any = None) -> Ignoring:
        return Ignoring(self.base_dist.expand(batch_shape), self.marker)


class _OrMarked(constraints.Constraint):
    """The support of a distribution, and the marked value."""

    def __init__(self, inner: Any, fn: Ignoring) -> None:
        self.inner, self.fn = inner, fn
        self.is_discrete, self.event_dim = inner.is_discrete, inner.event_dim
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        marked = self.fn.marked(value)
        return marked | self.inner.check(value.masked_fill(marked, 0))  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"{self.inner}, or {self.fn.marker}"


def with_missing(fn: Any, missing: str) -> Any:
    """`fn`, whose log density is 0 at targets that are NaN if `missing` is "ignore"."""
    return Ignoring(fn) if missing == "ignore" else fn
