"""What every cell of a comparison shares, and its defaults: length, optimiser, guide, temperature.

Owns `Settings`, and routes, guides and optimisers by name. Next: `temperature_trials.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyro_bmr.baselines.options import check_rules, is_between, is_positive
from pyro_bmr.checks import is_whole
from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import ModelError, holds
from pyro_bmr.fitting.convergence import UntilConverged
from pyro_bmr.fitting.natural_gradient import natural_gradient
from pyro_bmr.fitting.optimizers import adam
from pyro_bmr.guides import LowRankPlusDiagonal, MatrixVariate, MeanField, ScaleCoupled
from pyro_bmr.guides.row_noise import PER_STEP, check_estimator

ROUTES = ("map", "fitted", "reduced")
OPTIMIZERS: dict[str, tuple[Callable[[float], Any], float]] = {
    "adam": (adam, 3e-3),
    "natural-gradient": (natural_gradient, 0.1),
}
"""Name → what makes the optimiser of `fit` from a learning rate, and the rate where none is
given.
"""
GUIDES: dict[str, Callable[..., Any]] = {
    "mean-field": MeanField,
    "scale-coupled": ScaleCoupled,
    "matrix-variate": MatrixVariate,
    "low-rank": partial(LowRankPlusDiagonal, rank=10),
}
"""Name → guide of the fitted and reduced routes (docs/choose_a_guide.md); low-rank has ten
directions a site.
"""


# Measured on held-out rows of many data sets (docs/results/defaults.md). Steps of a fit:
_STEPS, _PASSES = 3_000, 20  # the larger of both
_MOST = UntilConverged.steps
_APART = 1_000  # steps that the weights that are left need before the evidence decides again
_INTERVALS = 10  # between reductions, in a whole fit, at most
AUTO = "auto"
"""The temperature that trials choose."""


@dataclass(frozen=True)
class Settings:
    """What every cell of a comparison shares.

    `epochs`: None for 20, but no fewer than 3,000 steps and no more than 16,000; a third of that
    for fewer than 1,200 rows with trials on parts of them. `optimizer`: one of `OPTIMIZERS`;
    ``"natural-gradient"`` is for mean field, the route map takes adam at its own rate then; None
    for it where it can be had, else adam. `learning_rate`: None for that of the optimiser.
    `temperature`: ``"auto"`` for what held-out rows choose, with a temperature of the class
    probabilities (`temperature_trials`), or with the noise of real targets (`noise_trials`); for 1
    by the route map, for other targets, and for programs written by hand. `kept`: target fraction
    for the reduced route and for fitted shrinkage priors (1: as fitted), None for the evidence to
    decide. `reduce_every`: epochs between reductions, None for `epochs_between_reductions`;
    `start`, `stop`: as in `Every`. `draws`: of the predictive. `guide`: one of `GUIDES`, of which
    ``"mean-field"`` alone is for natural-gradient; `estimator`: as in `MeanField`, and for it.
    `widen`: the predictive draws from `posterior.widened(widen)`; `calibrate` finds that factor on
    a sixth of the training rows, or the validation rows that the data came with, which the fit does
    without.
    """

    epochs: int | None = None
    batch_size: int = 128
    learning_rate: float | None = None
    temperature: float | str = AUTO
    kept: float | None = None
    reduce_every: float | None = None
    start: float = 0.1
    stop: float = 0.75
    draws: int = 32
    validation: float | None = None
    optimizer: str | None = None
    guide: str = "mean-field"
    estimator: str = "weight"
    widen: float = 1.0
    calibrate: bool = False

    def __post_init__(self) -> None:
        if self.optimizer is None:
            usual = self.guide == "mean-field" and self.estimator in PER_STEP
            object.__setattr__(self, "optimizer", "natural-gradient" if usual else "adam")
        rate = optimizer_named(self.optimizer, self.learning_rate)[1]
        # as a number, which is kept beside the results
        object.__setattr__(self, "learning_rate", rate)
        check_estimator(self.estimator, *PER_STEP)
        guide_named(self.guide, self.optimizer, self.estimator)
        check_rules(self)

    def rules(self) -> dict[str, tuple[bool, str]]:
        """Option → whether its value is in its range, and that range."""
        ordered = holds(lambda: 0 <= self.start <= self.stop <= 1)
        return {
            "epochs": (self.epochs is None or is_whole(self.epochs, 1), "a whole number >= 1"),
            "batch_size": (is_whole(self.batch_size, 1), "a whole number >= 1"),
            "learning_rate": (is_positive(self.learning_rate), "a finite number > 0"),
            "temperature": (
                self.temperature == AUTO or is_positive(self.temperature),
                f"a finite number > 0, or '{AUTO}'",
            ),
            "kept": (self.kept is None or is_between(self.kept, 0, 1), "0 <= kept <= 1"),
            "reduce_every": (
                self.reduce_every is None or is_positive(self.reduce_every),
                "a finite number of epochs > 0",
            ),
            "start": (ordered, "0 <= start <= stop"),
            "stop": (ordered, "start <= stop <= 1"),
            "draws": (is_whole(self.draws, 0), "a whole number >= 0"),
            "validation": (
                self.validation is None
                or (is_between(self.validation, 0, 1) and 0 < self.validation < 1),
                "0 < validation < 1",
            ),
            "widen": (
                is_between(self.widen, 0, sys.float_info.max)
                and (self.widen == 1 or not self.calibrate),
                "a finite number >= 0, and not calibrate as well",
            ),
        }


def length_of(
    epochs: int | None, rows: int, batch_size: int, part: float = 1
) -> int | UntilConverged:
    """The length of a fit to so many rows, or of a trial that is that `part` of it. None for 20
    passes over the rows, but no fewer than 3,000 steps and no more than 16,000.
    """
    if epochs is not None:
        return max(1, round(part * epochs))
    steps = round(part * usual_steps(rows, batch_size))
    return UntilConverged(steps=steps, first=steps)


def epochs_between_reductions(
    settings: Settings, length: int | UntilConverged, data: Data
) -> float | None:
    """The epochs between the reductions of a fit of that length, None for a tenth of it.

    Where the evidence decides in a fit to classes by the natural gradient below temperature 1, the
    last reduction is at `stop` of the fit, and the others are as far apart as it is from the
    beginning: about a thousand steps, and a tenth of the fit at least. All other fits have a tenth:
    a target size falls step by step, and at 1 weights that are not needed draw the scales of their
    layer down until they are pruned.
    """
    if settings.reduce_every is not None:
        return settings.reduce_every
    by_evidence = settings.kept is None and settings.optimizer == "natural-gradient"
    is_cold = data.task == "classification" and float(settings.temperature) < 1
    if not (by_evidence and is_cold and settings.stop):
        return None
    per_epoch = math.ceil(len(data.x_train) / settings.batch_size)
    total = length.first if isinstance(length, UntilConverged) else length * per_epoch
    most = max(math.floor(settings.stop * _INTERVALS), 1)
    count = min(max(round(settings.stop * total / _APART), 1), most)
    return settings.stop * total / count / per_epoch


def usual_steps(rows: int, batch_size: int) -> int:
    """The steps of a fit without a number of epochs."""
    return min(max(_STEPS, _PASSES * math.ceil(rows / batch_size)), _MOST)


def optimizer_named(
    name: str | None, learning_rate: float | None = None
) -> tuple[Callable[[], Any], float]:
    """What makes the optimiser of that name for `fit`, and its learning rate, by default its own.

    Raises:
        ModelError: there is no such optimiser.

    Example:
        >>> make, rate = optimizer_named("natural-gradient")
        >>> fit(program, data, optimizer=make())
    """
    if name not in OPTIMIZERS:
        raise ModelError(f"no optimizer '{name}'; the optimizers are: {', '.join(OPTIMIZERS)}")
    make, own = OPTIMIZERS[name]
    rate = own if learning_rate is None else learning_rate
    return partial(make, rate), rate


def guide_named(
    name: str, optimizer: str | None = "adam", estimator: str = "weight"
) -> Callable[..., Any]:
    """What makes the guide of that name for `fit`; an optimiser other than adam, and an estimator
    other than ``"weight"``, are for mean field.

    Raises:
        ModelError: there is no such guide, or it does not go with the optimiser or the estimator.

    Example:
        >>> fit(program, data, guide=guide_named("low-rank"))
    """
    if name not in GUIDES:
        raise ModelError(f"no guide '{name}'; the guides are: {', '.join(GUIDES)}")
    if name == "mean-field":
        return partial(MeanField, estimator=estimator)
    for option, value, plain in (
        ("optimizer", optimizer, "adam"),
        ("estimator", estimator, "weight"),
    ):
        if value != plain:
            raise ModelError(
                f"{option} '{value}': expected the guide mean-field, got '{name}'; leave one out"
            )
    return GUIDES[name]
