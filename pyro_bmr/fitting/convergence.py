"""When a fit is done: how much its bound still rises, beside its noise.

Owns `UntilConverged`, `Rise`, and the rises that are looked at. Next: `arguments.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from pyro_bmr.checks import check_arguments, is_whole
from pyro_bmr.errors import FitError, holds

NOT_CONVERGED = "the fit has not converged"  # how the warning begins
# A bound is judged by the means of this many stretches of blocks, or not at all.
_FEWEST = 4
# Blocks of steps that are kept of one cycle. When there are as many, neighbours are joined.
MOST_BLOCKS = 512


@dataclass(frozen=True)
class UntilConverged:
    """The length of a fit that finds out itself when it is done: ``fit(..., epochs=None)``, or
    ``epochs=UntilConverged(...)`` with another budget.

    The fit runs in cycles of `first` steps, twice as many, four times as many, and so on. In each
    the learning rate falls on the schedule of the fit and then begins again, as in Loshchilov &
    Hutter 2017 (arXiv 1608.03983). Each is a whole fit, with the reductions at their places in it.
    The fit is done when its bound no longer rises: by no more than one standard error of the rise
    above `tolerance` nats for each of the N/T rows that the data count for. That error must itself
    be less than those nats, since noise hides a rise. In the first cycle the
    rise is that from the third eighth of the steps to the fourth: later the falling rate makes a
    bound rise that has converged, and hides that another has not. After further cycles it is the
    rise from the end of one to the end of the next, where the rate is low. The gains that
    reductions predicted do not count as a rise.

    Args:
        steps: the budget. A cycle that would not end within it is cut to what is left, or left out
            if that is less than the cycle before.
        seconds: no cycle begins that would not end within so many seconds, judged by the speed so
            far; None for no limit. The first cycle is always run. With it a result depends on the
            speed of the machine.
        first: the steps of the first cycle.
        tolerance: nats a row, as above.

    Raises:
        FitError: a number is out of its range.

    Example:
        >>> fit(program, data, epochs=UntilConverged(steps=4_000, seconds=60))
    """

    steps: int = 16_000
    seconds: float | None = None
    first: int = 3_000
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        check = partial(check_arguments, "UntilConverged")
        for name in ("steps", "first"):
            value = getattr(self, name)
            check(is_whole(value, 1), "a whole number of steps >= 1", FitError, **{name: value})
        limited = self.seconds is None or holds(lambda s: 0 < s < math.inf, self.seconds)
        check(limited, "a finite number > 0, or None", FitError, seconds=self.seconds)
        known = holds(lambda t: 0 <= t < math.inf, self.tolerance)
        check(known, "a finite number >= 0", FitError, tolerance=self.tolerance)


@dataclass(frozen=True)
class Rise:
    """By how many nats a bound has risen between two stretches, its standard error, and the nats
    that count as none.
    """

    nats: float
    error: float
    allowed: float

    @property
    def is_over(self) -> bool:
        """Whether the bound no longer rises by more than its noise, which is small. If it does not
        rise at all, this is false of one in fifty where the error is the largest, of fewer else.
        """
        return self.error < self.allowed and self.nats <= self.allowed + self.error

    def __str__(self) -> str:
        return (
            f"the bound rose by {self.nats:.3g} ± {self.error:.2g} nats"
            f" ({self.allowed:.2g} count as none)"
        )


def stretch(blocks: Sequence[float]) -> tuple[float, float]:
    """The mean of the bound over a stretch, and its standard error.

    The error is that of independent blocks, from the differences of neighbours, so that a trend
    does not count as noise: s² = mean of (b_{j+1} − b_j)² / 2 (von Neumann 1941).
    """
    mean = math.fsum(blocks) / len(blocks)
    if len(blocks) < 2:
        return mean, math.inf
    steps = [(b - a) ** 2 for a, b in pairwise(blocks)]
    return mean, math.sqrt(math.fsum(steps) / (2 * len(steps) * len(blocks)))


def last_stretch(blocks: Sequence[float]) -> tuple[float, float]:
    """The same at the end of a cycle: of its last eighth, where the rate is low."""
    return stretch(blocks[-max(len(blocks) // 8, _FEWEST) :])


def rise_between(
    before: tuple[float, float], after: tuple[float, float], allowed: float
) -> Rise | None:
    """The rise from the end of one cycle to that of the next; None if they are too short to
    tell.
    """
    error = math.hypot(before[1], after[1])
    return Rise(after[0] - before[0], error, allowed) if math.isfinite(error) else None


def rise_at_full_rate(blocks: Sequence[float], allowed: float) -> Rise | None:
    """The rise from the third eighth of a cycle to the fourth; None for a cycle that is too short
    to tell.
    """
    eighth = len(blocks) // 8
    if eighth < _FEWEST:
        return None
    (before, e), (after, f) = (stretch(blocks[k * eighth : (k + 1) * eighth]) for k in (2, 3))
    return Rise(after - before, math.hypot(e, f), allowed)
