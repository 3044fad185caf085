"""Whether a reduction costs accuracy on given rows: the losses of each row before and after it,
compared in pairs.

Owns `paired_loss`. Next: `fitting/elbo.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.checks import check_tensor
from pyro_bmr.errors import DataError
from pyro_bmr.prediction.predictive import (
    ChunkedPrediction,
    ClassPrediction,
    MixturePrediction,
    Prediction,
    RealPrediction,
)

_ERRORS = 2.0  # standard errors


class PairedLoss(NamedTuple):
    """The mean losses `before` and `after` a reduction, and their difference, `rise`.

    `standard_error`: of the mean difference over the `rows` (NaN for one row). `measure`: "error
    rate", "squared error" or "negative log likelihood".
    """

    before: float
    after: float
    rise: float
    standard_error: float
    rows: int
    measure: str

    @property
    def worse(self) -> bool:
        """Whether the loss rises by more than two standard errors."""
        return self.rise > _ERRORS * self.standard_error

    def caution(self) -> str | None:
        """A message if the loss rises that much, else None."""
        if not self.worse:
            return None
        return (
            f"the {self.measure} rises from {self.before:.4g} to {self.after:.4g} on {self.rows:,}"
            f" rows, by {self.rise:.2g} ± {self.standard_error:.2g} per row, more than two standard"
            " errors. Prune less (kept=, threshold=), in rounds during the fit (Every), or fit the"
            " reduced model (refit)"
        )


def paired_loss(before: Prediction, after: Prediction, y: Tensor) -> PairedLoss:
    r"""The rise of the loss per row from before to after a reduction, on the same rows. The loss is
    the error for classes, the squared error for Normals, and the negative log likelihood for other
    distributions.

    .. math:: d_i = \ell_i^{\text{after}} - \ell_i^{\text{before}}, \qquad
        \bar d = \tfrac1n \sum_i d_i, \qquad
        \mathrm{se}^2 = \frac{1}{n(n-1)} \sum_i (d_i - \bar d)^2

    Rows that both predict equally well cancel, so the standard error is smaller than for two
    separate losses (McNemar 1947 for classes).

    Raises:
        DataError: the predictions are not of the rows of `y`, not of one kind, or are NaN.

    Example:
        >>> before, after = (predict(fit.program, posterior, x) for posterior in (fit.posterior,
        ...     reduction.posterior))
        >>> paired_loss(before, after, y).rise
    """
    if type(before) is not type(after) or type(before) not in _MEASURES:
        raise DataError(
            "paired_loss: expected two predictions of one kind, as from predict, got"
            f" {type(before).__name__} and {type(after).__name__}"
        )
    first, second = (_losses(prediction, y) for prediction in (before, after))
    difference = second - first
    error = (
        float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else float("nan")
    )
    return PairedLoss(
        float(first.mean()),
        float(second.mean()),
        float(difference.mean()),
        error,
        len(difference),
        _MEASURES[type(before)],
    )


_MEASURES = {
    ClassPrediction: "error rate",
    RealPrediction: "squared error",
    MixturePrediction: "negative log likelihood",
    ChunkedPrediction: "negative log likelihood",
}


def _losses(prediction: Prediction, y: Tensor) -> Tensor:
    """One number per row, (n,), float64."""
    check_tensor(y, "y")
    log_p = prediction.log_prob(y)  # with its checks
    if isinstance(prediction, ClassPrediction):
        labels = y.to(prediction.probs.device)
        each = (prediction.probs.argmax(-1) != labels).double()
        if prediction.ignore_index is not None:
            each = each.masked_fill(labels == prediction.ignore_index, torch.nan)
    elif isinstance(prediction, RealPrediction):
        each = (prediction.mean.double() - y.to(prediction.locs.device).double()).square()
    else:
        each = -log_p.double()
    each = each.reshape(len(each), -1)
    may_miss = getattr(prediction, "missing", False)
    if isinstance(prediction, ClassPrediction):
        may_miss = prediction.ignore_index is not None
    if may_miss:  # rows without a target do not count
        each = each[~each.isnan().all(1)]
    each = each.nanmean(1) if may_miss else each.mean(1)
    if len(each) == 0 or bool(each.isnan().any()):
        raise DataError(
            f"paired_loss: expected at least one row, and no NaN, got {len(each)} rows and"
            f" {int(each.isnan().sum())} NaN"
        )
    return each
