"""What a fit is given beside its program and its data, checked before any work.

Owns `Arguments`. Next: `checkpoint_file.py`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro_bmr.errors import FitError, described, holds
from pyro_bmr.fitting.convergence import UntilConverged
from pyro_bmr.fitting.natural_gradient import NaturalGradient
from pyro_bmr.fitting.optimizers import MakeOptimizer, MakeScheduler
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.pruning import Every

Program = Callable[..., Any]
BATCH_SIZE = 128  # rows, by default
_LARGEST_SEED = 1 << 40  # seeds of steps are a million times as large
PROGRAM = "a plain network is made a program by BayesianNetwork(net, prior, likelihood)"
_FUNCTIONS = {
    "program": f"a Pyro program, called as program(x, y), ({PROGRAM})",
    "guide": (
        "MeanField, another guide of this library or of Pyro, or a function from the program to a"
        " guide"
    ),
    "optimizer": (
        "a function from parameters to an optimiser, such as adam(1e-3) or partial(torch.optim.SGD,"
        " lr=0.1)"
    ),
    "scheduler": (
        "a function from the optimiser and the number of steps to a schedule, such as cosine, or"
        " None"
    ),
}


@dataclass(frozen=True)
class Arguments:
    """The arguments of `fit`, which documents them, each in its range.

    Raises:
        FitError: one is not.
    """

    program: Program
    guide: Program
    epochs: int | UntilConverged
    batch_size: int
    optimizer: MakeOptimizer | NaturalGradient
    scheduler: MakeScheduler | None
    seed: int
    temperature: float
    reduce: Every | None
    start: Posterior | None
    skip_faulty: int
    shuffle: bool

    def __post_init__(self) -> None:
        numbered = () if isinstance(self.epochs, UntilConverged) else ("epochs",)
        for name in (*numbered, "batch_size", "seed", "skip_faulty"):
            self._whole_number(name)
        size = f"a number of size below {_LARGEST_SEED}"
        self._check("seed", abs(self.seed) < _LARGEST_SEED, size)
        for name, words in _FUNCTIONS.items():
            value = getattr(self, name)
            none = name == "scheduler" and value is None
            natural = name == "optimizer" and isinstance(value, NaturalGradient)
            if not (callable(value) or none or natural):
                raise FitError(f"{name}: expected {words}, got {described(value)}")
        if not isinstance(self.epochs, UntilConverged):
            self._check("epochs", self.epochs >= 1, "at least 1, None or UntilConverged(...)")
        self._check("batch_size", self.batch_size >= 1, "at least 1 row")
        self._check("skip_faulty", self.skip_faulty >= 0, "a number of steps >= 0")
        in_range = holds(lambda x: 0 < x < math.inf, self.temperature)
        self._check("temperature", in_range, "a finite number > 0 (1 is Bayes)")
        for name, kind in (("reduce", Every), ("start", Posterior)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise FitError(
                    f"{name}: expected {kind.__name__}(...) or None, got {described(value)}"
                )

    def _whole_number(self, name: str) -> None:
        value = getattr(self, name)
        is_one = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        self._check(name, is_one, "a whole number")

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise FitError(f"{name}={described(getattr(self, name))}: expected {rule}")
