"""The scores of a prediction as the commands print them.

Owns `scored`, `listed` and `warn_of_loss`. Next: `grids.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import warn
from pyro_bmr.experiments.measures import scores
from pyro_bmr.prediction.paired_losses import paired_loss
from pyro_bmr.prediction.predict import Prediction


def scored(prediction: Prediction, data: Data) -> dict[str, float]:
    """The scores of `compare`, but for those that have no meaning for the task: rmse and nll (nats
    per row) in the units of the target.
    """
    return {
        name: value for name, value in scores(prediction, data).items() if not math.isnan(value)
    }


def listed(values: Mapping[str, float], data: Data) -> str:
    """Names and values in one line."""
    units = " (rmse and nll in the units of the target)" if data.task == "regression" else ""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items()) + units


def warn_of_loss(before: Prediction, after: Prediction, data: Data) -> list[str]:
    """Warns if a reduction costs more on the test rows than chance explains; what it said."""
    caution = paired_loss(before, after, data.y_test).caution()
    if caution:
        units = "" if data.target_scale == 1 else ", target standardised"
        warn(f"test data{units}: {caution}")
    return [caution] if caution else []
