r"""The fit of a table, by its family and its prior.

Owns `Options`, the two kinds of models with their grids of slabs, and the fits `spike_and_slab` and
`gaussian`. Next: `horseshoe_chain.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_bmr.errors import warn
from pyro_bmr.estimators.families import Family, NegativeBinomial
from pyro_bmr.estimators.generalised_subsets import GeneralisedLinear
from pyro_bmr.estimators.model_average import Average, LinearModel, Model, averaged
from pyro_bmr.estimators.subset_chain import Visits, greedy_start, log_size_prior, subset_chain
from pyro_bmr.estimators.subset_evidence import Array, Index, Regression
from pyro_bmr.formulas.dense import Dense
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.reduction.search import greedy_search

SLABS = np.logspace(-1, 3, 5)
"""The grid of slab variances τ², in units of the noise variance, for columns of variance 1."""
GENERALISED_SLABS = np.logspace(-0.5, 1.5, 3)
"""The same for generalised linear models, on the scale of their η."""
_CONCENTRATIONS = 3  # times that the concentration of a negative binomial is found
_APART = 0.3  # of an inclusion between two walks


@dataclass(frozen=True)
class Options:
    """What a fit may be told: the steps of each run of a search or a sampler, and the draws."""

    steps: int
    draws: int


def linear_model(x: Array, y: Array, groups: Sequence[Index]) -> Regression:
    """A linear model whose noise is inferred; `x` and `y` centred."""
    return Regression(x, y, groups, SLABS, _even(SLABS), max(len(y) - 1.0, 1.0))


def generalised_model(
    family: Family, x: Array, y: Array, groups: Sequence[Index]
) -> GeneralisedLinear:
    """A generalised linear model; `x` centred. The concentration of a negative binomial is the most
    likely one at the model that a greedy search ends at.
    """
    of = GeneralisedLinear(family, x, y, groups, GENERALISED_SLABS, _even(GENERALISED_SLABS))
    if not isinstance(family, NegativeBinomial):
        return of
    kept = np.zeros(len(groups), dtype=np.bool_)
    for _ in range(_CONCENTRATIONS):
        family = family.best(of.subset(kept).eta(), y)
        of = GeneralisedLinear(family, x, y, groups, of.slabs, of.log_slab_prior)
        if len(groups):
            kept = greedy_start(of, _log_prior(of), kept)
    return of


def spike_and_slab(
    of: Regression | GeneralisedLinear, options: Options, rng: np.random.Generator
) -> Average:
    """The average over the subsets that a search visits, by their evidence."""
    visits = _visits(of, _log_prior(of), options, rng)
    if visits.apart > _APART:
        warn(
            f"two runs of the search differ by {visits.apart:.2f} in the probability of a column:"
            " several models explain the data as well; raise steps to weigh them better"
        )
    draws = averaged(
        intercepts(of) + sum(map(len, of.groups)),
        intercepts(of),
        visits.models,
        visits.probability,
        lambda kept: posterior_of(of, kept),
        options.draws,
        rng,
    )
    kept = visits.inclusion > 0.5
    return Average(
        *draws, visits.inclusion, kept, delta_f(of, kept), visits.models, visits.probability
    )


def gaussian(
    of: Regression | GeneralisedLinear, options: Options, rng: np.random.Generator
) -> Average:
    """The full model, whose Gaussian posterior is reduced by `greedy_search`: `inclusion` and
    `kept` are of the models that it visits, the draws of the full model.
    """
    every = np.ones((1, len(of.groups)), dtype=np.bool_)
    draws = averaged(
        intercepts(of) + sum(map(len, of.groups)),
        intercepts(of),
        every,
        np.ones(1),
        lambda kept: posterior_of(of, kept),
        options.draws,
        rng,
    )
    if not every.size:
        return Average(*draws, np.empty(0), every[0], np.empty(0), every, np.ones(1))
    mean, cov, prior_var = (torch.as_tensor(part) for part in of.subset(every[0]).gaussian())
    labels = torch.empty(len(mean), dtype=torch.long)
    for g, members in enumerate(of.groups):
        labels[torch.as_tensor(members)] = g
    prior = Diagonal(torch.zeros_like(mean), prior_var.expand_as(mean))
    search = greedy_search(Dense(mean, cov), prior, labels)
    kept = search.kept[0].numpy()
    return Average(
        *draws,
        search.inclusion.numpy(),
        kept,
        delta_f(of, kept),
        search.kept.numpy(),
        search.probability.numpy(),
    )


def intercepts(of: Regression | GeneralisedLinear) -> int:
    """How many there are: one for each predictor."""
    return 1 if isinstance(of, Regression) else of.family.predictors


def posterior_of(of: Regression | GeneralisedLinear, kept: NDArray[np.bool_]) -> Model:
    """Of the intercepts and b, given the groups `kept`."""
    return LinearModel(of.subset(kept)) if isinstance(of, Regression) else of.subset(kept)


def delta_f(of: Regression | GeneralisedLinear, kept: NDArray[np.bool_]) -> Array:
    """The change of log evidence if a group is zero, the others as in the model `kept`, nats."""
    if not len(kept):
        return np.empty(0)
    model = of.subset(kept)
    return np.where(kept, 1.0, -1.0) * (model.neighbours() - model.log_evidence)


def _visits(
    of: Regression | GeneralisedLinear, log_prior: Array, options: Options, rng: np.random.Generator
) -> Visits:
    empty = np.zeros(len(of.groups), dtype=np.bool_)
    if not len(empty):
        return Visits(empty[None], np.ones(1), np.empty((1, 0), dtype=np.float32), 0.0)
    starts = [greedy_start(of, log_prior, empty), empty]
    return subset_chain(of, log_prior, options.steps, rng, starts)


def _log_prior(of: Regression | GeneralisedLinear) -> Array:
    """log p(γ) by the number of groups, Beta(1, √G)."""
    size = len(of.groups)
    return log_size_prior(size, (1.0, max(1.0, size**0.5)))


def _even(slabs: Array) -> Array:
    """The log of equal probabilities."""
    return np.full(len(slabs), -np.log(len(slabs)))
