"""The prediction of classes: their probabilities, averaged over draws.

Owns `ClassPrediction`. Next: `real_prediction.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.checks import check_labels
from pyro_bmr.errors import described, warn
from pyro_bmr.prediction.moments import check_targets


@dataclass(frozen=True)
class ClassPrediction:
    """Class probabilities `probs` (n, ..., classes), the average over draws.

    In nats, (n, ...): `aleatoric` is the mean entropy of the draws, and `epistemic` the mutual
    information of label and draw. Their sum is the entropy of `probs`. A label that is
    `ignore_index` is not scored.
    """

    probs: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    ignore_index: float | None = None

    __repr__ = described

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y | x, data), (n, ...), nats, for each label of a row by itself.

        A probability below the smallest normal number of its dtype counts as that number, and a
        `PyroBMRWarning` says how many do. A label that is ignored counts 0.
        """
        if self.probs.ndim > 2:
            check_targets(y, self.probs.shape[:-1])
        ignored = None if self.ignore_index is None else y == self.ignore_index
        known = y if ignored is None else y.masked_fill(ignored, 0)
        flat, labels = self.probs.flatten(0, -2), known.flatten() if self.probs.ndim > 2 else known
        check_labels(flat, labels)
        picked = flat.gather(1, labels.to(flat.device).long()[:, None])[:, 0]
        if ignored is not None:
            picked = picked.masked_fill(ignored.flatten().to(flat.device), 1.0)
        least = torch.finfo(flat.dtype).tiny
        if below := int((picked < least).sum()):
            warn(
                f"log_prob: {below} of {len(picked)} labels have a probability of 0 in"
                f" {flat.dtype}; each counts as {least:.3g}, {math.log(least):.1f} nats, which is"
                " too good: average over more draws, or widen the posterior"
            )
        return picked.clamp_min(least).log().view(self.probs.shape[:-1])

    def samples(self, count: int, seed: int = 0) -> Tensor:
        """Labels drawn from `probs`, (count, n, ...), each by itself."""
        flat = self.probs.flatten(0, -2)
        generator = torch.Generator(device=flat.device).manual_seed(seed)
        drawn = flat.multinomial(count, replacement=True, generator=generator)
        return drawn.mT.reshape(count, *self.probs.shape[:-1])


def entropy(probs: Tensor) -> Tensor:
    """The entropy of each distribution, nats."""
    return torch.special.entr(probs).sum(-1)
