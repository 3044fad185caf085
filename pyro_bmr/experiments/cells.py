"""One cell of a comparison: a fit, its reduction and its prediction, and what they scored.

Owns `Settings`, which all cells share, `Cell` and `run_cell`. Next: `methods.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.data.data_set import Data, validation_data
from pyro_bmr.errors import ModelError
from pyro_bmr.experiments.models import Build
from pyro_bmr.exporting import point_weights
from pyro_bmr.fitting.fit import Fit, fit
from pyro_bmr.fitting.natural_gradient import natural_gradient
from pyro_bmr.fitting.optimizers import adam
from pyro_bmr.guides import LowRankPlusDiagonal, MatrixVariate, MeanField, Point, ScaleCoupled
from pyro_bmr.guides.row_noise import PER_STEP, check_estimator
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.calibration import best_widening
from pyro_bmr.prediction.paired_losses import paired_loss
from pyro_bmr.prediction.predict import ClassPrediction, Prediction, predict
from pyro_bmr.priors import Gaussian, Prior
from pyro_bmr.pruning import Every
from pyro_bmr.reduction.reduce import quiet_reduction
from pyro_bmr.reduction.result import Reduction

ROUTES = ("point", "fitted", "reduced")
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


@dataclass(frozen=True)
class Settings:
    """What every cell of a comparison shares; kept beside its results.

    `optimizer`: one of `OPTIMIZERS`; ``"natural-gradient"`` is for mean field, the point route
    takes adam at its own rate then. `learning_rate`: None for that of the optimiser. `kept`: target
    fraction for the reduced route and for fitted shrinkage priors (1: as fitted), None for the
    evidence to decide. `reduce_every`: epochs, by default a tenth of the fit; `start`, `stop`: as
    in `Every`. `draws`: of the predictive. `guide`: one of `GUIDES`, of which ``"mean-field"``
    alone is for natural-gradient; `estimator`: as in `MeanField`, and for it. `widen`: the
    predictive draws from `posterior.widened(widen)`; `scaled` finds that factor on a sixth of the
    training rows, or the validation rows that the data came with, which the fit does without.
    """

    epochs: int = 40
    batch_size: int = 128
    learning_rate: float | None = None
    temperature: float = 1.0
    kept: float | None = None
    reduce_every: float | None = None
    start: float = 0.1
    stop: float = 0.75
    draws: int = 32
    validation: float | None = None
    optimizer: str = "adam"
    guide: str = "mean-field"
    estimator: str = "weight"
    widen: float = 1.0
    scaled: bool = False

    def __post_init__(self) -> None:
        rate = optimizer_named(self.optimizer, self.learning_rate)[1]
        # as a number, which is kept beside the results
        object.__setattr__(self, "learning_rate", rate)
        check_estimator(self.estimator, *PER_STEP)
        guide_named(self.guide, self.optimizer, self.estimator)
        rules = {
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": 0 < rate < math.inf,
            "temperature": 0 < self.temperature < math.inf,
            "kept": self.kept is None or 0 <= self.kept <= 1,
            "reduce_every": self.reduce_every is None or 0 < self.reduce_every < math.inf,
            "start": 0 <= self.start <= self.stop,
            "stop": self.start <= self.stop <= 1,
            "draws": self.draws >= 0,
            "validation": self.validation is None or 0 < self.validation < 1,
            "widen": 0 <= self.widen < math.inf and (self.widen == 1 or not self.scaled),
        }
        broken = [f"{name}={getattr(self, name)}" for name, good in rules.items() if not good]
        if broken:
            raise ModelError(
                f"{', '.join(broken)}: wanted are epochs, batch_size >= 1, learning_rate,"
                " temperature, reduce_every > 0, 0 <= start <= stop <= 1, 0 <= kept <= 1, draws >="
                " 0, 0 < validation < 1, widen >= 0 and not scaled as well"
            )


@dataclass(frozen=True)
class Cell:
    """What one prior, route and seed gave. `posterior`: what the prediction is drawn from, with
    `widen` times the variances of the one that was fitted. `warnings`: what may mislead in the
    reduction after the fit.
    """

    fit: Fit
    posterior: Posterior
    widen: float
    reduction: Reduction | None
    prediction: Prediction
    delta_f: float
    weights: dict[str, Tensor]
    warnings: tuple[str, ...]


def optimizer_named(
    name: str, learning_rate: float | None = None
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
    name: str, optimizer: str = "adam", estimator: str = "weight"
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
                f"{option} '{value}' is for the guide mean-field, got guide '{name}'; leave it out"
            )
    return GUIDES[name]


def run_cell(
    build: Build,
    data: Data,
    prior: Prior,
    route: str,
    seed: int,
    settings: Settings,
    progress: bool,
    every: Callable[..., Every] = Every,
) -> Cell:
    """Fits, reduces and predicts, as the route says; `every` makes the schedule of the reduced
    route.
    """
    if route == "point" and (settings.scaled or settings.widen != 1):
        raise ModelError(
            "widen, scaled: a point estimate has no variances to widen; leave them out for this"
            " route"
        )
    fitted_on = validation_data(data, 1 / 6) if settings.scaled else data
    fitted_under = prior if route != "reduced" or isinstance(prior, Gaussian) else Gaussian()
    target: Prior = Gaussian(scale=0.0) if isinstance(prior, Gaussian) else prior
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        program = build(fitted_on, fitted_under)
    schedule = (
        every(
            settings.reduce_every or settings.epochs / 10,
            target,
            settings.start,
            kept=settings.kept,
            stop=settings.stop,
        )
        if route == "reduced"
        else None
    )
    guide = guide_named(settings.guide, settings.optimizer, settings.estimator)
    make = (
        adam
        if route == "point" and settings.optimizer != "adam"
        else optimizer_named(settings.optimizer, settings.learning_rate)[0]
    )
    result = fit(
        program,
        fitted_on,
        guide=Point if route == "point" else guide,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimizer=make(),
        seed=seed,
        temperature=settings.temperature,
        reduce=schedule,
        progress=progress,
    )
    posterior, reduction, delta_f = result.posterior, None, 0.0
    said: tuple[str, ...] = ()
    if route == "reduced":
        reduction = quiet_reduction(posterior, to=target, kept=settings.kept)
        delta_f = float(result.history["delta_f"].iloc[-1]) + reduction.delta_f
    elif route == "fitted" and prior.shrinkage:
        reduction = quiet_reduction(posterior, to=None, kept=settings.kept)
    if reduction is not None:
        posterior = reduction.posterior
        said = _cautions(result.program, reduction, data, settings.draws, seed)
    widen = settings.widen
    if settings.scaled:
        widen = best_widening(
            result.program,
            posterior,
            (fitted_on.x_test, fitted_on.y_test),
            draws=settings.draws,
            seed=seed,
        )
    if widen != 1:
        posterior = posterior.widened(widen)
    prediction = predict(
        result.program,
        posterior,
        data.x_test,
        draws=0 if route == "point" else settings.draws,
        seed=seed,
    )
    return Cell(
        result,
        posterior,
        widen,
        reduction,
        prediction,
        delta_f,
        point_weights(result.program, posterior),
        said,
    )


def _cautions(
    program: Callable[..., Any], reduction: Reduction, data: Data, draws: int, seed: int
) -> tuple[str, ...]:
    """What may mislead in the last reduction, the one after the fit, and whether it costs accuracy
    on the rows that are scored.
    """
    said = list(reduction.warnings)
    if any(
        not torch.equal(reduction.before[name].kept, mask) for name, mask in reduction.masks.items()
    ):
        before, after = (
            predict(program, posterior, data.x_test, draws=draws, seed=seed)
            for posterior in (reduction.before, reduction.posterior)
        )
        caution = paired_loss(before, after, data.y_test).caution()
        said += [caution] if caution else []
    return tuple(said)


def scores(prediction: Prediction, data: Data) -> dict[str, float]:
    """Measure → its value on the test rows, in the target's units."""
    nll = -float(prediction.log_prob(data.y_test).double().mean())
    if isinstance(prediction, ClassPrediction):
        p, y = prediction.probs, data.y_test
        return {
            "accuracy": metrics.accuracy(p, y),
            "nll": nll,
            "brier": metrics.brier(p, y),
            "ece": metrics.ece(p, y),
        }
    return {
        "rmse": metrics.rmse(prediction.mean, data.y_test) * data.target_scale,
        "nll": nll + math.log(data.target_scale),
        "brier": math.nan,
        "ece": math.nan,
    }


def counted(cell: Cell) -> list[str]:
    """The names of the weights that count as parameters: those of the network, or of another
    program its sites on all numbers.
    """
    program = cell.fit.program
    if isinstance(program, BayesianNetwork):
        return [name for name, _ in program.net.named_parameters()]
    return [name for name in cell.weights if cell.posterior[name].support == "real"]


def sizes(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    """How many parameters the weights of these names have, and how many of them are not zero."""
    names = list(names)
    total = sum(weights[name].numel() for name in names)
    nonzero = sum(int(weights[name].count_nonzero()) for name in names)
    return {"parameters": total, "kept_parameters": nonzero, "kept": nonzero / total}
