r"""The nodes of a scale mixture Σ_k w_k N(0, v_k), as far as given weights can tell them apart.

Owns `mixture_nodes`, `exponent`, `terms_that_count`, `sampled` and `unit_of`. Imports torch and
numpy only. Next: `mixture_grid.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.message import Message

_PIECE = 1 << 16
# nodes that no weight can tell apart better than this are one node: the error in ΔF is its square
_MERGE = {torch.float32: 1e-4, torch.float64: 1e-6}
# wide nodes that together have less than this share of every weight are left out
_TAIL = {torch.float32: 1e-8, torch.float64: 1e-10}
_WEIGHTS_FOR_SCALE = 8192
_WEIGHTS_PER_GROUP_FOR_SCALE = 512
_FINITE_MIXTURE = 12  # so many nodes are what the prior is, not the grid of a continuous one
GRID_GAP = 1e-3, math.log(3.0)  # between the logarithms of neighbouring variances of a grid


class Nodes(NamedTuple):
    """Variances and log weights by growing variance, (K,) or (K, groups). `total_var`: of the whole
    mixture, (), or one for each of the groups. `grid`: they look like the grid of a continuous
    prior. `open_end`: and no wide node could be left out.
    """

    variances: Tensor
    log_weights: Tensor
    total_var: Tensor
    open_end: bool
    grid: bool


def mixture_nodes(
    variances: Any,
    log_weights: Any,
    data: Message,
    scale_groups: Tensor | None = None,
    groups: Tensor | None = None,
) -> Nodes:
    """The nodes that count for `data`, in double precision; those that no weight can tell apart are
    merged at their mean variance.

    `scale_groups`: the row of nodes of each weight. `groups`: which weights share a variance.

    Raises:
        ReductionError: they are no mixture, or the message is not finite.
    """
    v, log_w = (
        torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (variances, log_weights)
    )
    fits = (
        v.shape == log_w.shape and v.ndim == (1 if scale_groups is None else 2) and v.shape[-1] > 0
    )
    if not (fits and bool((v >= 0).all() & v.isfinite().all() & ~log_w.isnan().any())):
        ends = (
            f"variances from {float(v.min())} to {float(v.max())}" if v.numel() else "no variances"
        )
        raise ReductionError(
            f"a mixture is variances >= 0 and as many log weights; got shapes {tuple(v.shape)} and"
            f" {tuple(log_w.shape)}, {ends}"
        )
    off = log_w.logsumexp(-1).abs()
    if v.numel() and not float(off.max()) < 1e-5:
        raise ReductionError(
            "mixture: expected log weights with logsumexp 0, got one that is"
            f" {float(off.max()):.3g} away; subtract it, so that the weights sum to 1"
        )
    sharpest, reach = _extent(data, groups)
    order = v.argsort(-1)
    v, log_w = v.gather(-1, order), log_w.gather(-1, order)
    total_var = (log_w.exp() * v).sum(-1)
    keep = _reached(v, log_w, reach, _TAIL.get(data.h.dtype, 1e-10)) if reach > 0 else v.shape[-1]
    grid = is_open_grid(v)
    open_end = keep == v.shape[-1] and grid
    v, log_w = v[..., :keep], log_w[..., :keep]
    if v.numel():
        v, log_w = _merged(v, log_w, data, sharpest)
    if scale_groups is not None:
        v, log_w = v.mT.contiguous(), log_w.mT.contiguous()
    device = data.h.device
    tensors = (v.to(device), log_w.to(device), total_var.to(device))
    return Nodes(*tensors, open_end and len(v) > 1, grid)


def is_open_grid(v: Tensor) -> bool:
    """Whether variances, in order, look like the grid of a continuous prior that ends: many of
    them, the last two neither far apart nor at a slab's width.
    """
    return v.shape[-1] > _FINITE_MIXTURE and bool(
        GRID_GAP[0] < (v[..., -1] / v[..., -2]).max().log() < GRID_GAP[1]
    )


def _extent(data: Message, groups: Tensor | None) -> tuple[float, float]:
    """The largest of L and h², and of m² + 1/L (summed over each of the `groups`), over the weights
    of which the data say something.
    """
    sharpest, farthest = 1e-30, 0.0
    total = None
    if groups is not None:
        count = int(groups.max()) + 1 if groups.numel() else 0
        total = torch.zeros(count, dtype=torch.float64, device=data.h.device)
    for start, h, precision in _pieces(data):
        informed = precision > 0
        h, precision = h.masked_fill(~informed, 0.0), precision.masked_fill(~informed, torch.inf)
        size = float(h.abs().max())
        sharpest = max(
            sharpest,
            float(precision.masked_fill(~informed, 0.0).max()),
            size * size if size < 1e150 else math.inf,
        )
        if not math.isfinite(sharpest):
            check_message(data)
        reach = ((h * (h / precision)) + 1) / precision
        if total is None:
            farthest = max(farthest, float(reach.max()))
        else:
            assert groups is not None
            total.index_add_(0, groups[start : start + len(h)], reach.double())
    return sharpest, farthest if total is None or not len(total) else float(total.max())


def check_message(data: Message) -> None:
    """Raises a ReductionError unless it is finite."""
    bad = [int((~t.isfinite()).sum()) for t in data]
    if any(bad):
        raise ReductionError(
            f"expected a finite message of the data, got {bad[0]} h and {bad[1]} precisions that"
            " are not; a posterior as narrow as that needs float64, or is a point estimate"
        )


def _pieces(data: Message) -> Iterator[tuple[int, Tensor, Tensor]]:
    for k, (h, precision) in enumerate(
        zip(data.h.reshape(-1).split(_PIECE), data.precision.reshape(-1).split(_PIECE), strict=True)
    ):
        if len(h):
            yield k * _PIECE, h, precision


def _reached(v: Tensor, log_w: Tensor, reach: float, tail: float) -> int:
    """How many nodes count. Of two as wide as m² + 1/L or more, v_r and v_k, a weight gives the
    wider the share 2.4 (w_k/w_r) √(v_r/v_k) at most.
    """
    wide = v >= max(reach, 1e-300)
    first = wide.to(torch.uint8).argmax(-1, keepdim=True)
    falls = log_w - 0.5 * v.clamp(min=1e-300).log()
    rest = falls.flip(-1).logcumsumexp(-1).flip(-1)  # of a node and all wider ones
    enough = (rest > falls.gather(-1, first) + math.log(tail)) | ~wide
    count = torch.arange(1, v.shape[-1] + 1).expand_as(v)
    return int(count[enough | ~wide.any(-1, keepdim=True)].max()) if v.numel() else 0


def _merged(v: Tensor, log_w: Tensor, data: Message, sharpest: float) -> tuple[Tensor, Tensor]:
    """One node in the place of all that are too narrow to matter, and one in that of all near the
    width of a slab.
    """
    merge = _MERGE.get(data.h.dtype, 1e-6)
    low, high = int((v * sharpest <= merge).sum(-1).min()), v.shape[-1]
    # a slab: how far the data tell apart what is near its width
    if v.ndim == 1 and int((v >= v[-1] * (1 - merge)).sum()) > 1:
        width, slope = float(v[-1]), 1e-300
        for _, h, precision in _pieces(data):
            narrow = 1 / (1 + width * precision.clamp(min=0))
            each = narrow * (precision.clamp(min=0) + h * (h * narrow))
            slope = max(slope, float(each.masked_fill(precision <= 0, 0).max()))
        high = max(int(((width - v) * slope > merge).sum()), low)
    parts = [
        _merge(v[..., :low], log_w[..., :low]),
        (v[..., low:high], log_w[..., low:high]),
        _merge(v[..., high:], log_w[..., high:]),
    ]
    return torch.cat([x for x, _ in parts], -1), torch.cat([w for _, w in parts], -1)


def _merge(v: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    if v.shape[-1] < 2:
        return v, log_w
    total = log_w.logsumexp(-1, keepdim=True)
    mean = ((log_w - total.clamp(min=-1e300)).exp() * v).sum(-1, keepdim=True)
    return torch.where(total.isfinite(), mean, v[..., :1]), total


def unit_of(prior_var: Tensor) -> float:
    """A power of two in which the prior's scale is not far from 1, or 1 if it is so already."""
    var = float(prior_var.mean()) if prior_var.numel() else 1.0
    return 1.0 if not 0 < var < math.inf or 1e-8 < var < 1e8 else 2.0 ** round(math.log2(var) / 2)


def exponent(h: Tensor, precision: Tensor, before: Tensor, after: Tensor | float) -> Tensor:
    """½h²(v − v₀)/((1 + vL)(1 + v₀L)), the difference of the exponents of two Gaussians, with v₀
    `before` and v `after`.

    Of two nodes, no difference of large numbers: exponents counted from that of the prior agree in
    all their digits where a signal is strong.
    """
    return 0.5 * (h / (1 + before * precision)) * (h * (after - before) / (1 + after * precision))


def terms_that_count(
    log_terms: Callable[[Tensor], Tensor], nodes: int, count: int, like: Tensor
) -> Tensor:
    """Log terms, (nodes, count), of all nodes that some column needs, −∞ elsewhere: of every 512th
    node first, then of more of them near the best. `log_terms` gives those of some nodes, (some,
    count), for weights of the shape of `like`.

    Between nodes that resolve a peak a log term bends by 0.02 s² over s steps or so, and what lies
    more than 36 nats below the best has no share.
    """
    terms = torch.full((nodes, count), -torch.inf, dtype=torch.float64, device=like.device)
    wanted, seen = np.ones(nodes, dtype=bool), np.zeros(nodes, dtype=bool)
    for stride in (512, 64, 8, 1):
        if nodes < 16 * stride and stride > 1:
            continue
        at = np.unique(np.append(np.arange(0, nodes, stride), nodes - 1))
        new = torch.from_numpy(at[wanted[at] & ~seen[at]]).to(like.device)
        for some in new.split(max(1, _PIECE // max(like.numel(), 1))):
            terms[some] = log_terms(some)
        seen[at] |= wanted[at]
        if stride > 1 and count:
            good = (terms[at] >= terms.amax(0) - (36 + 0.1 * stride**2)).any(1).cpu().numpy()
            wanted &= np.append(np.repeat(good[:-1] | good[1:], np.diff(at)), True)
    return terms


def sampled(groups: Tensor | None, n: int, device: Any) -> Tensor:
    """Indices of weights at equal distances in the layer, or in each group."""
    if groups is None:
        return torch.arange(0, n, max(math.ceil(n / _WEIGHTS_FOR_SCALE), 1), device=device)
    order = groups.argsort(stable=True)
    sizes = torch.bincount(groups)
    rank = torch.arange(n, device=device) - (sizes.cumsum(0) - sizes)[groups[order]]
    return order[rank % (sizes / _WEIGHTS_PER_GROUP_FOR_SCALE).ceil().long()[groups[order]] == 0]
