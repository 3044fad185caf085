"""The scores of a prediction as the commands print them, and those of a plain network.

Owns `scored`, `network_scores`, `listed` and `warn_of_loss`. Next: `grids.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import warn
from pyro_bmr.experiments.scores import scores
from pyro_bmr.likelihoods.likelihood import read_inputs
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.of_outputs import prediction_of_outputs
from pyro_bmr.prediction.paired_losses import paired_loss
from pyro_bmr.prediction.predict import Prediction


def scored(prediction: Prediction, data: Data) -> dict[str, float]:
    """The scores of `compare`, but for those that have no meaning for the task: rmse and nll (nats
    per row) in the units of the target.
    """
    return {
        name: value for name, value in scores(prediction, data).items() if not math.isnan(value)
    }


@torch.no_grad()
def network_scores(net: nn.Module, data: Data) -> dict[str, float]:
    """What a plain network scores on the test rows: accuracy, rmse in the units of the target, or
    the scores of its likelihood; empty if that has parameters of its own, beside the network.
    """
    outputs = torch.cat([net(rows) for rows in data.seen(data.x_test).split(1000)])
    if data.task == "classification":
        return {"accuracy": metrics.accuracy(outputs.softmax(1), data.y_test)}
    if data.task == "regression":
        outputs = outputs[:, 0] if outputs.ndim > 1 else outputs
        return {"rmse": metrics.rmse(outputs, data.y_test) * float(data.target_scale)}
    likelihood = data.likelihood()
    if getattr(likelihood, "inferred", ()):
        return {}
    read = read_inputs(likelihood, data.x_test)[1]
    return scored(prediction_of_outputs(likelihood, outputs, read), data)


def listed(values: Mapping[str, float], data: Data) -> str:
    """Names and values in one line."""
    units = " (rmse and nll in the units of the target)" if "rmse" in values else ""
    if units and isinstance(data.target_scale, Tensor):
        units = " (rmse and crps in standard deviations of each target)"
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items()) + units


def warn_of_loss(before: Prediction, after: Prediction, data: Data) -> list[str]:
    """Warns if a reduction costs more on the test rows than chance explains; what it said."""
    caution = paired_loss(before, after, data.y_test).caution()
    if caution:
        plain = not isinstance(data.target_scale, Tensor) and data.target_scale == 1
        units = "" if plain else ", target standardised"
        warn(f"test data{units}: {caution}")
    return [caution] if caution else []
