"""The measures of a trained network, which are the figures of one row of a table.

Owns `MEASURES`, to which further figures are added, `measured`, and some of them: `scores`,
`base_rates`, `sizes` and `step_ratio`. Next: `grid.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import ShrinkError
from pyro_bmr.experiments.methods import Trained
from pyro_bmr.experiments.shift import shifted_scores
from pyro_bmr.exporting.costs import latency
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.predict import ClassPrediction, Prediction
from pyro_bmr.shrinking import shrink_plan

Measure = Callable[[Trained, Data, Prediction], dict[str, float]]
"""(trained, data, prediction on the test rows) → column → figure; NaN where it has no meaning."""


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
    y, scale = data.y_test, data.target_scale
    return {
        "rmse": metrics.rmse(prediction.mean, y) * scale,
        "nll": nll + math.log(scale),
        "brier": math.nan,
        "ece": math.nan,
        "crps": float(prediction.crps(y).double().mean()) * scale,
        "coverage": metrics.coverage(*prediction.interval(0.9), y),
    }


def sizes(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    """How many parameters the weights of these names have, and how many of them are not zero."""
    names = list(names)
    total = sum(weights[name].numel() for name in names)
    nonzero = sum(int(weights[name].count_nonzero()) for name in names)
    return {"parameters": total, "kept_parameters": nonzero, "kept": nonzero / total}


def _scores(trained: Trained, data: Data, prediction: Prediction) -> dict[str, float]:
    by_mass = (
        metrics.ece(prediction.probs, data.y_test, 20, "mass")
        if isinstance(prediction, ClassPrediction)
        else math.nan
    )
    return {
        **scores(prediction, data),
        "ece_mass": by_mass,
        "nll_error": _error(prediction.log_prob(data.y_test)),
        **base_rates(data),
    }


def _error(log_probs: Tensor) -> float:
    """The standard error of the mean over the scored rows, nats; NaN for one row."""
    values = log_probs.double().flatten()
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def base_rates(data: Data) -> dict[str, float]:
    """The scores of a prediction that ignores x: the class frequencies of the training rows, or a
    Normal of the mean and standard deviation of their targets, in the target's units. A class that
    no training row has costs infinitely many nats.
    """
    train, test = data.y_train, data.y_test
    if data.classes is not None:
        rates = torch.bincount(train.long(), minlength=data.classes).double() / len(train)
        right = (test == rates.argmax()).double().mean()
        return {"base_accuracy": float(right), "base_nll": -float(rates[test].log().mean())}
    mean, std = train.double().mean(), train.double().std(correction=0)
    errors = (test.double() - mean).square().mean()
    nll = 0.5 * (errors / std.square() + (2 * math.pi * std.square()).log())
    return {
        "base_rmse": float(errors.sqrt()) * data.target_scale,
        "base_nll": float(nll) + math.log(data.target_scale),
    }


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
    try:
        before, after = shrink_plan(trained.network, {}, data.x_test[:1]).parameters
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
    between its steps are in it. NaN for what is no network.
    """
    if trained.network is None or trained.history.empty:
        return math.nan
    net = copy.deepcopy(trained.network).train().requires_grad_(True)
    optimiser = torch.optim.Adam(net.parameters(), fused=True)
    y = data.y_train[torch.arange(trained.batch_size) % len(data.y_train)]

    @torch.enable_grad()
    def step(x: Tensor) -> None:
        optimiser.zero_grad()
        outputs = net(x)
        loss = (
            F.mse_loss(outputs.reshape(y.shape), y)
            if data.classes is None
            else F.cross_entropy(outputs, y.long())
        )
        loss.backward()
        optimiser.step()

    with torch.random.fork_rng():
        plain = (
            latency(step, data.x_train, trained.batch_size, seconds=min(1.0, trained.seconds)) / 1e3
        )
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
