"""What all predictions of numbers have: variance, standard deviation, a central interval.

Owns `Moments`, and the checks and draws that predictions share. Next: `crps.py`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_bmr.checks import check_shape
from pyro_bmr.errors import DataError
from pyro_bmr.prediction.quantiles import Probabilities, central


class Moments:
    """A prediction of numbers, whose variance has an aleatoric and an epistemic part."""

    @property
    @abstractmethod
    def aleatoric(self) -> Tensor:
        """The mean variance of the draws, (n, ...), squared units of y."""

    @property
    @abstractmethod
    def epistemic(self) -> Tensor:
        """The variance of the draws' means, (n, ...), squared units of y."""

    @abstractmethod
    def quantile(self, q: Probabilities) -> Tensor:
        """The quantiles of each entry, (n, ...) for a number, (len(q), n, ...) for several."""

    @property
    def variance(self) -> Tensor:
        """The sum of both parts, (n, ...), squared units of y."""
        return self.aleatoric + self.epistemic

    @property
    def sd(self) -> Tensor:
        """The standard deviation of the prediction, (n, ...), in the units of y."""
        return self.variance.sqrt()

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """The ends of the central interval with the probability `level`, each (n, ...)."""
        low, high = self.quantile(central(level))
        return low, high


def check_targets(y: Tensor, shape: Sequence[int], missing: bool = False) -> None:
    """Raises DataError unless y has the shape of the prediction, and no NaN unless it may be
    `missing`.
    """
    check_shape(y, "y", shape, "one value for each entry of the prediction")
    if not missing and (bad := int(y.isnan().sum())):
        raise DataError(f"y is NaN in {bad} of {y.numel()} entries; leave these rows out")


def mixed(log_p: Tensor) -> Tensor:
    """The log of the mean over draws, (draws, n) → (n,)."""
    return log_p.logsumexp(0) - math.log(len(log_p))


def components(draws: int, count: int, seed: int) -> Tensor:
    """For each of `count` draws of y the draw of the weights that it has, each as often as any
    other, up to one.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = range(-(-count // draws))
    each = [torch.randperm(draws, generator=generator, device="cpu") for _ in rounds]
    return torch.cat(each)[:count]


def noise_seed(seed: int, stretch: int) -> int:
    """The seed of the noise of a stretch of rows."""
    return (seed * 1_000_003 + stretch + 1) % (1 << 62)
