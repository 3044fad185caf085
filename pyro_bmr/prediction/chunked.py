"""A prediction too large to be kept: it is computed again, some rows at a time, for each question.

Owns `ChunkedPrediction`. Next: `predictive.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.errors import described
from pyro_bmr.prediction.mixture_prediction import MixturePrediction
from pyro_bmr.prediction.moments import Moments, check_targets
from pyro_bmr.prediction.quantiles import Probabilities
from pyro_bmr.prediction.real_prediction import RealPrediction

OfRows = RealPrediction | MixturePrediction


@dataclass(frozen=True)
class ChunkedPrediction(Moments):
    """The prediction of many rows, in memory that does not grow with draws times rows. It has the
    members of `RealPrediction` and `MixturePrediction`, but each of them runs the program again:
    ask once for all that is needed, by `each`.

    `chunks`: for each stretch of rows the function that computes its prediction. `sizes`: how many
    rows each has.
    """

    chunks: Sequence[Callable[[], OfRows]]
    sizes: Sequence[int]

    __repr__ = described

    def each(self, question: Callable[[OfRows], Tensor], rows_axis: int = 0) -> Tensor:
        """The answers to `question` about the prediction of each stretch of rows, joined.

        Example:
            >>> prediction.each(lambda part: torch.stack([part.mean, part.sd]), rows_axis=1)
        """
        return torch.cat([question(chunk()) for chunk in self.chunks], rows_axis)

    @property
    def mean(self) -> Tensor:
        """(n, ...), in the units of y."""
        return self.each(lambda part: part.mean)

    @property
    def aleatoric(self) -> Tensor:
        """The mean variance of the draws, (n, ...), squared units of y."""
        return self.each(lambda part: part.aleatoric)

    @property
    def epistemic(self) -> Tensor:
        """The variance of the draws' means, (n, ...), squared units of y."""
        return self.each(lambda part: part.epistemic)

    @property
    def variance(self) -> Tensor:
        """The sum of both parts, (n, ...), squared units of y."""
        return self.each(lambda part: part.variance)

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y | x, data) of each row, (n,), nats."""
        return self._with(y, lambda part, own: part.log_prob(own))

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y ≤ y) of each entry, (n, ...), for y with rows."""
        return self._with(y, lambda part, own: part.cdf(own))

    def crps(self, y: Tensor) -> Tensor:
        """The continuous ranked probability score of each entry, (n, ...), units of y."""
        return self._with(y, lambda part, own: part.crps(own))

    def quantile(self, q: Probabilities) -> Tensor:
        """The quantiles of each entry, (n, ...) for a number, (len(q), n, ...) for several."""
        return self.each(lambda part: part.quantile(q), 1 if isinstance(q, Sequence) else 0)

    def samples(self, count: int, seed: int = 0) -> Tensor:
        """Draws of y, (count, n, ...); all rows of one draw have the same draw of the weights."""
        parts = [chunk().samples(count, seed, stretch=k) for k, chunk in enumerate(self.chunks)]
        return torch.cat(parts, 1)

    def _with(self, y: Tensor, question: Callable[[OfRows, Tensor], Tensor]) -> Tensor:
        rows = (sum(self.sizes), *y.shape[1:])
        check_targets(y, rows, missing=True)  # its other axes, and NaN, by each part
        stretches = zip(self.chunks, y.split(list(self.sizes)), strict=True)
        return torch.cat([question(chunk(), own) for chunk, own in stretches])
