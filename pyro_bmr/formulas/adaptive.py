r"""Integrals of many functions of one number at once, each with its narrow places found first.

Owns `Panels`, `integrals` and `summits`. Imports torch and numpy only. Next: `quadrature.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError

_X, _W = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(6))
_ENDS = torch.tensor([-1 + 1e-7, 1 - 1e-7], dtype=torch.float64)
# from the points to the ends, by the polynomial
_TO_ENDS = torch.linalg.solve(
    _X[None] ** torch.arange(6)[:, None], _ENDS[None] ** torch.arange(6)[:, None]
).T
_ROUNDS = 120
_TOLERANCE = 1e-11  # of the whole integral, for each panel
_JUMP = 1e-7  # the same for what the ends of a panel may be off, in whose corners no point lies
_UNSEEN = 1e-15  # panels with less than this share are not looked at again

# (owner of each row, points of shape (rows, k)) → log values
LogFunction = Callable[[Tensor, Tensor], Tensor]


class Panels(NamedTuple):
    """Intervals [low, high], each of the function `owner`."""

    owner: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def between(cls, edges: Tensor) -> Panels:
        """Those between the sorted edges of each function, (functions, edges)."""
        owner = torch.arange(len(edges), device=edges.device)[:, None].expand(
            -1, edges.shape[1] - 1
        )
        inside = edges[:, 1:] > edges[:, :-1]
        return cls(owner[inside], edges[:, :-1][inside], edges[:, 1:][inside])


def integrals(log_f: LogFunction, panels: Panels, peak: Tensor, centre: Tensor) -> Tensor:
    r"""∫ f, ∫ (w − c) f and ∫ (w − c)² f of each function over exp(`peak`), (functions, 3).

    Gauss–Legendre rules of six points; a panel is halved until its halves say the same as the
    whole, and at its ends f is what the points say. The sum of the halves is taken.

    Raises:
        ReductionError: a function cannot be resolved.
    """
    total, count = torch.zeros(len(peak), 3, dtype=torch.float64, device=peak.device), len(peak)
    value, corner, off = _moments(log_f, panels, peak, centre)
    for _ in range(_ROUNDS):
        if not bool(value.isfinite().all()):
            break
        scale = total.index_add(0, panels.owner, value)
        scale[:, 1] = (scale[:, 0] * scale[:, 2]).sqrt()
        scale = scale[panels.owner]
        seen = (value.abs() > _UNSEEN * scale).any(1) | (corner > _JUMP * scale[:, 0])
        # a polynomial that meets the ends so well: six points integrate it, and twice its degree
        seen &= (off > _TOLERANCE * scale).any(1)
        total.index_add_(0, panels.owner[~seen], value[~seen])
        panels, value, scale = Panels(*(t[seen] for t in panels)), value[seen], scale[seen]
        middle = (panels.low + panels.high) / 2
        halves = Panels(
            panels.owner.repeat(2),
            torch.cat([panels.low, middle]),
            torch.cat([middle, panels.high]),
        )
        finer, corners, offs = _moments(log_f, halves, peak, centre)
        both = finer[: len(middle)] + finer[len(middle) :]
        good = ((both - value).abs() <= _TOLERANCE * scale).all(1) & (
            corners.view(2, -1).amax(0) <= _JUMP * scale[:, 0]
        )
        good |= (middle <= panels.low) | (middle >= panels.high)
        total.index_add_(0, panels.owner[good], both[good])
        if bool(good.all()):
            return total
        again = (~good).repeat(2)
        panels = Panels(*(t[again] for t in halves))
        value, corner, off = finer[again], corners[again], offs[again]
    raise ReductionError(
        f"the density cannot be integrated: {len(panels.owner.unique())} of {count} integrals are"
        " not finite, or do not settle"
    )


def _moments(
    log_f: LogFunction, panels: Panels, peak: Tensor, centre: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three integrals over each panel, and by how much, times its width, f at its ends is off
    the polynomial through the points; the same for each of the three integrands, with their largest
    factor in the panel.
    """
    half = (panels.high - panels.low)[:, None] / 2
    w = torch.cat([_X, _ENDS]).to(half).add(1).mul(half).add_(panels.low[:, None])
    f = (log_f(panels.owner, w) - peak[panels.owner, None]).exp_()
    inside, ends = f[:, :6], f[:, 6:]
    corner = ((inside @ _TO_ENDS.T.to(half)).sub_(ends).abs_() * half).amax(1)
    mass, away = inside * (half * _W.to(half)), w[:, :6] - centre[panels.owner, None]
    first = mass * away
    value = torch.stack([mass.sum(1), first.sum(1), first.mul_(away).sum(1)], 1)
    reach = torch.maximum(away[:, 0].abs(), away[:, -1].abs()) + half[:, 0]
    return value, corner, torch.stack([corner, corner * reach, corner * reach.square()], 1)


def summits(
    log_f: LogFunction, owner: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where log f is largest in each bracket, its value there, and how far from there it has fallen
    by a nat or so: at most the width of the bracket.

    The bracket shrinks to the neighbours of the best of nine points, until log f varies by less
    than a nat in it. At a jump it shrinks to nothing; there the width is that of the higher side.
    """
    at, best, width = (left + right) / 2, torch.full_like(left, -torch.inf), right - left
    steps = torch.linspace(0, 1, 9, dtype=torch.float64, device=left.device)
    open_ = torch.arange(len(left), device=left.device)
    for _ in range(60):
        if not len(open_):
            break
        a, b = left[open_], right[open_]
        x = a[:, None] + (b - a)[:, None] * steps
        value = log_f(owner[open_], x)
        top = value.amax(1)
        lower = torch.nn.functional.pad(value, (1, 1), value=torch.inf) < top[:, None]
        # of a plateau its end
        k = (2 * (value == top[:, None]).to(torch.uint8) + (lower[:, :-2] | lower[:, 2:])).argmax(1)
        better = top > best[open_]
        best[open_] = torch.where(better, top, best[open_])
        at[open_] = torch.where(better, x.gather(1, k[:, None])[:, 0], at[open_])
        width[open_] = b - a
        left[open_] = x.gather(1, (k - 1).clamp(min=0)[:, None])[:, 0]
        right[open_] = x.gather(1, (k + 1).clamp(max=8)[:, None])[:, 0]
        flat = (
            (top - value.amin(1) < 1) | ((b - a) <= 4e-16 * at[open_].abs()) | (top == -torch.inf)
        )
        open_ = open_[~flat]
    jump = (width <= 4e-16 * at.abs()).nonzero()[:, 0]
    if len(jump):
        width[jump] = _width_beside(log_f, owner[jump], at[jump], best[jump])
    return at, best, width


def _width_beside(log_f: LogFunction, owner: Tensor, at: Tensor, best: Tensor) -> Tensor:
    """How far log f stays within a nat of `best`, its value at the jump `at`, on the side where it
    stays there longer: a power of two times the rounding of `at`.
    """
    steps = at.abs()[:, None] * 2.0 ** torch.arange(-52, 1, dtype=at.dtype, device=at.device)
    value = log_f(owner, torch.cat([at[:, None] - steps, at[:, None] + steps], 1))
    near = (value >= best[:, None] - 1).view(len(at), 2, -1).cumprod(2).sum(2).amax(1)
    return steps.gather(1, (near[:, None] - 1).clamp(min=0))[:, 0]
