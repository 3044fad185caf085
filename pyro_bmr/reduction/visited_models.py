r"""The models that a search over subsets visited: the best, their probabilities, and averages over
them.

Owns `Search` and `search_result`. Imports torch only. Next: `search_path.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.conditioning import Members
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.gaussian import prune_subset
from pyro_bmr.formulas.structure import Structure

Given = tuple[tuple[Structure, ...], tuple[Any, ...]]
"""The posteriors and priors that are searched."""


@dataclass(frozen=True)
class Search:
    """The models that a search visited. A model is the set of kept groups; an entry without a
    group is kept in all.

    `kept`: (models, groups) bool, the best first. `delta_f`: (models,) gain in log evidence over
    the full model, nats. `probability`: (models,) posterior probability among the models visited, ∝
    exp(ΔF − threshold · number of groups pruned). `posterior`, `prior`, `members`: what was
    searched.
    """

    kept: Tensor
    delta_f: Tensor
    probability: Tensor
    posterior: tuple[Structure, ...]
    prior: tuple[Any, ...]
    members: Members

    @property
    def inclusion(self) -> Tensor:
        """The posterior probability of each group, (groups,): the sum over the models that
        keep it.
        """
        return self.probability @ self.kept.to(self.probability)

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """Of the best model: one bool tensor per structure, True where an entry (of a matrix
        normal, a row) is kept.
        """
        return self.masks_of(0)

    @property
    def mask(self) -> Tensor:
        """`masks` of a search over one structure."""
        if len(self.posterior) != 1:
            raise ReductionError(f"{len(self.posterior)} structures were searched; take masks")
        return self.masks[0]

    def masks_of(self, model: int) -> tuple[Tensor, ...]:
        """As `masks`, of another model: a row of `kept`."""
        masks = [
            torch.ones(q.unit_count, dtype=torch.bool, device=q.mean.device) for q in self.posterior
        ]
        for group in (~self.kept[model]).nonzero()[:, 0].tolist():
            for block, index in self.members[group]:
                masks[block][index] = False
        return tuple(masks)

    def reduced(self, model: int = 0) -> tuple[Structure, ...]:
        """The structures after the reduction to a model, the pruned entries 0 with variance 0."""
        return tuple(
            q if bool(mask.all()) else prune_subset(q, p, ~mask)[1].embedded(mask)
            for q, p, mask in zip(self.posterior, self.prior, self.masks_of(model), strict=True)
        )

    def average(self, window: float = 3.0) -> tuple[Diagonal, ...]:
        r"""Mean and variance of every entry under the average of the models within `window` nats of
        the best (Occam's window).

        .. math:: \bar\mu = \sum_k p_k \mu_k, \qquad
            \bar\sigma^2 = \sum_k p_k (\sigma_k^2 + \mu_k^2) - \bar\mu^2

        Source: Hoeting, Madigan, Raftery & Volinsky 1999; Penny et al. 2010 for nested dynamic
        models, whose window of odds 1:20 is 3 nats.
        """
        chosen = (
            (self.probability >= self.probability[0] * math.exp(-window)).nonzero()[:, 0].tolist()
        )
        weights = self.probability[chosen] / self.probability[chosen].sum()
        models = [self.reduced(model) for model in chosen]
        averages = []
        for k, q in enumerate(self.posterior):
            means, variances = (
                torch.stack([part(model[k]).double() for model in models])
                for part in (attrgetter("mean"), attrgetter("marginal_var"))
            )
            share = weights.to(means).view(-1, *[1] * q.mean.ndim)
            mean = (share * means).sum(0)
            # Σ pσ² + Σ p(μ − μ̄)²: the second moments would cancel
            var = (share * (variances + (means - mean).square())).sum(0)
            averages.append(Diagonal(mean.to(q.mean.dtype), var.to(q.mean.dtype)))
        return tuple(averages)


def search_result(
    models: Tensor,
    totals: Tensor,
    threshold: float,
    given: Given,
    members: Members,
    first: Tensor | None = None,
) -> Search:
    """The models, (visits, groups), each once, and their ΔF. `first`: the model that stands first
    whatever its evidence, that of a target."""
    table, gains = _distinct(models, totals)
    score = gains - threshold * (~table).sum(1)
    order = score.argsort(descending=True, stable=True)
    if first is not None:
        at = (table == first).all(1).nonzero()[0]
        order = torch.cat([at, order[order != at]])
    probability = torch.softmax(score, 0)[order]
    return Search(table[order], gains[order], probability, *given, members)


def _distinct(models: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """The models in lexicographic order, with the ΔF of one visit of each."""
    count = models.shape[1]
    if count > 64:
        table, inverse = models.unique(dim=0, return_inverse=True)
        return table, totals.new_empty(len(table)).scatter_(0, inverse, totals)
    # as the bits of one integer; the highest is its sign
    bits = models[:, 1:].long() * 2 ** torch.arange(count - 2, -1, -1)
    keys = bits.sum(1) + torch.where(models[:, 0], 0, torch.iinfo(torch.int64).min)
    unique, inverse = keys.unique(return_inverse=True)
    visit = inverse.new_empty(len(unique)).scatter_(0, inverse, torch.arange(len(keys)))
    return models[visit], totals[visit]
