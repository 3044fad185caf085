r"""Noise drawn for each row of a batch instead of once for all: a drawn weight that knows its mean
and standard deviation.

Owns `RowNoise` and its products with scales, which keep that knowledge. Linear maps of a batch use
it (`row_maps.py`), so that each row of the output has the distribution that it has under a weight
of its own. Any other operation sees an ordinary draw. `check_estimator` names where noise is drawn.
Next: `row_maps.py`.

The rows of one batch become independent of each other. The expectation of a sum over rows does not
depend on that, but the variance of its gradient falls. The first dimension of a map's input must be
the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ModelError, described

PER_STEP, PER_ROW = ("weight", "antithetic"), ("local", "flipout")


def check_estimator(estimator: str, *others: str) -> str:
    """`estimator`, if it draws noise per row or is one of the `others`; else a ModelError."""
    if not isinstance(estimator, str) or estimator not in (*others, *PER_ROW):
        raise ModelError(
            f"estimator={described(estimator)}: expected one of"
            f" {', '.join(map(repr, (*others, *PER_ROW)))}"
        )
    return estimator


class RowNoise(Tensor):
    r"""A weight W = M + S ∘ E, E of independent standard normals, whose noise is drawn where it is
    used.

    - ``"local"`` (Kingma, Salimans & Welling 2015, arXiv 1506.02557): Wx + b ~ N(Mx + m_b, S²x² +
      s_b²), one normal per row and output, for x of shape (rows, in). If a row uses a weight at
      several places (convolutions, tokens), its outputs share noise, so flipout is used instead.
    - ``"flipout"`` (Wen et al. 2018, arXiv 1803.04386): row n has the weight M + (S ∘ E) ∘ rₙsₙᵀ
      with random signs r, s; E is drawn once.

    Any other use gets one ordinary draw for all rows.
    """

    q_mean: Tensor  # M and S before the factor
    q_std: Tensor
    rows: int
    estimator: str
    # a number or 0-d tensor that multiplies M and S, kept apart so that no step takes a product of
    # the weight's size; or None
    factor: Any
    source: RowNoise | None  # the weight it is a multiple or transpose of
    map_noise: Any
    own_noise: Tensor | None
    row_uses: int
    row_draws: tuple[Tensor, ...]  # flipout's signs, or the noise of a bias

    @staticmethod
    def __new__(
        cls,
        mean: Tensor,
        std: Tensor,
        rows: int,
        estimator: str,
        factor: Any = None,
        source: RowNoise | None = None,
        map_noise: Any = None,
    ) -> RowNoise:
        # the shape, dtype and device; its values are never read
        self: RowNoise = torch.Tensor._make_subclass(cls, mean.detach())
        self.q_mean, self.q_std, self.rows, self.estimator = mean, std, rows, estimator
        self.factor, self.source, self.map_noise = factor, source, map_noise
        self.own_noise, self.row_uses, self.row_draws = None, 0, ()
        return self

    def noise(self) -> Tensor:
        """E, drawn at the first use."""
        if self.source is not None:
            return self.map_noise(self.source.noise())
        if self.own_noise is None:
            self.own_noise = torch.randn(
                self.q_mean.shape, dtype=self.q_mean.dtype, device=self.q_mean.device
            )
        return self.own_noise

    def draw(self) -> Tensor:
        """The weight as a plain tensor."""
        return self.times_factor(self.q_mean + self.q_std * self.noise())

    def times_factor(self, value: Tensor) -> Tensor:
        return value if self.factor is None else value * self.factor

    @property
    def root(self) -> RowNoise:
        return self if self.source is None else self.source.root

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA or (
            getattr(func, "__name__", "") == "__get__"
            and getattr(func, "__self__", None) in _ATTRIBUTES
        ):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = RULES.get(func)
        result = NotImplemented if rule is None else rule(func, *args, **kwargs)
        if result is NotImplemented:
            result = func(
                *(_ordinary(a) for a in args), **{k: _ordinary(v) for k, v in kwargs.items()}
            )
        return result

    def derived(
        self, mean: Tensor, std: Tensor, factor: Any, map_noise: Callable[[Tensor], Tensor]
    ) -> RowNoise:
        return RowNoise(mean, std, self.rows, self.estimator, factor, self, map_noise)


def _ordinary(value: Any) -> Any:
    """One draw for all rows in the place of a `RowNoise`, also inside lists and tuples."""
    if isinstance(value, RowNoise):
        if value.root.row_uses:
            raise used_twice(value)
        return value.draw()
    return type(value)(_ordinary(v) for v in value) if type(value) in (list, tuple) else value


def used_twice(weight: RowNoise) -> ModelError:
    """The error of a weight that is used more often than its estimator allows."""
    others = (
        'estimator="weight"'
        if weight.estimator == "flipout"
        else 'estimator="flipout" (if all its uses are linear maps of one shape) or "weight"'
    )
    return ModelError(
        f"a weight of shape {tuple(weight.shape)} is used more than once in one run of the program,"
        f" so that the outputs of a row share its noise, which the {weight.estimator} estimator"
        f" cannot give; use {others}"
    )


def count_use(weight: RowNoise) -> None:
    """Counts a use of `weight` in a linear map, or raises a ModelError if it may have no more."""
    weight.root.row_uses += 1
    if weight.estimator == "local" and weight.root.row_uses > 1:
        raise used_twice(weight)


def _scaled(func: Any, a: Any, b: Any) -> Any:
    """A product or quotient with a scale that has no noise per row."""
    weight, scale = (a, b) if isinstance(a, RowNoise) else (b, a)
    if isinstance(scale, RowNoise) or (func in _QUOTIENTS and a is not weight):
        return NotImplemented
    scale = 1 / scale if func in _QUOTIENTS else scale
    if not isinstance(scale, Tensor) or scale.ndim == 0:
        return weight.derived(
            weight.q_mean,
            weight.q_std,
            scale if weight.factor is None else scale * weight.factor,
            lambda noise: noise,
        )
    if torch.broadcast_shapes(scale.shape, weight.shape) != weight.shape:
        return NotImplemented
    scale = weight.times_factor(scale)
    return weight.derived(weight.q_mean * scale, weight.q_std * scale, None, lambda noise: noise)


def _transposed(func: Any, weight: RowNoise, *args: Any) -> Any:
    """A weight with its dimensions moved or added by `func`."""
    return weight.derived(
        func(weight.q_mean, *args),
        func(weight.q_std, *args),
        weight.factor,
        lambda noise: func(noise, *args),
    )


_QUOTIENTS = {torch.div, Tensor.div, Tensor.__truediv__, Tensor.__rtruediv__}
_ATTRIBUTES = {
    getattr(Tensor, name)
    for name in (
        *("shape", "dtype", "device", "ndim", "requires_grad"),
        *("layout", "is_leaf", "grad_fn", "is_sparse", "is_quantized"),
    )
}
_METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex),
}
# torch function → what it gives for a `RowNoise`; NotImplemented if it needs an ordinary draw
RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, *_QUOTIENTS), _scaled),
    **dict.fromkeys(
        (torch.t, Tensor.t, torch.transpose, Tensor.transpose, torch.unsqueeze, Tensor.unsqueeze),
        _transposed,
    ),
    **{
        getattr(Tensor, name).__get__: lambda func, weight, *_: _transposed(func, weight)
        for name in ("T", "mT")
    },
}
