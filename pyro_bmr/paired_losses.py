"""Whether a reduction costs accuracy on rows at hand: the loss of each row before and after it, held against each other.

Owns `paired_loss`. Next: `checkpoint_files.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import DataError
from pyro_bmr.fit_arguments import check_labels, check_tensor
from pyro_bmr.prediction import ClassPrediction, Prediction

_ERRORS = 2.0  # standard errors


class PairedLoss(NamedTuple):
    """`before`, `after`: the mean loss; `rise`: their difference, with the `standard_error` of the mean of the rows' differences (NaN for one row);
    `rows`: how many; `measure`: "error rate" or "squared error"."""

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
        """What to say if it does, else None."""
        if not self.worse:
            return None
        return (
            f"the {self.measure} rises from {self.before:.4g} to {self.after:.4g} on {self.rows:,} rows, by {self.rise:.2g} ± {self.standard_error:.2g} per "
            "row, more than two standard errors. Prune less (kept=, threshold=), in rounds during the fit (Every), or fit the reduced model (refit)"
        )


def paired_loss(before: Prediction, after: Prediction, y: Tensor) -> PairedLoss:
    r"""How much more is lost per row after a reduction than before: of classes the errors, of real targets the squared errors, of the same rows.

    .. math:: d_i = \ell_i^{\text{after}} - \ell_i^{\text{before}}, \qquad \bar d = \tfrac1n \sum_i d_i, \qquad
        \mathrm{se}^2 = \frac{1}{n(n-1)} \sum_i (d_i - \bar d)^2

    The rows that both predict equally well cancel, so the standard error is smaller than those of two losses apart (McNemar 1947 for classes).

    Raises:
        DataError: the predictions are not of the rows of `y`, or are NaN.

    Example:
        >>> before, after = (predict(fit.program, posterior, x) for posterior in (fit.posterior, reduction.posterior))
        >>> paired_loss(before, after, y).rise
    """
    if isinstance(before, ClassPrediction) is not isinstance(after, ClassPrediction):
        raise DataError(f"paired_loss: two predictions of one kind are expected, got {type(before).__name__} and {type(after).__name__}")
    first, second = (_losses(prediction, y) for prediction in (before, after))
    difference = second - first
    error = float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else float("nan")
    measure = "error rate" if isinstance(before, ClassPrediction) else "squared error"
    return PairedLoss(float(first.mean()), float(second.mean()), float(difference.mean()), error, len(difference), measure)


def _losses(prediction: Prediction, y: Tensor) -> Tensor:
    """One number per row, (n,), float64."""
    if isinstance(prediction, ClassPrediction):
        check_labels(prediction.probs, y)
        return (prediction.probs.argmax(1) != y.to(prediction.probs.device)).double()
    check_tensor(y, "y")
    mean = prediction.mean
    if mean.shape != y.shape or mean.numel() == 0 or bool(mean.isnan().any()):
        raise DataError(f"paired_loss: a prediction of shape {tuple(mean.shape)} and y {tuple(y.shape)}; expected the same shape, at least one row, and no NaN")
    return torch.square(mean.double() - y.to(mean.device).double()).reshape(len(mean), -1).mean(1)
