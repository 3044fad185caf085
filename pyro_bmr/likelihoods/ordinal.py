"""The likelihood of classes in an order, such as grades.

Owns `Ordinal`. Next: `bernoulli.py`.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import SigmoidTransform
from torch.nn.functional import logsigmoid, pad

from pyro_bmr.checks import check_arguments, is_whole
from pyro_bmr.likelihoods.ignored import Ignoring
from pyro_bmr.likelihoods.likelihood import entries, observed_rows
from pyro_bmr.likelihoods.noise import positive_site


@dataclass(frozen=True)
class Ordinal:
    r"""P(y ≤ k) = sigmoid(c_k − output) with cut points c_0 < c_1 < …: the larger the output, the
    higher the class (cumulative logit, or proportional odds; McCullagh 1980).

    `output` has the shape (rows,) or (rows, 1) and `y` (rows,), or both have one shape (rows, ...);
    y is 0 … classes − 1. The cut points come from two latent sites, so that they stay in order:
    `lowest_class`, the probability of class 0 at output 0, and `gaps`, the distances between cut
    points. Give the network no bias in its last layer: it would only shift the cut points.

    .. math:: c_0 = \operatorname{logit}(\text{lowest\_class}), \qquad c_k = c_{k-1} +
        \text{gaps}_{k-1}

    Their priors are wide around equally probable classes: logit lowest_class ~ N(−log(classes − 1),
    2²), and log gaps with the standard deviation 1.

    Args:
        classes: how many, at least 3; two are `Bernoulli`.
        size: N, for a hand-written loop over batches.
        ignore_index: a label that is not observed, such as −100 for a missing grade. By default
            there is none.

    Raises:
        ModelError: an argument is out of range.
        DataError: the output has another shape.
    """

    classes: int
    size: int | None = None
    _: KW_ONLY
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        ok = is_whole(self.classes, 3)
        check_arguments("Ordinal", ok, "a whole number >= 3", classes=self.classes)
        ok = self.ignore_index is None or is_whole(self.ignore_index)
        check_arguments("Ordinal", ok, "a whole number or None", ignore_index=self.ignore_index)

    @property
    def inferred(self) -> tuple[str, ...]:
        """The latent sites of the likelihood."""
        return "lowest_class", "gaps"

    def observe(self, output: Tensor, y: Tensor | None) -> Tensor:
        output = entries("Ordinal", output, y)
        logits = log_probs(output, self._cuts(output))
        fn: Any = dist.Categorical(logits=logits, validate_args=False)
        if self.ignore_index is not None:
            fn = Ignoring(fn, self.ignore_index)
        return observed_rows(fn.to_event(output.ndim - 1), y, self.size, output.device)

    def _cuts(self, like: Tensor) -> Tensor:
        """The cut points, in order."""
        count = self.classes
        equal = torch.logit(torch.arange(1, count, dtype=torch.float64) / count).to(like)
        base = dist.Normal(like.new_tensor(-math.log(count - 1)), 2.0)
        lowest: Any = pyro.sample(
            "lowest_class", dist.TransformedDistribution(base, [SigmoidTransform()])
        )
        gaps = positive_site("gaps", like, (count - 2,), equal.diff().log(), 1.0)
        return cut_points(lowest, gaps)


def cut_points(lowest_class: Tensor, gaps: Tensor) -> Tensor:
    """The cut points (classes − 1,) of values of the two sites of `Ordinal`."""
    return lowest_class.logit() + pad(gaps, (1, 0)).cumsum(-1)


def log_probs(output: Tensor, cuts: Tensor) -> Tensor:
    r"""log P(y = k), (..., classes), nats.

    .. math:: \sigma(a) - \sigma(b) = \sigma(a)\, \sigma(-b)\, (1 - e^{b - a}), \qquad a = c_k -
        \text{output},\ b = c_{k-1} - \text{output}

    which has all its digits where both sigmoids are near 1.
    """
    at = cuts - output[..., None]
    below = pad(logsigmoid(at), (0, 1))  # log P(y ≤ k), 0 for the last class
    above = pad(logsigmoid(-at), (1, 0))  # log P(y > k − 1), 0 for the first
    between = pad(torch.log(-torch.expm1(-cuts.diff())), (1, 1))
    return below + above + between
