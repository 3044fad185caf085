"""A fit by one of the routes to a prior: maximum a posteriori, fitted under it, or reduced to it.

Owns `Fitted`, `fit_by_route`, `for_route` and `trials_of`. Next: `methods.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from pyro_bmr.data.data_set import Data, validation_data
from pyro_bmr.errors import ModelError
from pyro_bmr.experiments.held_out import Attempt, Trials, can_hold_out
from pyro_bmr.experiments.models import Build
from pyro_bmr.experiments.noise_trials import (
    infers_noise,
    noise_is_free,
    noise_trials,
)
from pyro_bmr.experiments.settings import (
    AUTO,
    Settings,
    epochs_between_reductions,
    guide_named,
    length_of,
    optimizer_named,
)
from pyro_bmr.experiments.temperature_trials import temperature_trials
from pyro_bmr.fitting.convergence import NOT_CONVERGED, UntilConverged
from pyro_bmr.fitting.fit import Fit, fit
from pyro_bmr.fitting.optimizers import adam
from pyro_bmr.guides import Point
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.prediction.calibration import best_widening
from pyro_bmr.prediction.paired_losses import paired_loss
from pyro_bmr.prediction.predict import predict
from pyro_bmr.priors import Gaussian, Prior
from pyro_bmr.pruning import Every
from pyro_bmr.reduction.reduce import quiet_reduction
from pyro_bmr.reduction.result import Reduction


@dataclass(frozen=True)
class Fitted:
    """What was fitted by a route, and what it predicts from.

    `declared`: the prior of the fit. `reduction`: the one after the fit, of which `cautions` say
    what may mislead. `posterior`: what predictions are drawn from, with `widen` times the variances
    that were fitted, and `scale` is the temperature of the class probabilities then. `delta_f`: of
    all reductions, nats. `trials`: what chose both temperatures, None where that of the fit was
    given. Variances that are widened, or found so, have a scale of 1.
    """

    fit: Fit
    declared: Prior
    reduction: Reduction | None
    cautions: tuple[str, ...]
    posterior: Posterior
    widen: float
    scale: float
    delta_f: float
    trials: Trials | None


class _Attempt(NamedTuple):
    """A fit, the reduction after it, and ΔF of all reductions."""

    fit: Fit
    reduction: Reduction | None
    delta_f: float

    @property
    def predicted_from(self) -> tuple[Callable[..., Any], Posterior]:
        reduced = self.fit.posterior if self.reduction is None else self.reduction.posterior
        return self.fit.program, reduced


def fit_by_route(
    build: Build,
    data: Data,
    prior: Prior,
    route: str,
    seed: int,
    settings: Settings,
    progress: bool,
    every: Callable[..., Every] = Every,
) -> Fitted:
    """Fits and reduces, as the route says; `every` makes the schedule of the reduced route.

    Raises:
        ModelError: the route is map, and the settings widen its variances.
    """
    if route == "map" and (settings.calibrate or settings.widen != 1):
        raise ModelError(
            "widen, calibrate: expected a route with variances, got map; leave them out for it"
        )
    rows = validation_data(data, 1 / 6) if settings.calibrate else data
    declared = _declared(prior, route, settings.optimizer)

    def built(rows: Data) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build(rows, declared)

    def attempt(rows: Data, settings: Settings, length: UntilConverged | None = None) -> _Attempt:
        program = built(rows)
        epochs = length or length_of(settings.epochs, len(rows.x_train), settings.batch_size)
        schedule = None
        if route == "reduced":
            apart = epochs_between_reductions(settings, epochs, rows)
            schedule = _schedule(settings, _target(prior), every, apart)
        result = _fitted(program, rows, route, seed, settings, epochs, schedule, progress)
        reduction, delta_f = _reduction_after(result, prior, _target(prior), route, settings)
        return _Attempt(result, reduction, delta_f)

    def tried(*given: Any) -> tuple[Callable[..., Any], Posterior]:
        return attempt(*given[:3]).predicted_from

    trials, length = None, None
    if settings.temperature == AUTO:
        trials = trials_of(built, tried, rows, route, settings, seed, progress)
        rows, settings = trials.applied(rows, settings)
        length = trials.length(rows, settings)
    result, reduction, delta_f = attempt(rows, settings, length)
    posterior, cautions = result.posterior, tuple[str, ...]()
    if reduction is not None:
        posterior = reduction.posterior
        cautions = _cautions(result.program, reduction, data, settings.draws, seed)
    widen = settings.widen
    if settings.calibrate:
        held = (rows.x_test, rows.y_test)
        widen = best_widening(result.program, posterior, held, draws=settings.draws, seed=seed)
    if widen != 1:
        posterior = posterior.widened(widen)
    own = trials is not None and widen == 1 and not settings.calibrate
    scale = trials.scale if trials is not None and own else 1.0
    return Fitted(result, declared, reduction, cautions, posterior, widen, scale, delta_f, trials)


def for_route(settings: Settings, route: str, data: Data, program: Any) -> Settings:
    """The settings of a fit of `program` by `route`, whose temperature `AUTO` is 1 where there are
    no trials: for map, and for targets other than classes and real ones with one inferred noise.
    """
    tried = route != "map" and (data.task == "classification" or infers_noise(program))
    return settings if tried or settings.temperature != AUTO else replace(settings, temperature=1.0)


def trials_of(
    build: Callable[[Data], Any],
    attempt: Attempt,
    data: Data,
    route: str,
    settings: Settings,
    seed: int,
    progress: bool,
) -> Trials:
    """What the temperature `AUTO` stands for: what held-out rows choose, or 1, without a trial, for
    the route map, for a program whose noise cannot be given, and for fewer than four rows.
    """
    if not can_hold_out(data):
        return Trials(1.0, {}, 1.0)
    if route != "map" and data.task == "classification":
        in_time = route == "reduced" and settings.kept is not None
        return temperature_trials(attempt, data, settings, seed, progress, in_time)
    if route != "map" and noise_is_free(build, data):
        return noise_trials(attempt, data, settings, seed, progress)
    return Trials(1.0, {}, 1.0)


def _declared(prior: Prior, route: str, optimizer: str | None) -> Prior:
    """The prior of the fit. Before a reduction to a shrinkage prior it is a Gaussian: with inferred
    scales for the natural gradient, with empirical ones for Adam. Each of them loses much with the
    other optimiser (docs/results/defaults.md).
    """
    if route != "reduced" or isinstance(prior, Gaussian):
        return prior
    return Gaussian("layer") if optimizer == "natural-gradient" else Gaussian()


def _target(prior: Prior) -> Prior:
    """What a reduction is to."""
    return Gaussian(scale=0.0) if isinstance(prior, Gaussian) else prior


def _schedule(
    settings: Settings, target: Prior, every: Callable[..., Every], apart: float | None
) -> Every:
    return every(apart, target, settings.start, kept=settings.kept, stop=settings.stop)


def _fitted(
    program: Callable[..., Any],
    rows: Data,
    route: str,
    seed: int,
    settings: Settings,
    epochs: int | UntilConverged,
    schedule: Every | None,
    progress: bool,
) -> Fit:
    guide = guide_named(settings.guide, settings.optimizer, settings.estimator)
    make = optimizer_named(settings.optimizer, settings.learning_rate)[0]
    if route == "map" and settings.optimizer != "adam":
        make = adam
    with warnings.catch_warnings():  # the column `converged` has it
        warnings.filterwarnings("ignore", NOT_CONVERGED)
        return fit(
            program,
            rows,
            guide=Point if route == "map" else guide,
            epochs=epochs,
            batch_size=settings.batch_size,
            optimizer=make(),
            seed=seed,
            temperature=float(settings.temperature),
            reduce=schedule,
            progress=progress,
        )


def _reduction_after(
    result: Fit, prior: Prior, target: Prior, route: str, settings: Settings
) -> tuple[Reduction | None, float]:
    """The reduction after the fit, None if there is none, and ΔF of all reductions."""
    if route == "reduced":
        reduction = quiet_reduction(result.posterior, to=target, kept=settings.kept)
        return reduction, float(result.history["delta_f"].iloc[-1]) + reduction.delta_f
    if route == "fitted" and prior.shrinkage:
        return quiet_reduction(result.posterior, to=None, kept=settings.kept), 0.0
    return None, 0.0


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
