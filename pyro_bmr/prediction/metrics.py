"""Scores of predictions: accuracy, Brier score, calibration error, RMSE, CRPS, coverage, predictive
entropy, AUROC.

They take tensors and give numbers, computed in double precision whatever the dtype of the tensors.
Each row of probabilities must be a distribution, up to rounding. Next: `paired_losses.py`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from pyro_bmr.checks import check_labels, check_shape, check_tensor, is_whole
from pyro_bmr.errors import DataError, described
from pyro_bmr.prediction.crps import crps_of_draws

Binning = Literal["width", "mass"]
_MOST_BINS = 2**24  # up to here `_bin` is exact


def accuracy(probs: Tensor, y: Tensor) -> float:
    """The fraction of rows whose most probable class is y, the first of equally probable classes.
    Logits give the same as probabilities.
    """
    check_labels(probs, y)
    return float((probs.argmax(1) == y.to(probs.device)).double().mean())


def brier(probs: Tensor, y: Tensor) -> float:
    r"""Mean over rows of :math:`\sum_c (p_c - [y = c])^2`, between 0 and 2 (Brier 1950)."""
    p = _distributions(probs, y)
    return float(
        (p - torch.nn.functional.one_hot(y.to(p.device).long(), p.shape[1])).square().sum(1).mean()
    )


def ece(probs: Tensor, y: Tensor, bins: int = 15, binning: Binning = "width") -> float:
    r"""Expected calibration error :math:`\sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|`
    of the top class, over bins of equal width or equal mass.

    Source: Naeini, Cooper & Hauskrecht 2015; Guo et al. 2017 (15 bins of equal width).
    """
    table = calibration(probs, y, bins, binning)
    return float((table[:, 2] * (table[:, 0] - table[:, 1]).abs()).sum())


def calibration(probs: Tensor, y: Tensor, bins: int = 15, binning: Binning = "width") -> Tensor:
    """Mean confidence, accuracy and fraction of the rows, one row for each non-empty bin; float64.

    A confidence on the edge of two bins of equal width is in the lower one. In bins of equal mass
    rows of the same confidence are in their own order.
    """
    if not is_whole(bins, 1) or bins > _MOST_BINS:
        raise DataError(
            f"bins={described(bins)}: expected a whole number of bins, from 1 to {_MOST_BINS:,}"
        )
    if not isinstance(binning, str) or binning not in get_args(Binning):
        raise DataError(
            f"binning={described(binning)}: expected one of"
            f" {', '.join(map(repr, get_args(Binning)))}"
        )
    confidence, top = _distributions(probs, y).max(1)
    correct = (top == y.to(probs.device)).double()
    if binning == "width":
        index = _bin(confidence, bins)
    else:
        index = torch.empty(len(y), dtype=torch.long, device=probs.device)
        index[confidence.argsort(stable=True)] = (
            torch.arange(len(y), device=probs.device) * bins // len(y)
        )
    used, place = index.unique(return_inverse=True)
    sums = confidence.new_zeros(len(used), 3).index_add_(
        0, place, torch.stack([confidence, correct, torch.ones_like(correct)], 1)
    )
    return torch.cat([sums[:, :2] / sums[:, 2:], sums[:, 2:] / len(y)], 1)


def _bin(confidence: Tensor, bins: int) -> Tensor:
    """The b with b/bins < confidence ≤ (b + 1)/bins, by exact arithmetic: of the product with
    `bins` only its first half fits a double.
    """
    high = confidence.float().double()
    nearest = (confidence * bins).round()
    above = (high * bins - nearest) + (confidence - high) * bins > 0
    return (nearest.long() - 1 + above.long()).clamp(0, bins - 1)


def rmse(mean: Tensor, y: Tensor) -> float:
    """Root mean squared error, in the units of y."""
    for name, value in (("mean", mean), ("y", y)):
        check_tensor(value, name)
    bad = [name for name, value in (("mean", mean), ("y", y)) if not bool(value.isfinite().all())]
    if mean.shape != y.shape or mean.numel() == 0 or bad:
        also = f", {' and '.join(bad)} not finite" if bad else ""
        raise DataError(
            "expected mean and y of one shape, finite and with at least one row, got mean of shape"
            f" {tuple(mean.shape)} and y of shape {tuple(y.shape)}{also}"
        )
    mean, y = mean.double(), y.to(mean.device).double()
    error = (mean - y).abs()
    largest = error.max()  # its square need not be a float
    if bool(largest.isinf()):  # nor the difference of two floats
        return 2 * rmse(mean / 2, y / 2)
    return float(largest * (error / largest).square().mean().sqrt()) if float(largest) > 0 else 0.0


def binary_brier(probs: Tensor, y: Tensor) -> float:
    """Mean of (p − y)² over all entries, between 0 and 1, for probabilities of yes or no.

    They are the `mean` of a prediction under `Bernoulli`. It is half of `brier` of the two classes.

    Entries of y that are NaN are left out.
    """
    known = _known(probs, y, "probs")
    if bool(((probs < 0) | (probs > 1)).any()) or not bool(((y == 0) | (y == 1))[known].all()):
        raise DataError("binary_brier: expected probs from 0 to 1, and y of 0 and 1")
    error = probs.double() - y.to(probs.device).double()
    return float(error[known].square().mean())


def coverage(low: Tensor, high: Tensor, y: Tensor) -> float:
    """The fraction of entries with low ≤ y ≤ high, to hold beside the level of the interval.

    Entries of y that are NaN are left out.
    """
    known = _known(low, y, "low") & _known(high, y, "high")
    y = y.to(low.device)
    return float(((low <= y) & (y <= high))[known].double().mean())


def crps(draws: Tensor, y: Tensor) -> float:
    """The mean continuous ranked probability score of draws of y, (draws, n, ...), in the units of
    y. Entries of y that are NaN are left out.
    """
    known = _known(draws[0], y, "a draw")
    return float(crps_of_draws(draws.double(), y.to(draws.device).double())[known].mean())


def ranked_probability(probs: Tensor, y: Tensor) -> float:
    r"""Mean over rows of :math:`\sum_k (P(Y \le k) - [y \le k])^2`, the CRPS of classes in an
    order, such as those of `Ordinal` (Epstein 1969).
    """
    p = _distributions(probs, y)
    at_most = torch.arange(p.shape[1], device=p.device) >= y.to(p.device)[:, None]
    return float((p.cumsum(1) - at_most.double()).square().sum(1).mean())


def _known(values: Tensor, y: Tensor, name: str) -> Tensor:
    """Which entries of y are not NaN.

    Raises:
        DataError: all are, or `values` have another shape, or NaN.
    """
    check_tensor(y, "y")
    check_shape(values, name, y.shape, "that of y")
    known = ~y.isnan().to(values.device)
    if not bool(known.any()) or bool(values.isnan().any()):
        raise DataError(f"{name}: expected no NaN, and at least one y that is not NaN")
    return known


def predictive_entropy(probs: Tensor) -> Tensor:
    r"""The entropy of each row's predictive distribution, nats: :math:`-\sum_c p_c \log p_c`, a
    score of being out of distribution (Ovadia et al. 2019).

    In the dtype of `probs`, at least float32.
    """
    dtype = (
        torch.promote_types(probs.dtype, torch.float32)
        if isinstance(probs, Tensor) and not probs.is_complex()
        else torch.float32
    )
    return torch.special.entr(_distributions(probs)).sum(1).to(dtype)


def auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    """The area under the ROC curve: the probability that a row out of distribution has a larger
    score than a row in it, where ties count half.

    Scores of two dtypes are compared by their values (integers beyond 2⁵³ and fractions as the
    nearest double). Source: Mann & Whitney 1947; Hanley & McNeil 1982.
    """
    for name, value in (("scores_in", scores_in), ("scores_out", scores_out)):
        check_tensor(value, name)
        if value.ndim != 1 or value.numel() == 0 or bool(value.isnan().any()):
            raise DataError(
                f"{name}: expected one number per row, at least one row, and no NaN, got shape"
                f" {tuple(value.shape)} and {int(value.isnan().sum())} NaN"
            )
    dtype = (
        torch.float64
        if scores_in.is_floating_point() or scores_out.is_floating_point()
        else torch.int64
    )
    ordered, outside = scores_in.to(dtype).sort().values, scores_out.to(scores_in.device, dtype)
    below, not_above = (
        torch.searchsorted(ordered, outside),
        torch.searchsorted(ordered, outside, right=True),
    )
    return int((below + not_above).sum()) / (2 * len(ordered) * len(outside))


def _distributions(probs: Tensor, y: Tensor | None = None) -> Tensor:
    """`probs` in double precision.

    Raises:
        DataError: a row is no distribution, or y does not fit.
    """
    check_tensor(probs, "probs")
    if y is not None:
        check_labels(probs, y)
    elif probs.ndim != 2 or probs.numel() == 0 or bool(probs.isnan().any()):
        raise DataError(
            "expected probs of shape (rows, classes), at least one row, and no NaN, got shape"
            f" {tuple(probs.shape)} and {int(probs.isnan().sum())} NaN"
        )
    p = probs.double()
    off = (p.sum(1) - 1).abs()
    rounding = max(1e-5, 16 * torch.finfo(probs.dtype).eps) if probs.is_floating_point() else 0.0
    bad = (p < 0).any(1) | ~(off <= rounding)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(
            f"probs: expected numbers >= 0 that sum to 1 in each row; row {row} sums to"
            f" {float(p[row].sum()):.6g}, its least is {float(p[row].min()):.6g}; of logits take"
            " softmax(1)"
        )
    return p
