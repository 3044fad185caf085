"""What a fit does with a step that it cannot take: stop, or skip it and count.

Owns `Faults`. Next: `fit_state.py`.
"""

from __future__ import annotations

import math

from pyro_bmr.errors import FitError

_FORGETS, _SURE, _JUMP = 0.01, 100, 20.0  # weight of a new step in the averages, steps before they are trusted, standard deviations


class Faults:
    """The steps that were skipped, at most `allowed`, and what the expected log likelihood of a step has been lately, by which a jump is known."""

    def __init__(self, allowed: int) -> None:
        self.allowed, self.skipped = allowed, 0
        self.forget()

    def forget(self) -> None:
        """Begins the averages anew, as after a reduction, which may lower the likelihood for good."""
        self.steps, self.mean, self.var = 0, 0.0, 0.0

    def jump(self, likelihood: float) -> str:
        """What is wrong with the expected log likelihood of a step if it lies twenty standard deviations below those of the last hundred or so, else nothing.
        Where no step may be skipped, none is."""
        if not self.allowed:
            return ""
        std = math.sqrt(self.var)
        if self.steps >= _SURE and likelihood < self.mean - _JUMP * std:
            return f"the expected log likelihood fell to {likelihood:.6g}, of late it was {self.mean:.6g} ± {std:.2g}"
        self.steps += 1
        rate = max(_FORGETS, 1 / self.steps)
        deviation = likelihood - self.mean
        self.mean += rate * deviation
        self.var = (1 - rate) * (self.var + rate * deviation * deviation)
        return ""

    def skip(self, what: str) -> None:
        """Counts a step that is skipped.

        Raises:
            FitError: that is one too many.
        """
        if self.skipped >= self.allowed:
            raise FitError(what + (f"; steps skipped before: {self.skipped}" if self.allowed else ""))
        self.skipped += 1

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [self.skipped, self.steps, self.mean, self.var]

    def restore(self, state: list[float]) -> None:
        """Goes on from `state`."""
        self.skipped, self.steps = int(state[0]), int(state[1])
        self.mean, self.var = float(state[2]), float(state[3])
