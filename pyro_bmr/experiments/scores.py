"""The scores of a prediction of any likelihood, in the units of the targets.

Owns `scores`, and `class_probabilities`, the part of it that classes have. Next: `base_rates.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.data.data_set import Data
from pyro_bmr.data.targets import kind_of
from pyro_bmr.errors import ModelError
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.predict import ClassPrediction, Prediction


def scores(prediction: Prediction, data: Data) -> dict[str, float]:
    """Measure → its value on the test rows, NaN where it has no meaning. Targets that are missing
    are left out.

    nll is −log p of all targets of a row, nats, mean over rows. Of classes, grades and labels of
    yes or no, accuracy, brier and ece are means over all labels (a label of yes or no counts as two
    classes), and crps of grades is the ranked probability score. Of real targets and counts, rmse
    and crps are in the units of the target, and coverage is that of 90 % intervals; of several
    targets with a scale each, rmse and crps are in standard deviations of the training rows.
    """
    y = data.y_test
    nll = -row_log_prob(prediction, data).mean()
    labels = class_probabilities(prediction, data)
    if labels is not None:
        found = {
            "accuracy": metrics.accuracy(*labels),
            "nll": float(nll),
            "brier": metrics.brier(*labels),
            "ece": metrics.ece(*labels),
        }
        if kind_of(data.likelihood()) == "grades":
            found["crps"] = metrics.ranked_probability(*labels)
        return found
    real: Any = prediction
    low, high = real.interval(0.9)
    unit = data.target_scale if isinstance(data.target_scale, float) else 1.0
    known = ~y.isnan()
    return {
        "rmse": _rmse(prediction, y, known) * unit,
        "nll": float(nll),
        "brier": math.nan,
        "ece": math.nan,
        "crps": float(real.crps(y)[known].double().mean()) * unit,
        "coverage": metrics.coverage(low, high, y),
    }


def row_log_prob(prediction: Prediction, data: Data) -> Tensor:
    """log p of the targets of each test row, (n,), float64, nats, in the units of the targets."""
    y = data.y_test
    log_p = prediction.log_prob(y).double()
    log_p = log_p.reshape(len(log_p), -1).sum(1)
    log_scale = torch.as_tensor(data.target_scale, dtype=torch.float64).log()
    if not bool(log_scale.any()):
        return log_p
    known = ~y.isnan().reshape(len(y), -1)
    return log_p - (known * log_scale.reshape(1, -1)).sum(1).to(log_p.device)


def class_probabilities(prediction: Prediction, data: Data) -> tuple[Tensor, Tensor] | None:
    """The probabilities (labels, classes) and the label of every test label that is observed; None
    for targets that are no labels.
    """
    y = data.y_test
    if isinstance(prediction, ClassPrediction):
        probs, labels = prediction.probs.flatten(0, -2), y.flatten()
        ignored = getattr(data.likelihood(), "ignore_index", None)
        known = torch.ones_like(labels, dtype=torch.bool) if ignored is None else labels != ignored
    elif kind_of(data.likelihood()) == "bits":
        yes, labels = prediction.mean.flatten(), y.flatten()
        probs, known = torch.stack([1 - yes, yes], 1), ~labels.isnan()
    else:
        return None
    if not bool(known.all()):
        probs, labels = probs[known.to(probs.device)], labels[known]
    return probs, labels.long()


def _rmse(prediction: Any, y: Tensor, known: Tensor) -> float:
    """NaN where the distribution has no mean, as Student's with one degree of freedom."""
    try:
        mean = prediction.mean
    except ModelError:
        return math.nan
    mean, known = mean[known], known.to(mean.device)
    return metrics.rmse(mean, y[known]) if bool(mean.isfinite().all()) else math.nan
