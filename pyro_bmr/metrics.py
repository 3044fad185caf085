"""What a prediction is worth: accuracy, negative log likelihood, Brier score, calibration error, RMSE, predictive entropy, AUROC. Tensors in, numbers out."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pyro_bmr.errors import DataError
from pyro_bmr.fit_arguments import check_labels, check_tensor


def accuracy(probs: Tensor, y: Tensor) -> float:
    """The fraction of rows whose most probable class is y."""
    check_labels(probs, y)
    return float((probs.argmax(1) == y.to(probs.device)).double().mean())


def brier(probs: Tensor, y: Tensor) -> float:
    r"""Mean over rows of :math:`\sum_c (p_c - [y = c])^2`, between 0 and 2 (Brier 1950)."""
    check_labels(probs, y)
    return float((probs - torch.nn.functional.one_hot(y.to(probs.device).long(), probs.shape[1])).square().sum(1).double().mean())


def ece(probs: Tensor, y: Tensor, bins: int = 15, binning: Literal["width", "mass"] = "width") -> float:
    r"""Expected calibration error :math:`\sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|` of the top class, over bins of equal width or equal mass.

    Source: Naeini, Cooper & Hauskrecht 2015; Guo et al. 2017 (15 bins of equal width).
    """
    table = calibration(probs, y, bins, binning)
    return float((table[:, 2] * (table[:, 0] - table[:, 1]).abs()).sum())


def calibration(probs: Tensor, y: Tensor, bins: int = 15, binning: Literal["width", "mass"] = "width") -> Tensor:
    """One row per non-empty bin: mean confidence, accuracy, fraction of the rows; float64."""
    check_labels(probs, y)
    if bins < 1:
        raise DataError(f"bins={bins}: at least 1 is wanted")
    confidence, top = probs.double().max(1)
    correct = (top == y.to(probs.device)).double()
    by_width = (confidence * bins).ceil().long().clamp(1, bins) - 1
    index = by_width if binning == "width" else confidence.argsort().argsort() * bins // len(y)
    rows = []
    for b in range(bins):
        inside = index == b
        if bool(inside.any()):
            rows.append(torch.stack([confidence[inside].mean(), correct[inside].mean(), inside.double().mean()]))
    return torch.stack(rows)


def rmse(mean: Tensor, y: Tensor) -> float:
    """Root mean squared error, in the units of y."""
    for name, value in (("mean", mean), ("y", y)):
        check_tensor(value, name)
    if mean.shape != y.shape or mean.numel() == 0 or bool(mean.isnan().any()):
        raise DataError(f"mean of shape {tuple(mean.shape)} and y {tuple(y.shape)}; the same shape, at least one row, and no NaN are wanted")
    return float((mean - y.to(mean.device)).double().square().mean().sqrt())


def predictive_entropy(probs: Tensor) -> Tensor:
    r"""The entropy of each row's predictive distribution, nats: :math:`-\sum_c p_c \log p_c`, a score of being out of distribution (Ovadia et al. 2019)."""
    check_tensor(probs, "probs")
    if probs.ndim != 2 or bool(probs.isnan().any()):
        raise DataError(f"probs of shape {tuple(probs.shape)}; (rows, classes) without NaN is wanted")
    return torch.special.entr(probs).sum(1)


def auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    """The probability that a row out of distribution has a larger score than one in it, ties counting half: the area under the ROC curve.

    Source: Mann & Whitney 1947; Hanley & McNeil 1982.
    """
    for name, value in (("scores_in", scores_in), ("scores_out", scores_out)):
        check_tensor(value, name)
        if value.ndim != 1 or value.numel() == 0 or bool(value.isnan().any()):
            raise DataError(f"{name} of shape {tuple(value.shape)}; one number per row, at least one row, and no NaN are wanted")
    ordered = scores_in.sort().values
    outside = scores_out.to(ordered)
    below, not_above = torch.searchsorted(ordered, outside), torch.searchsorted(ordered, outside, right=True)
    return float((below + not_above).double().mean() / 2 / len(ordered))
