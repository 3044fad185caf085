"""The targets of the baselines: classes, by the cross entropy and a temperature of the logits; real
numbers, by the squared error and one noise for all rows; others, by the density of a likelihood
without parameters of its own.

Owns `plain_likelihood`, `plain_loss`, `fitted_nll`, `residual`, `held_out_scale` and `predictive`.
Next: `training.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import ModelError
from pyro_bmr.likelihoods import Bernoulli, Normal
from pyro_bmr.likelihoods.weighted import unweighted
from pyro_bmr.prediction.calibration import best_temperature
from pyro_bmr.prediction.of_outputs import prediction_of_outputs
from pyro_bmr.prediction.predictive import Prediction, prediction_of

_LEAST = 1e-6  # of the noise, in standard deviations of the target: all training rows are met


def plain_likelihood(data: Data) -> Any:
    """The likelihood by whose density a plain network is trained; None for classes and for real
    targets with a noise that is learned, which have losses of their own.

    Raises:
        ModelError: the likelihood has parameters beside the network, or reads from x.
    """
    likelihood: Any = data.likelihood()
    name = type(unweighted(likelihood)).__name__
    if getattr(likelihood, "reads", {}):
        read = ", ".join(likelihood.reads)
        raise ModelError(f"expected a likelihood of the outputs alone, got {name} with {read}")
    if data.family is None or (
        isinstance(likelihood, Normal) and likelihood.inferred and likelihood.missing == "refuse"
    ):
        return None
    inferred = getattr(likelihood, "inferred", ())
    if inferred or not hasattr(likelihood, "log_prob"):
        own = ", ".join(inferred) or "no log_prob"
        raise ModelError(f"expected a likelihood without parameters, got {name} with {own}")
    return likelihood


def plain_loss(outputs: Tensor, y: Tensor, likelihood: Any = None) -> Tensor:
    """Nats per row to train on: −log p of a `likelihood` that is given; else the cross entropy, or
    of real targets ½(y − f)², which is −log p at a noise of 1 but for a constant.
    """
    if likelihood is not None:
        return -likelihood.log_prob(outputs, y) / len(y)  # type: ignore[no-any-return]
    if not y.is_floating_point():
        return F.cross_entropy(outputs, y.long())
    return 0.5 * F.mse_loss(outputs.reshape(y.shape), y) * (y.numel() / len(y))


def fitted_nll(mean_loss: float, y: Tensor, likelihood: Any = None) -> float:
    r"""The NLL of rows of this mean `plain_loss`, nats per row; of real targets at the constant
    noise that is best for these rows.

    .. math:: \min_\sigma \left[\tfrac{\overline{(y - f)^2}}{2\sigma^2} + \tfrac12
        \log 2\pi\sigma^2\right] = \tfrac12 \log\left(2\pi e\, \overline{(y - f)^2}\right)
    """
    if likelihood is not None or not y.is_floating_point():
        return mean_loss
    entries = y.numel() / len(y)
    variance = max(2 * mean_loss / entries, _LEAST**2)
    return 0.5 * entries * math.log(2 * math.pi * math.e * variance)


def residual(outputs: Tensor, y: Tensor) -> float:
    """The root mean square of y − f, in the units of y: the noise of most likelihood."""
    errors = (outputs.reshape(y.shape) - y).double()
    return max(float(errors.square().mean().sqrt()), _LEAST)


def held_out_scale(outputs: Tensor, y: Tensor, noise: float, likelihood: Any = None) -> float:
    """What best calibrates the outputs for held-out rows: the temperature of the logits, or the
    factor on the `noise`; 1 for other likelihoods. The temperature is 1 if no other class
    has a larger logit than the label, in any row: then the colder the better, without a limit.
    """
    if likelihood is not None:
        if not isinstance(likelihood, Bernoulli):
            return 1.0
        known = ~y.flatten().isnan()
        yes, y = outputs.reshape(y.shape).flatten()[known], y.flatten()[known].long()
        outputs = torch.stack([torch.zeros_like(yes), yes], 1)
    if y.is_floating_point():
        return residual(outputs, y) / noise
    of_labels = outputs.gather(1, y.to(outputs.device).long()[:, None])[:, 0]
    return 1.0 if bool((of_labels >= outputs.amax(1)).all()) else best_temperature(outputs, y)


def predictive(
    outputs: Callable[[Tensor], Tensor],
    y: Tensor,
    scale: float,
    noise: float,
    likelihood: Any = None,
) -> Callable[[Tensor], Prediction]:
    """Rows → prediction, of targets such as the training rows' `y`: softmax(f / `scale`),
    N(f, (`scale` · `noise`)²), or the `likelihood` at f / `scale`.
    """

    def predict(x: Tensor) -> Prediction:
        found = outputs(x)
        if likelihood is not None:
            return prediction_of_outputs(likelihood, found / scale)
        if not y.is_floating_point():
            return prediction_of([((found / scale).softmax(1)[None],)], 1)
        locs = found.reshape(len(x), *y.shape[1:])[None]
        return prediction_of([(locs, torch.full_like(locs, scale * noise))], 1)

    return predict
