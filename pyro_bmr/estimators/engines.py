r"""The models of a table, and their fits by a search over subsets.

Owns `Options`, the two kinds of models, and the fits `spike_and_slab` and `gaussian`. Next:
`mean_field_subsets.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_bmr.errors import warn
from pyro_bmr.estimators.families import SLABS, Family, Inferred
from pyro_bmr.estimators.generalised_subsets import GeneralisedLinear, GeneralisedSubset
from pyro_bmr.estimators.model_average import Average, LinearModel, Model, averaged
from pyro_bmr.estimators.subset_chain import Visits, greedy_start, log_size_prior, subset_chain
from pyro_bmr.estimators.subset_evidence import Array, Index, Regression
from pyro_bmr.formulas.dense import Dense
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.reduction.search import greedy_search

_ROUNDS = 3  # times that the parameters of a family are found
_EVALUATIONS = 80  # of the evidence for each of them
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
    """A generalised linear model; `x` centred. Parameters of the family are the most probable ones
    of the model that a greedy search ends at.
    """
    of = _of_family(family, x, y, groups)
    if not isinstance(family, Inferred) or not len(family.parameters):
        return of
    kept = np.zeros(len(groups), dtype=np.bool_)
    for _ in range(_ROUNDS):
        of = most_probable(of, of.subset(kept))
        if len(groups):
            kept = greedy_start(of, log_prior(of), kept)
    return of


def most_probable(of: GeneralisedLinear, model: GeneralisedSubset) -> GeneralisedLinear:
    """With the parameters of the family that maximise log p(y, parameters | γ) at one model."""
    from scipy.optimize import minimize

    family: Any = of.family

    def at(parameters: Array) -> GeneralisedLinear:
        return with_family(of, family.at(parameters))

    def loss(parameters: Array) -> float:
        there = at(parameters)
        evidence = there.subset(model.kept, model).log_evidence
        return -evidence - float(there.family.log_prior())  # type: ignore[attr-defined]

    most = _EVALUATIONS * len(family.parameters)
    rules = {"xatol": 1e-2, "fatol": 1e-3, "maxfev": most}
    found = minimize(loss, family.parameters, method="Nelder-Mead", options=rules)
    return at(found.x)


def with_family(of: GeneralisedLinear, family: Family) -> GeneralisedLinear:
    """The same rows with another family."""
    return _of_family(family, of.x, of.y, of.x_groups)


def _of_family(family: Family, x: Array, y: Array, groups: Sequence[Index]) -> GeneralisedLinear:
    return GeneralisedLinear(family, x, y, groups, family.slabs, _even(family.slabs))


def spike_and_slab(
    of: Regression | GeneralisedLinear, options: Options, rng: np.random.Generator
) -> Average:
    """The average over the subsets that a search visits, by their evidence."""
    visits = _visits(of, options, rng)
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
    """The full model, from which groups are taken as long as the evidence rises; the draws are of
    the full model.

    `greedy_search` reduces its Gaussian posterior, at one noise and one slab: those of the full
    model, whose noise is too small where columns are many. So its model is the start of a search by
    the evidence in which both are integrated out. `inclusion` and `probability` are of the model
    where that ends, of its neighbours, and of the full model, by the same evidence.
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
    return _by_evidence(of, reduced_average(of, of.subset(every[0]).gaussian(), draws))


def _by_evidence(of: Regression | GeneralisedLinear, found: Average) -> Average:
    """`found` with the models around the best one, each with a probability by its evidence; all
    models are as probable before the data.
    """
    groups = len(of.groups)
    even, empty = np.zeros(groups + 1), np.zeros(groups, dtype=np.bool_)
    ends = [greedy_start(of, even, start) for start in (found.kept, empty)]
    best = max(ends, key=lambda kept: of.subset(kept).log_evidence)
    subset, whole = of.subset(best), np.ones(groups, dtype=np.bool_)
    models = np.concatenate([best[None], best ^ np.eye(groups, dtype=np.bool_)])
    evidence = np.concatenate([[subset.log_evidence], subset.neighbours()])
    if not models.all(1).any():
        models = np.concatenate([models, whole[None]])
        evidence = np.append(evidence, of.subset(whole).log_evidence)
    order = evidence.argsort()[::-1]
    models, probability = models[order], np.exp(evidence[order] - np.logaddexp.reduce(evidence))
    kept = models[0]
    return replace(
        found,
        inclusion=probability @ models,
        kept=kept,
        delta_f=delta_f(of, kept),
        models=models,
        probability=probability,
    )


def reduced_average(
    of: Regression | GeneralisedLinear,
    moments: tuple[Any, Any, float],
    draws: tuple[Array, Array, Array],
) -> Average:
    """The reduction of b's posterior mean and covariance under a prior of one variance, by
    `greedy_search`, with the mean, draws and noise of the full model.
    """
    mean, cov = (torch.as_tensor(part) for part in moments[:2])
    labels = torch.empty(len(mean), dtype=torch.long)
    for g, members in enumerate(of.groups):
        labels[torch.as_tensor(members)] = g
    prior = Diagonal(torch.zeros_like(mean), torch.full_like(mean, moments[2]))
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
    of: Regression | GeneralisedLinear, options: Options, rng: np.random.Generator
) -> Visits:
    empty = np.zeros(len(of.groups), dtype=np.bool_)
    if not len(empty):
        return Visits(empty[None], np.ones(1), np.empty((1, 0), dtype=np.float32), 0.0)
    sizes = log_prior(of)
    starts = [greedy_start(of, sizes, empty), empty]
    return subset_chain(of, sizes, options.steps, rng, starts)


def log_prior(of: Regression | GeneralisedLinear) -> Array:
    """log p(γ) by the number of groups, Beta(1, √G)."""
    size = len(of.groups)
    return log_size_prior(size, (1.0, max(1.0, size**0.5)))


def _even(slabs: Array) -> Array:
    """The log of equal probabilities."""
    return np.full(len(slabs), -np.log(len(slabs)))
