"""What the loop of a fit carries from step to step.

Owns `Progress`. Next: `settings.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pyro_bmr.fitting.convergence import MOST_BLOCKS


@dataclass
class Progress:
    """Where a fit stands. A checkpoint saves and restores it as one thing.

    `step`: the steps so far, those that were skipped included. `history`: one row per finished
    epoch. `delta_f`: the predicted gain in evidence of all that was pruned, nats. `seconds` of the
    fit; `reduction_seconds` are part of them. `expected_log_likelihood` and `kl`: sums over the
    `taken` steps of this epoch, those that were not skipped.

    A fit is one cycle of the learning rate, or several (`UntilConverged`). `began`: the steps
    before this cycle; `length`: its steps. `blocks`: the bound without the predicted gains, nats,
    as means over `block` steps each, of this cycle; `filling`: the values of the next one.
    `ends`: the bound at the end of each cycle and its error. `over`: whether the fit is at its
    end; `converged` and `convergence`: what was found then.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    delta_f: float = 0.0
    seconds: float = 0.0
    reduction_seconds: float = 0.0
    expected_log_likelihood: float = 0.0
    kl: float = 0.0
    taken: int = 0
    began: int = 0
    length: int = 0
    block: int = 1
    blocks: list[float] = field(default_factory=list)
    filling: list[float] = field(default_factory=list)
    ends: list[tuple[float, float]] = field(default_factory=list)
    over: bool = False
    converged: bool = False
    convergence: str = ""

    @property
    def end(self) -> int:
        """The last step of this cycle."""
        return self.began + self.length

    @property
    def done(self) -> float:
        """The fraction of this cycle that is over."""
        return (self.step - self.began) / self.length

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

    def begin_cycle(self, length: int) -> None:
        """Begins a cycle of `length` steps."""
        self.began, self.length = self.step, length
        self.block, self.blocks, self.filling = 1, [], []

    def add(self, likelihood: float, kl: float, temperature: float) -> None:
        """Counts both terms of the ELBO of a step."""
        self.expected_log_likelihood += likelihood
        self.kl += kl
        self.taken += 1
        self.filling.append(likelihood / temperature - kl - self.delta_f)
        if len(self.filling) == self.block:
            self.blocks.append(math.fsum(self.filling) / self.block)
            self.filling = []
        if len(self.blocks) == MOST_BLOCKS:
            pairs = zip(self.blocks[::2], self.blocks[1::2], strict=True)
            self.block, self.blocks = 2 * self.block, [(a + b) / 2 for a, b in pairs]

    def means(self) -> tuple[float, float]:
        """The mean expected log likelihood and KL of the steps of this epoch, nats."""
        if not self.taken:
            return math.nan, math.nan
        return self.expected_log_likelihood / self.taken, self.kl / self.taken
