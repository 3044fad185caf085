"""The measures of a trained network, which are the figures of one row of a table.

Owns `MEASURES`, to which further figures are added, `measured`, and some of them: `sizes` and
`step_ratio`. Next: `grid.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from pyro_bmr.baselines.targets import plain_likelihood, plain_loss
from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import ModelError, ShrinkError
from pyro_bmr.experiments.base_rates import base_rates
from pyro_bmr.experiments.methods import Trained
from pyro_bmr.experiments.scores import class_probabilities, row_log_prob, scores
from pyro_bmr.experiments.shift import shifted_scores
from pyro_bmr.fitting.batches import device_of
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.predict import Prediction
from pyro_bmr.shrinking import shrink_plan
from pyro_bmr.shrinking.latency import latency

Measure = Callable[[Trained, Data, Prediction], dict[str, float]]
"""(trained, data, prediction on the test rows) → column → figure; NaN where it has no meaning."""


def sizes(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    """How many parameters the weights of these names have, and how many of them are not zero."""
    names = list(names)
    total = sum(weights[name].numel() for name in names)
    nonzero = sum(int(weights[name].count_nonzero()) for name in names)
    return {"parameters": total, "kept_parameters": nonzero, "kept": nonzero / total}


def _scores(trained: Trained, data: Data, prediction: Prediction) -> dict[str, float]:
    labels = class_probabilities(prediction, data)
    by_mass = math.nan if labels is None else metrics.ece(*labels, 20, "mass")
    return {
        **scores(prediction, data),
        "ece_mass": by_mass,
        "nll_error": _error(row_log_prob(prediction, data)),
        **base_rates(data),
    }


def _error(log_probs: Tensor) -> float:
    """The standard error of the mean over the scored rows, nats; NaN for one row."""
    rows = len(log_probs)
    return float(log_probs.std() / math.sqrt(rows)) if rows > 1 else math.nan


def _sizes(trained: Trained, data: Data, prediction: Prediction) -> dict[str, float]:
    return {**sizes(trained.weights, counted(trained)), "size": _structured_size(trained, data)}


def counted(trained: Trained) -> list[str]:
    """The names of the weights that count as parameters: those of the network, or of another
    program its sites on all numbers.
    """
    if trained.network is not None:
        return [name for name, _ in trained.network.named_parameters()]
    sites = {} if trained.fit is None else trained.fit.posterior.sites
    return [name for name in trained.weights if name not in sites or sites[name].support == "real"]


def _structured_size(trained: Trained, data: Data) -> float:
    """The fraction of the parameters that is left when units, channels and heads without a kept
    weight are removed; NaN for what `shrink` refuses.
    """
    if trained.network is None:
        return math.nan
    if all(bool((values != 0).all()) for values in trained.network.parameters()):
        return 1.0  # without a zero nothing can be removed
    try:
        net = copy.deepcopy(trained.network).cpu()
        before, after = shrink_plan(net, {}, data.seen(data.x_test[:1])).parameters
    except ShrinkError:
        return math.nan
    return after / before


def _costs(trained: Trained, data: Data, prediction: Prediction) -> dict[str, float]:
    return {
        "elbo": trained.elbo,
        "delta_f": trained.delta_f,
        "seconds": trained.seconds,
        "converged": float(trained.fit.converged) if trained.fit else math.nan,
    }


def step_ratio(trained: Trained, data: Data) -> float:
    """Seconds of the training a step over those of a step of plain training: the same network and
    as many rows, fused Adam, measured right after the training on the machine as it is then, for as
    long as the training took, a second at most. Reductions and all else that the training did
    between its steps are in it. NaN for what is no network, and where plain training has no loss.
    """
    if trained.network is None or trained.history.empty:
        return math.nan
    try:
        likelihood = plain_likelihood(data)
    except ModelError:
        return math.nan
    net = copy.deepcopy(trained.network).train().requires_grad_(True)
    optimiser = torch.optim.Adam(net.parameters(), fused=True)
    device = device_of(net)
    y = data.y_train[torch.arange(trained.batch_size) % len(data.y_train)].to(device)

    @torch.enable_grad()
    def step(x: Tensor) -> None:
        optimiser.zero_grad()
        outputs = net(x)
        plain_loss(outputs, y, likelihood).backward()
        optimiser.step()

    seconds = min(1.0, trained.seconds)
    with torch.random.fork_rng():
        plain = latency(step, data.x_train.to(device), trained.batch_size, seconds=seconds) / 1e3
    steps = len(trained.history) * float(trained.history["step"].iloc[0])
    return trained.seconds / steps / plain


MEASURES: tuple[Measure, ...] = (_scores, _sizes, _costs)
"""In the order of the columns."""


def measured(
    trained: Trained,
    data: Data,
    prediction: Prediction,
    shift: bool = False,
    timed: bool = True,
) -> dict[str, float]:
    """All measures of a trained network: accuracy or rmse, nll, brier, ece (15 bins of equal
    width), ece_mass (20 of equal mass), parameters and more.

    Units as in `compare`; elbo and delta_f in nats, size as a fraction of the parameters, seconds
    of training. With `timed`, step_ratio over a step of plain training, which takes a second; else
    it is NaN. With `shift`, those of `shift.shifted_scores` as well, which takes 41 predictions of
    2,000 images.
    """
    figures = {
        name: value
        for measure in MEASURES
        for name, value in measure(trained, data, prediction).items()
    }
    figures["step_ratio"] = step_ratio(trained, data) if timed else math.nan
    further = shifted_scores(trained.predict, data) if shift else {}
    return figures | trained.extra | further
