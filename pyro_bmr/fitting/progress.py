"""What the loop of a fit carries from step to step.

Owns `Progress`. Next: `settings.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Where a fit stands. A checkpoint saves and restores it as one thing.

    `step`: the steps so far, those that were skipped included. `history`: one row per finished
    epoch. `delta_f`: the predicted gain in evidence of all that was pruned, nats. `seconds` of the
    fit; `reduction_seconds` are part of them. `expected_log_likelihood` and `kl`: sums over the
    `taken` steps of this epoch, those that were not skipped.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    delta_f: float = 0.0
    seconds: float = 0.0
    reduction_seconds: float = 0.0
    expected_log_likelihood: float = 0.0
    kl: float = 0.0
    taken: int = 0

    def epoch(self, steps_per_epoch: int) -> int:
        """The epoch to continue with. The last step of an epoch is saved before its row is there,
        so this may be an epoch without a step left.
        """
        return max(self.step - 1, 0) // steps_per_epoch + 1

    def begin(self, epoch: int, steps_per_epoch: int) -> int:
        """How many steps of `epoch` are over; if none is, its sums begin at zero."""
        over = self.step - (epoch - 1) * steps_per_epoch
        if not over:
            self.expected_log_likelihood, self.kl, self.taken = 0.0, 0.0, 0
        return over

    def add(self, terms: tuple[float, float] | None) -> None:
        """Counts both terms of the ELBO of a step; None for a step that was skipped."""
        if terms is not None:
            self.expected_log_likelihood += terms[0]
            self.kl += terms[1]
            self.taken += 1

    def means(self) -> tuple[float, float]:
        """The mean expected log likelihood and KL of the steps of this epoch, nats."""
        if not self.taken:
            return math.nan, math.nan
        return self.expected_log_likelihood / self.taken, self.kl / self.taken
