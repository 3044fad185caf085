"""What a fit does with a step that it cannot take: it says where the fault is, and stops, or skips
the step and counts it.

Owns `Faults` and `diagnosis`. Next: `batches.py`.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from pyro_bmr.errors import FitError
from pyro_bmr.fitting.autograd_step import value_and_gradient
from pyro_bmr.fitting.step import Draw, Step

# weight of a new step in the averages, steps before they are trusted, standard deviations
_FORGETS, _SURE, _JUMP = 0.01, 100, 20.0


class Faults:
    """The steps that were skipped, at most `allowed`, and the recent expected log likelihood of a
    step, from which a jump is seen.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed, self.skipped = allowed, 0
        self.forget()

    def forget(self) -> None:
        """Starts new averages, as after a reduction, which may lower the likelihood for good."""
        self.steps, self.mean, self.var = 0, 0.0, 0.0

    def jump(self, likelihood: float) -> str:
        """What is wrong with the expected log likelihood of a step if it lies twenty standard
        deviations below the mean of the last hundred or so, else an empty text. If no step may be
        skipped, no step is a jump.
        """
        if not self.allowed:
            return ""
        std = math.sqrt(self.var)
        if self.steps >= _SURE and likelihood < self.mean - _JUMP * std:
            return (
                f"the expected log likelihood fell to {likelihood:.6g}, of late it was"
                f" {self.mean:.6g} ± {std:.2g}"
            )
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
            raise FitError(
                what + (f"; steps skipped before: {self.skipped}" if self.allowed else "")
            )
        self.skipped += 1

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [self.skipped, self.steps, self.mean, self.var]

    def restore(self, state: list[float]) -> None:
        """Goes on from `state`."""
        self.skipped, self.steps = int(state[0]), int(state[1])
        self.mean, self.var = float(state[2]), float(state[3])


def diagnosis(step: Step, program: Any, draw: Draw) -> str:
    """What to say of a step whose loss or gradient is not finite, with the sites where it is
    not.
    """
    bad = step.not_finite(draw)
    if isinstance(program, nn.Module):
        bad |= {
            name
            for name, p in program.named_parameters()
            if not bool(value_and_gradient(p).isfinite().all())
        }
    where = ", ".join(sorted(bad)) or "the observed site"
    return (
        f"the loss or its gradient is not finite at {where} (expected log likelihood"
        f" {draw.expected_log_likelihood:.6g}, KL {draw.kl:.6g})"
    )
