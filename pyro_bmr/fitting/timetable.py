"""Between which steps of a fit the empirical scales are set and weights are pruned.

Owns `Timetable`. Next: `fit.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pyro_bmr.errors import FitError, described
from pyro_bmr.fitting.arguments import Arguments
from pyro_bmr.fitting.run import Run

# The data speak first: no empirical scale is set and no weight pruned before this many steps, or
# this part of a shorter fit. Earlier, on small data, scales follow weights that have learned
# nothing yet down to zero, and such weights look superfluous.
_WARM_UP_STEPS, _WARM_UP_FRACTION = 300, 0.3


class Timetable(NamedTuple):
    """How many steps there are, in all and per epoch; the first with scales or pruning after it;
    and those with a reduction after them.
    """

    total: int
    per_epoch: int
    warm_up: float
    due: frozenset[int]

    @staticmethod
    def of(run: Run, given: Arguments) -> Timetable:
        """The timetable of a fit.

        Raises:
            FitError: reductions are asked for, and none can be made.
            ReductionError: the posterior cannot be reduced as asked for.
        """
        per_epoch = len(run.rows.sizes)
        total = given.epochs * per_epoch
        warm_up = min(_WARM_UP_STEPS, _WARM_UP_FRACTION * total)
        if given.reduce is None:
            return Timetable(total, per_epoch, warm_up, frozenset())
        due = frozenset(s for s in given.reduce.steps(total, per_epoch) if s >= warm_up)
        if not (due and run.has_variance):
            why = (
                "a point estimate has no variance"
                if due
                else f"none falls between the warm-up ({math.ceil(warm_up)} steps) and the end"
                f" ({total} steps)"
            )
            raise FitError(
                f"{described(given.reduce)}: no reduction can be made, {why}; fit longer, raise"
                " stop, reduce more often, or use MeanField"
            )
        # raises now what would stop the fit at its first reduction
        given.reduce.reduce(run.posterior(), 0.0)
        return Timetable(total, per_epoch, warm_up, due)

    def pauses(self, step: int) -> bool:
        """Whether scales or masks may change after `step`."""
        return step in self.due or step % self.per_epoch == 0
