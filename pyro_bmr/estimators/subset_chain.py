r"""A walk over the subsets of a linear model that knows the evidence of every neighbour.

Owns `subset_chain` and its result `Visits`. Imports numpy only. Next: `families.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pyro_bmr.estimators.subset_evidence import Array

_SPREAD = 1.0  # how often a step tries a group that the data do not ask for
_STUCK = 10.0  # nats below the best model


@dataclass(frozen=True)
class Visits:
    """Where the walks were, their first parts left out.

    `models`: (visited, groups) bool, each once, the most probable first. `probability`: (visited,).
    `conditional`: (visited, groups), p(γ_g = 1 | γ_{−g}, y) at each model. `apart`: the largest
    difference of an inclusion between the walks.
    """

    models: NDArray[np.bool_]
    probability: Array
    conditional: NDArray[np.float32]
    apart: float

    @property
    def inclusion(self) -> Array:
        """(groups,) the posterior probability of each group, from those of all neighbours."""
        return self.probability @ self.conditional

    def weighted(self, log_factor: Array) -> Visits:
        """With each probability times exp(log_factor)."""
        log_weight = np.log(self.probability) + log_factor
        weight = np.exp(log_weight - log_weight.max())
        order = np.argsort(-weight, kind="stable")
        return Visits(
            self.models[order],
            weight[order] / weight.sum(),
            self.conditional[order],
            self.apart,
        )


class Model(Protocol):
    """One model: its log evidence and that of the models that differ by one group, nats."""

    @property
    def log_evidence(self) -> float: ...

    def neighbours(self) -> Array: ...


class Models(Protocol):
    """All subsets of the groups."""

    @property
    def groups(self) -> Sequence[Any]: ...

    def subset(self, kept: NDArray[np.bool_]) -> Model: ...


def log_size_prior(groups: int, weights: tuple[float, float]) -> Array:
    """log p(γ) of a model with 0 … `groups` groups: each is kept with a probability that has a
    Beta(a, b) prior, and is integrated out. Source: Scott & Berger 2010, equation 8.
    """
    a, b = weights
    kept = np.arange(groups + 1)
    return _log_beta(a + kept, b + groups - kept) - _log_beta(a, b)


def subset_chain(
    of: Models,
    log_prior: Array,
    steps: int,
    rng: np.random.Generator,
    starts: Sequence[NDArray[np.bool_]],
) -> Visits:
    r"""Weighted tempered Gibbs sampling from p(γ | y), one walk from each start.

    A step flips one group, chosen with a probability ∝ η_g / p(γ_g | γ_{−g}, y), where
    η_g = p(γ_g = 1 | γ_{−g}, y) + κ/G; it counts with the weight 1/Σ_g η_g / p(γ_g | γ_{−g}, y).
    A group whose place can be taken by another is let go of and exchanged at once. Source: Zanella
    & Roberts 2019, section 4.
    """
    walks = _found([_walk(of, log_prior, start, steps, rng) for start in starts])
    top = max(max(log_weights) for walk in walks for log_weights, _ in walk.values())
    weight: dict[bytes, float] = {}
    conditional: dict[bytes, NDArray[np.float32]] = {}
    inclusions = []
    for walk in walks:
        own = {k: float(np.exp(np.array(v) - top).sum()) for k, (v, _) in walk.items()}
        table = np.stack([included for _, included in walk.values()])
        shares = np.array(list(own.values()))
        inclusions.append(shares / max(shares.sum(), 1e-300) @ table)
        for key, share in own.items():
            weight[key] = weight.get(key, 0.0) + share
            conditional[key] = walk[key][1]
    keys = sorted((key for key in weight if weight[key] > 0), key=lambda key: -weight[key])
    probability = np.array([weight[key] for key in keys])
    return Visits(
        np.stack([np.frombuffer(key, dtype=np.bool_) for key in keys]),
        probability / probability.sum(),
        np.stack([conditional[key] for key in keys]),
        float(np.ptp(np.stack(inclusions), axis=0).max()),
    )


def greedy_start(of: Models, log_prior: Array, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The model that single flips reach from `kept`, always the best, until none gains."""
    for _ in range(2 * len(of.groups)):
        subset = of.subset(kept)
        gain = subset.neighbours() - subset.log_evidence + _prior_change(log_prior, kept)
        best = int(gain.argmax())
        if gain[best] <= 1e-9:
            break
        kept = kept.copy()
        kept[best] = ~kept[best]
    return kept


_Visited = dict[bytes, tuple[list[float], NDArray[np.float32]]]
"""Model → the log weights of its visits and p(γ_g = 1 | γ_{−g}, y) there."""


def _found(walks: list[tuple[float, _Visited]]) -> list[_Visited]:
    """The walks whose best model is not far below the best of all: one that is never left its
    start, where there is no mass.
    """
    best = max(highest for highest, _ in walks)
    return [visited for highest, visited in walks if highest > best - _STUCK]


def _walk(
    of: Models,
    log_prior: Array,
    start: NDArray[np.bool_],
    steps: int,
    rng: np.random.Generator,
) -> tuple[float, _Visited]:
    """The highest log p(γ, y) seen, and the visits after the first quarter of the steps."""
    kept = start.copy()
    known: dict[bytes, Any] = {}
    visited: _Visited = {}
    highest = -np.inf
    for step in range(steps):
        key = kept.tobytes()
        if key not in known:
            *known[key], height = _conditionals(of, log_prior, kept)
            highest = max(highest, height)
        included, cumulated, log_weight = known[key]
        if step >= steps // 4:
            if key not in visited:
                visited[key] = [], included.astype(np.float32)
            visited[key][0].append(log_weight)
        flipped = int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))
        kept[min(flipped, len(kept) - 1)] ^= True
    return highest, visited


def _conditionals(
    of: Models, log_prior: Array, kept: NDArray[np.bool_]
) -> tuple[Array, Array, float, float]:
    """p(γ_g = 1 | γ_{−g}, y) of each group; the cumulated rates at which each is flipped; the log
    weight of the model; its log p(γ, y).
    """
    subset = of.subset(kept)
    log_odds = subset.neighbours() - subset.log_evidence + _prior_change(log_prior, kept)
    log_stay = -np.logaddexp(0.0, log_odds)
    included = np.exp(np.where(kept, log_stay, log_stay + log_odds))
    log_rate = np.log(included + _SPREAD / len(kept)) - log_stay
    top = float(log_rate.max())
    cumulated = np.exp(log_rate - top).cumsum()
    log_weight = -top - float(np.log(cumulated[-1]))
    return included, cumulated, log_weight, subset.log_evidence + float(log_prior[kept.sum()])


def _prior_change(log_prior: Array, kept: NDArray[np.bool_]) -> Array:
    """log p of each neighbour less log p of the model."""
    size = int(kept.sum())
    here = log_prior[size]
    return np.where(
        kept, log_prior[max(size - 1, 0)] - here, log_prior[min(size + 1, len(kept))] - here
    )


def _log_beta(a: Any, b: Any) -> Array:
    from scipy.special import betaln

    return np.asarray(betaln(a, b))
