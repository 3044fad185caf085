"""The cycles of a fit, and between which of their steps empirical scales are set and weights are
pruned.

Owns `Timetable`. Next: `fit.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyro_bmr.errors import FitError, described
from pyro_bmr.fitting.arguments import Arguments
from pyro_bmr.fitting.convergence import (
    NOT_CONVERGED,
    UntilConverged,
    last_stretch,
    rise_at_full_rate,
    rise_between,
)
from pyro_bmr.fitting.progress import Progress
from pyro_bmr.fitting.run import Run
from pyro_bmr.pruning import Every

# The data speak first: no empirical scale is set and no weight pruned before this many steps, or
# this part of a shorter fit. Earlier, on small data, scales follow weights that have learned
# nothing yet down to zero, and such weights look superfluous.
_WARM_UP_STEPS, _WARM_UP_FRACTION = 300, 0.3
_TOLERANCE = UntilConverged.tolerance
_MEND = "fit longer, or raise the learning rate"


@dataclass(frozen=True)
class Timetable:
    """How many steps there are in an epoch, in the first cycle, and in all at most; the first with
    scales or pruning after it; how many nats of a rise in the bound count as none.
    """

    per_epoch: int
    first: int
    most: int
    warm_up: float
    allowed: float
    until: UntilConverged | None
    reduce: Every | None

    @staticmethod
    def of(run: Run, given: Arguments) -> Timetable:
        """The timetable of a fit.

        Raises:
            FitError: reductions are asked for, and none can be made.
            ReductionError: the posterior cannot be reduced as asked for.
        """
        per_epoch = len(run.rows.sizes)
        until = given.epochs if isinstance(given.epochs, UntilConverged) else None
        most = until.steps if until else given.epochs * per_epoch  # type: ignore[operator]
        first = min(until.first, most) if until else most
        warm_up = min(_WARM_UP_STEPS, _WARM_UP_FRACTION * first)
        tolerance = until.tolerance if until else _TOLERANCE
        allowed = tolerance * run.rows.size / given.temperature
        made = Timetable(per_epoch, first, most, warm_up, allowed, until, given.reduce)
        if given.reduce is not None:
            made._check(run, given.reduce)
        return made

    def _check(self, run: Run, reduce: Every) -> None:
        progress = Progress()
        self.begin(progress)
        due = any(self.due(progress, step) for step in range(1, progress.length + 1))
        if not (due and run.has_variance):
            why = (
                "a point estimate has no variance"
                if due
                else f"none falls between the warm-up ({math.ceil(self.warm_up)} steps) and the end"
                f" ({progress.length} steps)"
            )
            raise FitError(
                f"{described(reduce)}: no reduction can be made, {why}; fit longer, raise"
                " stop, reduce more often, or use MeanField"
            )
        # raises now what would stop the fit at its first reduction
        reduce.reduce(run.posterior(), 0.0)

    def begin(self, progress: Progress) -> None:
        """Begins the first cycle."""
        progress.begin_cycle(self.first)

    def due(self, progress: Progress, step: int) -> bool:
        """Whether a reduction is due after `step`."""
        if self.reduce is None or step < self.warm_up:
            return False
        return self.reduce.is_due(step - progress.began, progress.length, self.per_epoch)

    def pauses(self, progress: Progress) -> bool:
        """Whether scales or masks may change after this step."""
        return progress.step % self.per_epoch == 0 or self.due(progress, progress.step)

    def turn(self, progress: Progress, seconds: float) -> bool:
        """At the end of a cycle: whether another begins, which `progress` then has, and else what
        was found. `seconds`: of the fit so far.
        """
        progress.ends.append(last_stretch(progress.blocks))
        rise = (
            rise_at_full_rate(progress.blocks, self.allowed)
            if len(progress.ends) == 1
            else rise_between(progress.ends[-2], progress.ends[-1], self.allowed)
        )
        progress.converged = rise is not None and rise.is_over
        length = 0 if progress.converged else self._next(progress, seconds)
        if length:
            progress.begin_cycle(length)
            return True
        where = (
            "from the third to the fourth eighth of its steps"
            if len(progress.ends) == 1
            else f"in the last cycle, of {progress.length:,} steps"
        )
        progress.over = True
        progress.convergence = "the fit is too short to tell" if rise is None else f"{rise} {where}"
        return False

    def _next(self, progress: Progress, seconds: float) -> int:
        """The steps of the next cycle, 0 if the budget has none for it."""
        if self.until is None:
            return 0
        length = min(2 * progress.length, self.most - progress.step)
        left = math.inf if self.until.seconds is None else self.until.seconds - seconds
        is_enough = length >= progress.length and length * seconds <= left * progress.step
        return length if is_enough else 0

    def caution(self, progress: Progress) -> str | None:
        """A message if the fit has not converged."""
        if progress.converged:
            return None
        mend = (
            _MEND
            if self.until is None
            else f"raise the budget, as in epochs=UntilConverged(steps={2 * self.until.steps}), or"
            " raise the learning rate"
        )
        return f"{NOT_CONVERGED}: {progress.convergence}; {mend}"
