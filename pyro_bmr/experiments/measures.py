"""What a trained network of a study is worth: the figures of one row of its table.

Owns `MEASURES`, to which further figures are added, `measured`, and `step_ratio`, one of them.
Next: `cell_folder.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import ShrinkError
from pyro_bmr.experiments.cells import scores, sizes
from pyro_bmr.experiments.methods import Trained
from pyro_bmr.experiments.shift import shifted_scores
from pyro_bmr.exporting.costs import latency
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.predict import ClassPrediction, Prediction
from pyro_bmr.shrinking import shrink_plan

Measure = Callable[[Trained, Data, Prediction], dict[str, float]]
"""(trained, data, prediction on the test rows) → column → figure; NaN where it has no meaning."""


def _scores(trained: Trained, data: Data, prediction: Prediction) -> dict[str, float]:
    by_mass = (
        metrics.ece(prediction.probs, data.y_test, 20, "mass")
        if isinstance(prediction, ClassPrediction)
        else math.nan
    )
    return {**scores(prediction, data), "ece_mass": by_mass}


def _sizes(trained: Trained, data: Data, prediction: Prediction) -> dict[str, float]:
    names = (
        trained.weights
        if trained.network is None
        else (name for name, _ in trained.network.named_parameters())
    )
    return {**sizes(trained.weights, names), "size": _structured_size(trained, data)}


def _structured_size(trained: Trained, data: Data) -> float:
    """The fraction of the parameters that is left when whole units, channels and heads that are
    dead go; NaN for what `shrink` refuses.
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
        "step_ratio": step_ratio(trained, data),
        **trained.extra,
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
    trained: Trained, data: Data, prediction: Prediction, shift: bool = False
) -> dict[str, float]:
    """All measures of a trained network: accuracy or rmse, nll, brier, ece (15 bins of equal
    width), ece_mass (20 of equal mass), parameters and more.

    Units as in `compare`; elbo and delta_f in nats, size as a fraction of the parameters, seconds
    of training, step_ratio over a step of plain training. With `shift`, those of
    `shift.shifted_scores` as well, which takes 41 predictions of 2,000 images.
    """
    further = shifted_scores(trained.predict, data) if shift else {}
    return {
        name: value
        for measure in MEASURES
        for name, value in measure(trained, data, prediction).items()
    } | further
