"""The temperature of a fit to classes, and that of its class probabilities, by trials: shorter fits
at a few temperatures, scored on held-out rows.

Owns `temperature_trials` and `at_scale`. Next: `noise_trials.py`.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from pyro_bmr.baselines.targets import held_out_scale
from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import PyroBMRWarning
from pyro_bmr.experiments.held_out import PART, Attempt, Trials, part_of, predicted
from pyro_bmr.experiments.scores import class_probabilities
from pyro_bmr.experiments.settings import Settings
from pyro_bmr.prediction.calibration import temperature_scaled
from pyro_bmr.prediction.predict import ClassPrediction, Prediction

# Measured on held-out rows of many data sets (docs/results/defaults.md).
TEMPERATURES = (0.3, 0.1)


def temperature_trials(
    attempt: Attempt,
    data: Data,
    settings: Settings,
    seed: int,
    progress: bool,
    in_time: bool = False,
) -> Trials:
    r"""The temperature T of a fit of `settings` to `data`, the temperature τ of its predictions,
    and the trials that both were chosen by.

    .. math:: \hat\tau_T = \arg\min_{\tau \geq 1} L(T, \tau), \qquad
        \hat T = \arg\min_T L(T, 1), \qquad \hat\tau = \hat\tau_{\hat T}

        L(T, \tau) = -\sum_{i \in \text{held out}}
        \log \frac{p_T(y_i \mid x_i)^{1/\tau}}{\sum_c p_T(c \mid x_i)^{1/\tau}}, \qquad
        p_T(y \mid x) = \tfrac1S \sum_s p(y \mid x, w_s), \quad w_s \sim q_T

    q_T is fitted to the other rows, in a third of the epochs, or of the steps where the fit has no
    number of epochs; in all of them if it is pruned `in_time` to a target size. The rows held out
    are a sixth of the training rows, the same ones for every seed, or the validation rows that the
    data came with. A sixth of fewer than 200 rows is held out again and again, other rows each
    time, until 200 rows or all were held out, and the sums are over all of them: cross-validation
    (Stone 1974). A fit without a number of epochs is as short as its trials then (`part_of`). Where
    trials are as long as the fit, their τ is that of the fit too, and :math:`\hat T = \arg\min_T
    L(T, \hat\tau_T)`, unless variances are widened, which leaves predictions at τ = 1.

    Cold posteriors, and their choice on held-out rows: Wenzel et al. 2020, arXiv 2002.02405. Why
    clean labels want a colder fit than noisy ones: Aitchison 2021, arXiv 2008.05912. τ: Guo et al.
    2017, arXiv 1706.04599. It only makes predictions less certain. A few rows show by a wrong label
    that predictions are too certain, but not that they are too uncertain, and a τ that is too small
    costs without a limit.
    """
    nll, scale, part = {}, {}, part_of(data, settings)
    # a short fit that is pruned to a size in time has not recovered by its end, the colder the less
    length = part if in_time else PART
    at_their_scale = length == part and settings.widen == 1 and not settings.calibrate
    for temperature in TEMPERATURES:
        tempered = replace(settings, temperature=temperature)
        log_probs, y = _held_out(attempt, data, tempered, seed, length)
        scale[temperature] = _best_scale(log_probs, y)
        scaled = (log_probs / scale[temperature]).log_softmax(1) if at_their_scale else log_probs
        nll[temperature] = float(F.nll_loss(scaled, y))
        if progress:
            tqdm.write(f"temperature {temperature:g}: {nll[temperature]:.3f} nats a held-out row")
    best = min(TEMPERATURES, key=nll.__getitem__)
    return Trials(best, nll, scale[best], part=part)


def at_scale(prediction: Prediction, scale: float) -> Prediction:
    """The prediction with class probabilities at the temperature `scale`; 1 leaves any as it is."""
    if scale == 1:
        return prediction
    assert isinstance(prediction, ClassPrediction)  # there are no trials for others
    return temperature_scaled(prediction, scale)


def _held_out(
    attempt: Attempt, data: Data, settings: Settings, seed: int, part: float
) -> tuple[Tensor, Tensor]:
    """The log probabilities of the classes of the held-out rows of all folds, and their labels."""
    parts = []
    for prediction, rows in predicted(attempt, data, settings, seed, part):
        labels = class_probabilities(prediction, rows)
        assert labels is not None
        parts.append(labels)
    probs, y = (torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True))
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log().double(), y


def _best_scale(log_probs: Tensor, y: Tensor) -> float:
    """τ, 1 at least."""
    with warnings.catch_warnings():  # at an end of the search the trials say more than the warning
        warnings.filterwarnings("ignore", "the best temperature", PyroBMRWarning)
        return max(held_out_scale(log_probs, y, 1.0), 1.0)
