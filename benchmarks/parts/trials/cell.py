"""A cell of `benchmarks/defaults.py`: a candidate fitted on a problem with a seed, and its scores.

`plain.py` has the network without a posterior. Next: `../../defaults.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from parts.trials.plain import plain_prediction
from parts.trials.problems import Problem

import pyro_bmr as bmr
from pyro_bmr.experiments.measures import sizes
from pyro_bmr.exporting import point_weights
from pyro_bmr.prediction.calibration import best_widening
from pyro_bmr.priors.names import prior_from_name
from pyro_bmr.reduction.reduce import quiet_reduction

FOUND_ON = 400  # rows that a widening is found on, at most


@dataclass(frozen=True)
class Candidate:
    """The settings of a fit.

    `route`: fitted, reduced, or plain for the network without a posterior. `rate`: None for that of
    the optimiser. `warm`: the temperature for real targets. `steps`: None for a fit that stops by
    itself. `reductions`: how many a fit would have from its start to its end, 0 for none but that
    after it. `declared`: the Gaussian that is reduced to a shrinkage prior.
    """

    prior: str = "gaussian:layer"
    route: str = "reduced"
    optimizer: str = "natural-gradient"
    rate: float | None = None
    temperature: float = 0.3
    steps: int | None = 3000
    batch: int = 128
    reductions: int = 50
    start: float = 0.1
    stop: float = 0.75
    warm: float = 1.0
    declared: str = "gaussian"

    @property
    def is_shrunk(self) -> bool:
        """Whether a Gaussian fit is reduced to a shrinkage prior."""
        return self.route == "reduced" and prior_named(self.prior).shrinkage

    @property
    def name(self) -> str:
        of = [self.declared.replace(":", ".") + "-to"] if self.is_shrunk else []
        words = [self.route, *of, self.prior.replace(":", "."), self.optimizer]
        words += [f"rate{self.rate:g}"] if self.rate else []
        words += [f"T{self.temperature:g}"] + ([f"warm{self.warm:g}"] if self.warm != 1 else [])
        words += [f"steps{self.steps}", f"batch{self.batch}"]
        if self.route == "reduced":
            words += [f"every{self.reductions}", f"{self.start:g}to{self.stop:g}"]
        return "_".join(words)


def prior_named(name: str) -> bmr.priors.Prior:
    """A prior by its name; ``spike-and-slab:0.1`` has a spike of that width."""
    family, _, number = name.partition(":")
    if family == "spike-and-slab" and number.startswith("0."):
        return bmr.SpikeAndSlab(spike_scale=float(number))
    return prior_from_name(name)


PLAIN = Candidate("gaussian", "plain", "adam", temperature=1.0, steps=3000)


def make_optimizer(candidate: Candidate) -> Any:
    rate = () if candidate.rate is None else (candidate.rate,)
    if candidate.optimizer == "natural-gradient":
        return bmr.natural_gradient(*rate)
    return bmr.adam(*rate)


def epochs_of(steps: float, rows: int, batch: int) -> int:
    return max(1, round(steps / math.ceil(rows / batch)))


def on(problem: Problem, candidate: Candidate) -> Candidate:
    """The candidate as it is for a problem: at a temperature of its own for real targets."""
    return replace(candidate, temperature=candidate.warm) if problem.real else candidate


def fitted(problem: Problem, candidate: Candidate, data: bmr.Data, seed: int) -> bmr.Fit:
    rows = len(data.x_train)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior = prior_named(candidate.prior)
        declared = prior_named(candidate.declared) if candidate.is_shrunk else prior
        program = problem.build(data, declared)
    epochs = None
    if candidate.steps is not None:
        epochs = epochs_of(candidate.steps / problem.cost, rows, candidate.batch)
    schedule = None
    if candidate.route == "reduced" and candidate.reductions:
        schedule = bmr.Every(
            epochs and epochs / candidate.reductions,
            prior if prior.shrinkage else bmr.Gaussian(scale=0),
            candidate.start,
            stop=candidate.stop,
        )
    return bmr.fit(
        program,
        data,
        optimizer=make_optimizer(candidate),
        batch_size=candidate.batch,
        temperature=candidate.temperature,
        seed=seed,
        reduce=schedule,
        progress=False,
        epochs=epochs,
    )


def scored(prediction: Any, y: torch.Tensor) -> dict[str, float]:
    """log_score (nats per row, standardised targets), accuracy and ece, or rmse."""
    figures = {"log_score": float(prediction.log_prob(y).double().mean())}
    if hasattr(prediction, "probs"):
        figures["accuracy"] = bmr.metrics.accuracy(prediction.probs, y)
        figures["ece"] = bmr.metrics.ece(prediction.probs, y)
    else:
        figures["rmse"] = bmr.metrics.rmse(prediction.mean, y)
    return figures


def cell(problem: Problem, candidate: Candidate, seed: int, folder: Path) -> dict[str, Any]:
    """What a candidate scores on a problem, on validation and on test rows, what is left of the
    network, and what it took. `scores` has the variances as fitted under 1 and, for the fitted
    route, those of the best widening under best. That is found on one half of the validation rows
    for the other half, and on all of them for the test rows.
    """
    data = problem.data(folder, seed)
    clock, processor = time.perf_counter(), time.process_time()
    if candidate.route == "plain":
        steps = candidate.steps / problem.cost
        predict = plain_prediction(problem, data, seed, steps, candidate.batch)
        seconds = time.perf_counter() - clock, time.process_time() - processor
        found = {"scores": {"1": both(predict, data)}, "kept": 1.0, "steps": steps}
        return {**found, "seconds": seconds[0], "processor_seconds": seconds[1]}
    fit = fitted(problem, candidate, data, seed)
    posterior = reduced_posterior(fit, candidate)
    seconds = time.perf_counter() - clock, time.process_time() - processor
    draws = 32 if problem.cost == 1 else 16
    scores, factor = scores_of(fit, posterior, candidate, data, draws)
    return {
        "scores": scores,
        "widening": factor,
        "kept": kept(fit, posterior),
        "masks": {k: [int(m.sum()), m.numel()] for k, m in posterior.masks.items()},
        "steps": int(fit.history["step"].iloc[-1]),
        "seconds": seconds[0],
        "processor_seconds": seconds[1],
        "reduction_seconds": fit.reduction_seconds,
        "elbo": float(fit.history["elbo"].iloc[-1]),
        "converged": fit.converged,
        "columns": posterior["w"].kept.int().tolist() if "w" in posterior.sites else None,
    }


def reduced_posterior(fit: bmr.Fit, candidate: Candidate) -> bmr.Posterior:
    """The posterior after the reduction that follows the fit, as `compare` has it."""
    prior = prior_named(candidate.prior)
    if candidate.route == "reduced":
        target = prior if prior.shrinkage else bmr.Gaussian(scale=0)
        return quiet_reduction(fit.posterior, to=target).posterior
    return quiet_reduction(fit.posterior, to=None).posterior if prior.shrinkage else fit.posterior


def both(predict: Callable[[torch.Tensor], Any], data: bmr.Data) -> dict[str, dict[str, float]]:
    return {
        "validation": scored(predict(data.x_val), data.y_val),
        "test": scored(predict(data.x_test), data.y_test),
    }


def scores_of(
    fit: bmr.Fit, posterior: bmr.Posterior, candidate: Candidate, data: bmr.Data, draws: int
) -> tuple[dict[str, Any], float]:
    """The scores by widening, and the best widening."""

    def predict(x: torch.Tensor, factor: float = 1.0) -> Any:
        wide = posterior if factor == 1 else posterior.widened(factor)
        return bmr.predict(fit.program, wide, x, draws=draws, seed=fit.seed)

    def widening(x: torch.Tensor, y: torch.Tensor) -> float:
        rows = x[:FOUND_ON], y[:FOUND_ON]
        return best_widening(fit.program, posterior, rows, draws=draws // 2, seed=fit.seed)

    scores = {"1": both(predict, data)}
    if candidate.route != "fitted":
        return scores, 1.0
    half, total = len(data.x_val) // 2, len(data.x_val)
    one = widening(data.x_val[half:], data.y_val[half:])
    other = widening(data.x_val[:half], data.y_val[:half])
    first = scored(predict(data.x_val[:half], one), data.y_val[:half])
    second = scored(predict(data.x_val[half:], other), data.y_val[half:])
    crossed = {k: (half * first[k] + (total - half) * second[k]) / total for k in first}
    best = widening(data.x_val, data.y_val)
    test = scored(predict(data.x_test, best), data.y_test)
    return {**scores, "best": {"validation": crossed, "test": test}}, best


def kept(fit: bmr.Fit, posterior: bmr.Posterior) -> float:
    """The fraction of all parameters that are not zero."""
    weights = point_weights(fit.program, posterior)
    network = isinstance(fit.program, bmr.BayesianNetwork)
    names = [n for n, _ in fit.program.net.named_parameters()] if network else ["w", "b"]
    return sizes(weights, names)["kept"]
