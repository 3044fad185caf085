"""Trials on held-out rows: a shorter fit to the other rows, for each fold.

Owns `Trials`, `PART`, `predicted`, `can_hold_out`, `folds_of`, and `with_noise`, data whose noise
is a number. Next: `temperature_trials.py`, `noise_trials.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyro_bmr.data.data_set import Data, validation_data
from pyro_bmr.experiments.settings import Settings, length_of
from pyro_bmr.fitting.convergence import UntilConverged
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.prediction.predict import Prediction, predict

_HELD_OUT = 1 / 6
PART = 1 / 3  # of the fit, that a trial is long
_ENOUGH = 200  # held-out rows; of fewer, more folds are held out

Attempt = Callable[
    [Data, Settings, UntilConverged | None, int], tuple[Callable[..., Any], Posterior]
]
"""(rows, settings, length, fold) → the fitted program, and what it predicts from."""


@dataclass(frozen=True)
class Trials:
    """The chosen `temperature`, and `nll`: temperature → negative log likelihood of the held-out
    rows after its trial, nats per row, with the `noise` that is best for them; with the `scale`
    that is best where the fit is as long as the trial.

    `scale`: the temperature of the class probabilities. `noise`: that of real targets, in standard
    deviations of the training rows; None where the fit infers it. `part`: how long the fit is that
    was tried, relative to one without trials, where no number of epochs is given.
    """

    temperature: float
    nll: Mapping[float, float]
    scale: float
    noise: float | None = None
    part: float = 1.0

    def applied(self, data: Data, settings: Settings) -> tuple[Data, Settings]:
        """The data and the settings of the fit that was chosen."""
        rows = data if self.noise is None else with_noise(data, self.noise)
        return rows, replace(settings, temperature=self.temperature)

    def length(self, data: Data, settings: Settings) -> UntilConverged | None:
        """That of the fit, if it is another than without trials."""
        length = length_of(settings.epochs, len(data.x_train), settings.batch_size, self.part)
        return length if self.part < 1 and isinstance(length, UntilConverged) else None


def with_noise(data: Data, noise: float) -> Data:
    """The data with a noise that is a number, in standard deviations of the training targets."""
    likelihood: Any = data.likelihood()
    return replace(data, family=replace(likelihood, noise=noise, noise_scale=None))


def predicted(
    attempt: Attempt, data: Data, settings: Settings, seed: int, part: float = PART
) -> Iterator[tuple[Prediction, Data]]:
    """For each fold, the prediction of the held-out rows after a trial on the others, and the data
    with these rows in the place of the test rows. `part`: the part of its length that a trial has.
    """
    for fold in range(folds_of(data)):
        rows = validation_data(data, _HELD_OUT, fold)
        program, posterior = attempt(rows, *_shortened(settings, rows, part), fold)
        yield predict(program, posterior, rows.x_test, draws=settings.draws, seed=seed), rows


def can_hold_out(data: Data) -> bool:
    """Whether there are rows to score a trial by: a sixth of them, or validation rows."""
    return data.x_val is not None or 0 < round(_HELD_OUT * len(data.x_train)) < len(data.x_train)


def folds_of(data: Data) -> int:
    """How many times rows are held out, for a trial each."""
    rows = len(data.x_train)
    held = round(_HELD_OUT * rows)
    if data.x_val is not None or not can_hold_out(data):
        return 1
    return min(math.ceil(_ENOUGH / held), rows // held)


def part_of(data: Data, settings: Settings) -> float:
    """The part of its length that a fit has which was tried by cross-validation. A long fit to few
    rows is more certain than a shorter one, and what the shorter trials say of it is not true.
    """
    return PART if settings.epochs is None and folds_of(data) > 1 else 1.0


def _shortened(
    settings: Settings, rows: Data, part: float
) -> tuple[Settings, UntilConverged | None]:
    """The settings and the length of a trial."""
    epochs, every = settings.epochs, settings.reduce_every
    length = length_of(epochs, len(rows.x_train), settings.batch_size, part)
    if isinstance(length, UntilConverged):
        return replace(settings, reduce_every=every and every * part), length
    part = length / epochs if epochs else part
    return replace(settings, epochs=length, reduce_every=every and every * part), None
