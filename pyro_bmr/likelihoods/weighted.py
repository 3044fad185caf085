"""Rows that count more or less than once.

Owns `Weighted`, and `unweighted` and `reading_from`, which look into one. Next: `names.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_bmr.checks import check_arguments, check_shape
from pyro_bmr.likelihoods.likelihood import Likelihood


@dataclass(frozen=True)
class Weighted:
    """The `likelihood`, with the log density of each row multiplied by a weight: 2 counts a row
    twice, 0 leaves it out. N remains the number of rows.

    With weights that are no counts, such as those of a survey, posterior and ΔF are of the weighted
    likelihood. Scores of a prediction have no weights.

    Args:
        likelihood: any likelihood.
        weights: where x has them: the column of a tensor x (rows, columns), or the key of a dict x.
            The network does not see them. `predict` needs the column too, with any values.

    Example:
        >>> model = BayesianNetwork(net, prior, Weighted(Bernoulli(), weights=-1))
        >>> fit(model, (torch.cat([x, w[:, None]], 1), y))
    """

    likelihood: Likelihood
    weights: int | str

    def __post_init__(self) -> None:
        ok = hasattr(self.likelihood, "observe")
        check_arguments("Weighted", ok, "a likelihood, with observe", likelihood=self.likelihood)

    @property
    def inferred(self) -> tuple[str, ...]:
        """The latent sites of the likelihood."""
        return getattr(self.likelihood, "inferred", ())

    @property
    def missing(self) -> str:
        """Whether targets may be missing, as of the likelihood."""
        return getattr(self.likelihood, "missing", "refuse")

    @property
    def ignore_index(self) -> int | None:
        """The label that is not observed, as of the likelihood."""
        return getattr(self.likelihood, "ignore_index", None)

    @property
    def reads(self) -> Mapping[str, int | str]:
        """What the likelihood takes out of x."""
        return {**getattr(self.likelihood, "reads", {}), "weights": self.weights}

    def observe(self, output: Tensor, y: Tensor | None, *, weights: Tensor, **read: Any) -> Tensor:
        check_shape(weights, "weights", output.shape[:1], "one number >= 0 for each row")
        with _RowWeights(weights.to(output.dtype)):
            return self.likelihood.observe(output, y, **read)


def unweighted(likelihood: Any) -> Any:
    """The likelihood of the rows, without their weights."""
    return likelihood.likelihood if isinstance(likelihood, Weighted) else likelihood


def reading_from(likelihood: Any, places: Mapping[str, int]) -> Any:
    """The likelihood, with column numbers in the place of the names of columns that it reads."""
    inner = unweighted(likelihood)
    moved = {
        name: places[where]
        for name, where in getattr(inner, "reads", {}).items()
        if where in places
    }
    inner = replace(inner, **moved) if moved else inner
    if not isinstance(likelihood, Weighted):
        return inner
    return Weighted(inner, places.get(str(likelihood.weights), likelihood.weights))


class _RowWeights(Messenger):
    """Multiplies the log densities of observed rows, not of latent sites."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic"):
            msg["scale"] = torch.as_tensor(msg["scale"]) * self.weights
