"""The temperature and the noise of a fit to real targets, by trials: shorter fits, scored on
held-out rows.

Owns `noise_trials` and `best_noise`; `infers_noise` and `noise_is_free`, whether there is anything
to try. Next: `recipe.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import ModelError
from pyro_bmr.experiments.held_out import Attempt, Trials, part_of, predicted, with_noise
from pyro_bmr.experiments.settings import Settings
from pyro_bmr.formulas.line_search import line_maximum
from pyro_bmr.likelihoods import Normal
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.prediction.predict import RealPrediction

# Measured on held-out rows of many data sets (docs/results/defaults.md).
TEMPERATURES = (0.3, 0.1, 0.03)
_WIDTH = math.log(1000)  # of the search on either side of the root mean square error

HeldOut = Sequence[tuple[RealPrediction, Tensor]]
"""The predictions of the held-out rows of each fold, and their targets."""


def infers_noise(program: Any) -> bool:
    """Whether it is a network with real targets and one noise, which is inferred."""
    likelihood = program.likelihood if isinstance(program, BayesianNetwork) else None
    return isinstance(likelihood, Normal) and likelihood.noise == "learned"


def noise_is_free(build: Callable[[Data], Any], data: Data) -> bool:
    """Whether `build` makes a network of the data with one noise that is inferred, and one with a
    noise that is a number where the data say so. A program written by hand has a noise of its own.
    """
    return infers_noise(build(data)) and not infers_noise(build(with_noise(data, 1.0)))


def noise_trials(
    attempt: Attempt, data: Data, settings: Settings, seed: int, progress: bool
) -> Trials:
    r"""The temperature T and the noise σ of a fit of `settings` to `data`, and the trials that both
    were chosen by.

    At a temperature below 1 the noise cannot be inferred (`check_noise`), so a first trial at 1
    infers it, and the held-out rows say what it should have been, σ₁. The others are at T < 1 with
    the noise σ₁. After each the held-out rows have a best noise again:

    .. math:: \hat\sigma_T = \arg\max_\sigma \sum_{i \in \text{held out}}
        \log \tfrac1S \sum_s N(y_i; f_s(x_i), \sigma^2), \qquad f_s \sim q_T

    The T with the largest of these sums is chosen; 1 has the log score of the noise that it
    inferred. The fit of all rows then has the noise σ̂_T. Its temperature is

    .. math:: T' = T \sigma_1^2 / \hat\sigma_T^2

    since a fit sees Tσ² alone, N(y; f, σ²)^{1/T} ∝ exp(−(y − f)²/2Tσ²), and this keeps that product
    as it was in the trial. Which rows are held out: `temperature_trials`.
    """
    warm = _held_out(attempt, data, replace(settings, temperature=1.0), seed)
    if all(bool(y.isnan().all()) for _, y in warm):
        return Trials(1.0, {}, 1.0)  # no target is known to score by
    nll = {1.0: _nll(warm)}
    noise = {1.0: best_noise(warm)}
    fixed = with_noise(data, noise[1.0])
    for temperature in TEMPERATURES:
        held = _held_out(attempt, fixed, replace(settings, temperature=temperature), seed)
        noise[temperature] = best_noise(held)
        nll[temperature] = _nll(held, noise[temperature])
    if progress:
        for temperature, score in nll.items():
            tqdm.write(f"temperature {temperature:g}: {score:.3f} nats a held-out row")
    best, part = min(nll, key=nll.__getitem__), part_of(data, settings)
    if best == 1:
        return Trials(1.0, nll, 1.0, part=part)
    return Trials(best * (noise[1.0] / noise[best]) ** 2, nll, 1.0, noise[best], part)


def best_noise(held: HeldOut) -> float:
    """σ with the largest Σ log 1/S Σ N(y; f_s, σ²), in the units of y, to within 0.1 %."""
    errors = torch.cat([(p.mean.to(y.device) - y)[~y.isnan()].double() for p, y in held])
    centre = max(float(errors.square().mean().sqrt()), 1e-6)
    low = torch.tensor(math.log(centre) - _WIDTH, dtype=torch.float64)
    found = line_maximum(
        lambda log_noise: torch.tensor(-_nll(held, math.exp(log_noise)), dtype=torch.float64),
        low,
        low + 2 * _WIDTH,
        points=64,
    )
    return math.exp(float(found))


def _held_out(attempt: Attempt, data: Data, settings: Settings, seed: int) -> HeldOut:
    found = []
    for prediction, rows in predicted(attempt, data, settings, seed):
        if not isinstance(prediction, RealPrediction):
            raise ModelError(
                f"temperature: expected real predictions, got {type(prediction).__name__}; give a"
                " number, such as temperature=1"
            )
        found.append((prediction, rows.y_test))
    return found


def _nll(held: HeldOut, noise: float | None = None) -> float:
    """The mean over all held-out rows, nats per row; with the `noise`, or that of each draw."""
    parts = [-p.log_prob(y) if noise is None else -_noisy(p, noise).log_prob(y) for p, y in held]
    return float(torch.cat([part.double() for part in parts]).mean())


def _noisy(prediction: RealPrediction, noise: float) -> RealPrediction:
    double = prediction.locs.double()
    return replace(prediction, locs=double, scales=torch.full_like(double, noise))
