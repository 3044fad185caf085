r"""Noise drawn for each row of a batch instead of once for all: local reparametrisation and
flipout, for any program that uses weights in linear maps.

Owns `RowNoise`, a drawn weight that knows its mean and standard deviation. Products with scales
keep that knowledge; a linear map of the batch uses it, so that each row of the output has the
distribution that it has under a weight of its own; everything else sees an ordinary draw. Next:
`mean_field.py`.

Each row's outputs have exactly the distribution they have when the weight itself is drawn; only
rows of one batch become independent of each other, which the expectation of a sum over rows does
not see, while its gradient's variance falls. That needs the first dimension of a map's input to be
the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bmr.errors import ModelError, described

PER_STEP, PER_ROW = ("weight", "antithetic"), ("local", "flipout")


def check_estimator(estimator: str, *others: str) -> str:
    """`estimator`, if it draws noise per row or is one of the `others`."""
    if not isinstance(estimator, str) or estimator not in (*others, *PER_ROW):
        raise ModelError(
            f"estimator={described(estimator)}: one of {', '.join(map(repr, (*others, *PER_ROW)))}"
            " is wanted"
        )
    return estimator


class RowNoise(Tensor):
    r"""A weight W = M + S ∘ E, E of independent standard normals, whose noise is drawn where it is
    used.

    - ``"local"`` (Kingma, Salimans & Welling 2015, arXiv 1506.02557), for x of shape (rows, in)
      alone, where each output depends on noise of its own: Wx + b ~ N(Mx + m_b, S²x² + s_b²), one
      normal per row and output. Where a row uses a weight at several places (convolutions, tokens),
      outputs of one row share noise, and flipout is used instead.
    - ``"flipout"`` (Wen et al. 2018, arXiv 1803.04386): row n has the weight M + (S ∘ E) ∘ rₙsₙᵀ
      with random signs r, s; E is drawn once.

    A use that is neither gets one ordinary draw for all rows.
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
        rule = _RULES.get(func)
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
            raise _used_twice(value)
        return value.draw()
    return type(value)(_ordinary(v) for v in value) if type(value) in (list, tuple) else value


def _used_twice(weight: RowNoise) -> ModelError:
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


def _scaled(func: Any, a: Any, b: Any) -> Any:
    """A product or quotient with a scale that is not itself uncertain in this way."""
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
    return weight.derived(
        func(weight.q_mean, *args),
        func(weight.q_std, *args),
        weight.factor,
        lambda noise: func(noise, *args),
    )


def _linear(func: Any, x: Tensor, weight: Any, bias: Any = None) -> Any:
    """Wx + b for x of shape (rows, …, in)."""
    if isinstance(x, RowNoise) or x.ndim < 2 or not _splits_by_rows(x, weight, bias):
        return NotImplemented
    x = weight.times_factor(x) if isinstance(weight, RowNoise) else x
    local = isinstance(weight, RowNoise) and weight.estimator == "local" and x.ndim == 2
    if local and not isinstance(bias, RowNoise):
        out = F.linear(x, weight.q_mean, bias)
        return out + _noise_of(weight, F.linear(x.square(), weight.q_std.square()))
    if local:
        _count_use(bias)
        out = F.linear(x, weight.q_mean, bias.times_factor(bias.q_mean))
        return out + _noise_of(
            weight,
            F.linear(x.square(), weight.q_std.square(), bias.times_factor(bias.q_std).square()),
        )
    out = F.linear(x, weight.q_mean if isinstance(weight, RowNoise) else weight)
    if isinstance(weight, RowNoise):
        s, r = _signs(weight, weight.shape[1], weight.shape[0], (1,) * (x.ndim - 2))
        out = out + r * F.linear(x * s, weight.q_std * weight.noise())
    return out if bias is None else out + _row_bias(bias, (1,) * (x.ndim - 2), last=True)


def _matmul(func: Any, x: Any, weight: Any) -> Any:
    """x W for x of shape (rows, in), W of shape (in,) or (in, out)."""
    if (
        not isinstance(weight, RowNoise)
        or isinstance(x, RowNoise)
        or x.ndim != 2
        or weight.ndim > 2
    ):
        return NotImplemented
    out = _linear(func, x, weight.mT if weight.ndim == 2 else weight.unsqueeze(0))
    return out if out is NotImplemented or weight.ndim == 2 else out[:, 0]


def _convolution(
    func: Any,
    x: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """A convolution of x of shape (rows, channels, …), always by flipout: the places of one output
    map share their weights.
    """
    if isinstance(x, RowNoise) or x.ndim != weight.ndim or not _splits_by_rows(x, weight, bias):
        return NotImplemented
    places = (1,) * (x.ndim - 2)
    x = weight.times_factor(x) if isinstance(weight, RowNoise) else x
    out = func(
        x,
        weight.q_mean if isinstance(weight, RowNoise) else weight,
        None,
        stride,
        padding,
        dilation,
        groups,
    )
    if isinstance(weight, RowNoise):
        s, r = (t.view(*t.shape, *places) for t in _signs(weight, x.shape[1], weight.shape[0], ()))
        out = out + r * func(
            x * s, weight.q_std * weight.noise(), None, stride, padding, dilation, groups
        )
    return out if bias is None else out + _row_bias(bias, places, last=False)


def _splits_by_rows(x: Tensor, weight: Any, bias: Any) -> bool:
    uncertain = [w for w in (weight, bias) if isinstance(w, RowNoise)]
    return (
        bool(uncertain)
        and x.shape[0] == uncertain[0].rows
        and all(w.root.own_noise is None or w.root.row_uses for w in uncertain)
    )


def _noise_of(weight: RowNoise, var: Tensor) -> Tensor:
    _count_use(weight)
    # the clamp: without it the gradient is infinite at an output whose weights are all pruned
    return var.clamp_min(1e-24).sqrt() * torch.randn_like(var)


def _count_use(weight: RowNoise) -> None:
    weight.root.row_uses += 1
    if weight.estimator == "local" and weight.root.row_uses > 1:
        raise _used_twice(weight)


def _signs(
    weight: RowNoise, inputs: int, outputs: int, places: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """sₙ of shape (rows, …, inputs) and rₙ of (rows, …, outputs): the same at every use of a
    weight, so that a row has one weight throughout.
    """
    _count_use(weight)
    root, like = weight.root, weight.q_mean
    if not root.row_draws:
        root.row_draws = tuple(
            torch.randint(2, (weight.rows, n), device=like.device).to(like.dtype).mul_(2).sub_(1)
            for n in (inputs, outputs)
        )
    elif [t.shape[1] for t in root.row_draws] != [inputs, outputs]:
        raise _used_twice(weight)
    s, r = root.row_draws
    return s.view(weight.rows, *places, inputs), r.view(weight.rows, *places, outputs)


def _row_bias(bias: Any, places: tuple[int, ...], last: bool) -> Tensor:
    """b, one per row and output, the same at every use."""
    if not isinstance(bias, RowNoise):
        return bias if last else bias.view(-1, *places)
    _count_use(bias)
    root = bias.root
    if not root.row_draws:
        root.row_draws = (
            torch.randn(bias.rows, len(bias), dtype=bias.q_mean.dtype, device=bias.q_mean.device),
        )
    value = bias.times_factor(bias.q_mean + bias.q_std * root.row_draws[0])
    return value.view(bias.rows, *places, -1) if last else value.view(bias.rows, -1, *places)


_QUOTIENTS = {torch.div, Tensor.div, Tensor.__truediv__, Tensor.__rtruediv__}
_ATTRIBUTES = {
    getattr(Tensor, name)
    for name in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "requires_grad",
        "layout",
        "is_leaf",
        "grad_fn",
        "is_sparse",
        "is_quantized",
    )
}
_METADATA = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    Tensor.is_complex,
    torch.is_floating_point,
    torch.is_complex,
}
_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, *_QUOTIENTS), _scaled),
    **dict.fromkeys(
        (torch.t, Tensor.t, torch.transpose, Tensor.transpose, torch.unsqueeze, Tensor.unsqueeze),
        _transposed,
    ),
    **{
        getattr(Tensor, name).__get__: lambda func, weight, *_: _transposed(func, weight)
        for name in ("T", "mT")
    },
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
}
