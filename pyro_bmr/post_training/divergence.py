r"""How far a pruned network is from the dense one, by their outputs: no labels are needed.

Owns `Divergence`. For classes, and for yes and no, it is KL(dense ‖ pruned). For real targets with
the noise σ it is the mean of ½ (f − f_dense)²/σ². For any other likelihood it is the difference of
the expected −log p(y | f) under targets that are drawn from the dense network. Next: `measure.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_bmr.curvatures.scores import Loss
from pyro_bmr.isolation import seed_generators
from pyro_bmr.likelihoods import Bernoulli, Categorical, Normal

_DRAWS = 8  # of the targets of a likelihood without a mean that says all


@dataclass(frozen=True)
class Divergence:
    """Of outputs from those of the dense network, summed over the rows of a batch, nats. `seed`: of
    the targets that are drawn; with one seed they are the same in each call.
    """

    loss: Loss
    seed: int = 0

    def of(
        self, output: Tensor, dense: Tensor, y: Tensor | None, read: Mapping[str, Tensor]
    ) -> Tensor:
        """A number, 0 where both outputs are equal; it can be differentiated by `output`."""
        likelihood = self.loss.likelihood
        if type(likelihood) is Categorical:  # weights of classes are of the loss
            return _of_classes(likelihood, output, dense, y)
        if type(likelihood) is Bernoulli:
            return _of_yes_or_no(output, dense, y)
        if type(likelihood) is Normal and (noise := self._noise(likelihood)) is not None:
            return 0.5 * ((output - dense) / torch.as_tensor(noise).to(output)).square().sum()
        with torch.random.fork_rng():
            seed_generators(self.seed)
            targets = [self.loss.drawn(dense, y, read) for _ in range(_DRAWS)]
        rises = [
            self.loss.nll(output, target, read) - self.loss.nll(dense, target, read)
            for target in targets
        ]
        return torch.stack(rises).mean()

    def _noise(self, likelihood: Normal) -> float | Tensor | None:
        """σ of real targets, unless the network gives it."""
        if isinstance(likelihood.noise, (int, float)):
            return likelihood.noise
        return self.loss.values.get("noise") if likelihood.inferred else None


def _of_classes(likelihood: Categorical, output: Tensor, dense: Tensor, y: Tensor | None) -> Tensor:
    axis = 1 if likelihood.class_axis == 1 else -1
    log_p = dense.log_softmax(axis)
    apart = (log_p - output.log_softmax(axis)).masked_fill(log_p == -torch.inf, 0)
    each = (log_p.exp() * apart).sum(axis)
    if y is not None and likelihood.ignore_index is not None and y.shape == each.shape:
        each = each.where(y != likelihood.ignore_index, 0)
    return each.sum()


def _of_yes_or_no(output: Tensor, dense: Tensor, y: Tensor | None) -> Tensor:
    """p (l_dense − l) + log(1 + eˡ) − log(1 + e^(l_dense)) of each entry, p = sigmoid(l_dense)."""
    each = dense.sigmoid() * (dense - output) + softplus(output) - softplus(dense)
    if y is not None:
        each = each.where(~y.isnan().view(each.shape), 0)
    return each.sum()
