r"""A posterior averaged over models: draws, means, inclusion, and ΔF of each group.

Owns `Average` and `averaged`. Imports numpy only. Next: `engines.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyro_bmr.estimators.subset_evidence import Array, Index, Subset

_NEGLIGIBLE = 1e-3  # probability of all models that an average leaves out


class Model(Protocol):
    """The posterior of the intercepts and b given one model."""

    @property
    def columns(self) -> Index: ...

    def mean(self) -> Array:
        """Intercepts first."""
        ...

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Draws, (count, intercepts + columns), and of the noise variance, (count,)."""
        ...


@dataclass(frozen=True)
class LinearModel:
    """A `Subset` with its intercept, whose prior is flat: N(0, σ²/rows) since all is centred."""

    subset: Subset

    @property
    def columns(self) -> Index:
        """Of b."""
        return self.subset.columns

    def mean(self) -> Array:
        """The intercept, which is 0, and b."""
        return np.concatenate([[0.0], self.subset.mean()])

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Draws of the intercept and b, and of σ²."""
        b, noise = self.subset.draw(count, rng)
        intercept = np.sqrt(noise / len(self.subset.of.y)) * rng.standard_normal(count)
        return np.concatenate([intercept[:, None], b], 1), noise


@dataclass(frozen=True)
class Average:
    """What a fit found, in the columns of the regression.

    `mean`: (intercepts + coefficients,). `draws`: (draws, intercepts + coefficients); `noise`:
    (draws,) noise variances. `inclusion`: (groups,) probabilities; of a horseshoe
    P(κ < 1/2). `kept`: (groups,) bool, the reported model. `delta_f`: (groups,) change of log
    evidence if the group is set to zero, the rest of the reported model as it is, nats.
    `models`, `probability`: the models visited.
    """

    mean: Array
    draws: Array
    noise: Array
    inclusion: Array
    kept: NDArray[np.bool_]
    delta_f: Array
    models: NDArray[np.bool_]
    probability: Array


def averaged(
    size: int,
    intercepts: int,
    models: NDArray[np.bool_],
    probability: Array,
    posterior_of: Callable[[NDArray[np.bool_]], Model],
    count: int,
    rng: np.random.Generator,
) -> tuple[Array, Array, Array]:
    """Mean, draws and noise under the average of models; draws are shared out by probability.

    Source: Hoeting, Madigan, Raftery & Volinsky 1999.
    """
    used = int(np.searchsorted(probability.cumsum(), 1.0 - _NEGLIGIBLE)) + 1
    share = probability[:used] / probability[:used].sum()
    mean, draws, noise = np.zeros(size), np.zeros((count, size)), np.empty(count)
    at = 0
    for kept, weight, times in zip(models, share, rng.multinomial(count, share), strict=False):
        model = posterior_of(kept)
        places = np.concatenate([np.arange(intercepts), intercepts + model.columns])
        mean[places] += weight * model.mean()
        if times:
            rows = np.arange(at, at + times)
            draws[rows[:, None], places], noise[rows] = model.draw(times, rng)
            at += times
    order = rng.permutation(count)
    return mean, draws[order], noise[order]
