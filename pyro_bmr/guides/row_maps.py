r"""Linear maps and convolutions of a weight whose noise is drawn per row: local reparametrisation
and flipout.

Owns the rules that `RowNoise` follows there; `RULES` gets them at the end of this file. Next:
`mean_field.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bmr.guides.row_noise import RULES, RowNoise, count_use, used_twice


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
        count_use(bias)
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
    """A convolution of x of shape (rows, channels, …), always by flipout, since the places of an
    output map share their weights.
    """
    if isinstance(x, RowNoise) or x.ndim != weight.ndim or not _splits_by_rows(x, weight, bias):
        return NotImplemented
    places = (1,) * (x.ndim - 2)
    x = weight.times_factor(x) if isinstance(weight, RowNoise) else x
    how = None, stride, padding, dilation, groups
    out = func(x, weight.q_mean if isinstance(weight, RowNoise) else weight, *how)
    if isinstance(weight, RowNoise):
        s, r = (t.view(*t.shape, *places) for t in _signs(weight, x.shape[1], weight.shape[0], ()))
        out = out + r * func(x * s, weight.q_std * weight.noise(), *how)
    return out if bias is None else out + _row_bias(bias, places, last=False)


def _splits_by_rows(x: Tensor, weight: Any, bias: Any) -> bool:
    """Whether the first dimension of x is the batch, and the noise of weight and bias is not drawn
    for all rows yet.
    """
    uncertain = [w for w in (weight, bias) if isinstance(w, RowNoise)]
    return (
        bool(uncertain)
        and x.shape[0] == uncertain[0].rows
        and all(w.root.own_noise is None or w.root.row_uses for w in uncertain)
    )


def _noise_of(weight: RowNoise, var: Tensor) -> Tensor:
    """The noise of each output of each row, of variance `var`."""
    count_use(weight)
    # the clamp: without it the gradient is infinite at an output whose weights are all pruned
    return var.clamp_min(1e-24).sqrt() * torch.randn_like(var)


def _signs(
    weight: RowNoise, inputs: int, outputs: int, places: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The signs sₙ of shape (rows, …, inputs) and rₙ of shape (rows, …, outputs). They are the same
    at every use of a weight, so that a row has one weight throughout.
    """
    count_use(weight)
    root, like = weight.root, weight.q_mean
    if not root.row_draws:
        root.row_draws = tuple(
            torch.randint(2, (weight.rows, n), device=like.device).to(like.dtype).mul_(2).sub_(1)
            for n in (inputs, outputs)
        )
    elif [t.shape[1] for t in root.row_draws] != [inputs, outputs]:
        raise used_twice(weight)
    s, r = root.row_draws
    return s.view(weight.rows, *places, inputs), r.view(weight.rows, *places, outputs)


def _row_bias(bias: Any, places: tuple[int, ...], last: bool) -> Tensor:
    """The bias, one per row and output, the same at every use."""
    if not isinstance(bias, RowNoise):
        return bias if last else bias.view(-1, *places)
    count_use(bias)
    root = bias.root
    if not root.row_draws:
        root.row_draws = (
            torch.randn(bias.rows, len(bias), dtype=bias.q_mean.dtype, device=bias.q_mean.device),
        )
    value = bias.times_factor(bias.q_mean + bias.q_std * root.row_draws[0])
    return value.view(bias.rows, *places, -1) if last else value.view(bias.rows, -1, *places)


RULES.update(
    dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul)
)
RULES.update(dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution))
RULES[F.linear] = _linear
