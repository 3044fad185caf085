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
    Rise,
    UntilConverged,
    last_stretch,
    rise_at_full_rate,
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
    """How many steps there are in an epoch, and in all at most; the first with scales or pruning
    after it; how many nats of a rise in the bound count as none.
    """

    per_epoch: int
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
        warm_up = min(_WARM_UP_STEPS, _WARM_UP_FRACTION * most)
        tolerance = until.tolerance if until else _TOLERANCE
        allowed = tolerance * run.rows.size / given.temperature
        made = Timetable(per_epoch, most, warm_up, allowed, until, given.reduce)
        if given.reduce is not None:
            made._check(run, given.reduce)
        return made

    def _check(self, run: Run, reduce: Every) -> None:
        progress = Progress()
        self.begin(progress)
        progress.reducing = True
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
        if self.until:
            share = 2 if self.reduce else 1
            progress.begin_cycle(min(self.until.first, max(self.most // share, 1)), False)
        else:
            progress.begin_cycle(self.most, self.reduce is not None)

    def due(self, progress: Progress, step: int) -> bool:
        """Whether a reduction is due after `step`."""
        if not (self.reduce and progress.reducing):
            return False
        if self.until is None and step < self.warm_up:
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
        if self.until is None:
            self._finish(progress, rise_at_full_rate(progress.blocks, self.allowed))
            return False
        if progress.reducing:
            progress.over = True
            return False
        rise = self._rise(progress)
        length = self._next(progress, self.until, seconds)
        if length and not (rise and rise.is_over):
            progress.begin_cycle(length, False)
            return True
        self._finish(progress, rise)
        if self.reduce is None:
            return False
        progress.over = False
        progress.begin_cycle(progress.length, True)
        return True

    def _rise(self, progress: Progress) -> Rise | None:
        """The rise from the end of one cycle to that of the next; None for too few steps."""
        if len(progress.ends) < 2:
            return None
        (before, e), (after, f) = progress.ends[-2:]
        error = math.hypot(e, f)
        return Rise(after - before, error, self.allowed) if math.isfinite(error) else None

    def _next(self, progress: Progress, until: UntilConverged, seconds: float) -> int:
        """The steps of the next cycle, 0 if the budget has none for it."""
        share = 2 if self.reduce else 1
        length = min(2 * progress.length, until.steps // share - progress.step)
        if length < progress.length:
            return 0
        left = math.inf if until.seconds is None else until.seconds - seconds
        return length if share * length * seconds <= left * progress.step else 0

    def _finish(self, progress: Progress, rise: Rise | None) -> None:
        progress.over, progress.converged = True, rise is not None and rise.is_over
        looked_at = (
            "from the third to the fourth eighth of its steps"
            if self.until is None
            else f"in the last cycle, of {progress.length:,} steps"
        )
        progress.convergence = (
            "the fit is too short to tell" if rise is None else f"{rise} {looked_at}"
        )

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
