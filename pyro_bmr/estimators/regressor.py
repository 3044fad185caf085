"""`SparseRegressor`: a sparse regression of numbers or counts on the columns of a table. Next:
`classifier.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.utils.validation import check_array, check_consistent_length, column_or_1d

from pyro_bmr.errors import holds
from pyro_bmr.estimators.columns import TableError, refused
from pyro_bmr.estimators.families import Poisson
from pyro_bmr.estimators.subset_evidence import Array
from pyro_bmr.estimators.table_model import TableModel

FAMILIES = ("normal", "poisson")


class SparseRegressor(RegressorMixin, TableModel):
    """Which columns of a table predict a number, by the evidence of models with and without each.

    A DataFrame may have columns of numbers, texts, categories and truth values, with missing ones.
    Columns are scaled inside, coefficients are in the table's units, and the intercept has no
    penalty. Constant columns are left out with a warning.

    Args:
        family: "normal", noise inferred, or "poisson", counts with a log link.
        prior: "spike-and-slab": averages over subsets of the columns, each weighed by its evidence,
            exact for "normal" and by Laplace's method otherwise. "gaussian": all columns, and what
            `greedy_search` leaves of them. "horseshoe": Gibbs sampling, for "normal".
        steps: of each of two runs of the search, or of the sampler; by default 1,000 (200 for a
            family that is not normal, 2,000 for the horseshoe).
        draws: of the posterior, that are kept.
        random_state: a seed, or None for another result each time.

    Attributes are those of `TableModel`, and `noise_draws_`, draws of the noise variance.

    Raises:
        TableError: a column, the target or an option cannot be used.

    Example:
        >>> model = SparseRegressor().fit(table.drop(columns="price"), table["price"])
        >>> model.summary()
        >>> mean, sd = model.predict(new, return_std=True)
    """

    def __init__(
        self,
        *,
        family: str = "normal",
        prior: str = "spike-and-slab",
        steps: int | None = None,
        draws: int = 2000,
        random_state: Any = 0,
    ) -> None:
        self.family = family
        self.prior = prior
        self.steps = steps
        self.draws = draws
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SparseRegressor:
        """Fits; `X` is a DataFrame or an array (rows, columns), `y` (rows,) has no missing
        values.
        """
        if self.family not in FAMILIES:
            raise refused("family", f"one of {', '.join(FAMILIES)}", self.family)
        if y is None:
            raise TableError(
                "y: expected a target; requires y to be passed, but the target y is None"
            )
        y = column_or_1d(
            check_array(y, ensure_2d=False, dtype=np.float64, input_name="y"), warn=True
        )
        table = self._table(X, reset=True)
        check_consistent_length(X, y)
        counts = self.family == "poisson"
        if counts and not bool(((y >= 0) & (y == np.floor(y))).all()):
            raise TableError("y: expected counts 0, 1, 2, … for family='poisson', got others")
        center, scale = (0.0, 1.0) if counts else (y.mean(), y.std() or 1.0)
        found = self._fit_table(table, (y - center) / scale, Poisson() if counts else None)
        mean, coefficients, mean_draws, coefficient_draws = self._store(found, 1)
        self.coef_, self.coef_draws_ = scale * coefficients[0], scale * coefficient_draws[:, 0]
        self.intercept_ = float(center + scale * mean[0])
        self.intercept_draws_ = center + scale * mean_draws[:, 0]
        self.noise_draws_ = scale**2 * self.noise_draws_
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """The posterior mean of the target, (rows,); with `return_std` also the standard deviation
        of a new observation.
        """
        encoded = self._encoded(X)
        if self.family == "normal" and not return_std:
            return encoded @ self.coef_ + self.intercept_
        eta = self._draws_of_eta(encoded)
        rate = np.exp(np.minimum(eta, 30.0)) if self.family == "poisson" else eta
        mean = rate.mean(0) if self.family == "poisson" else encoded @ self.coef_ + self.intercept_
        if not return_std:
            return mean
        noise = rate.mean(0) if self.family == "poisson" else self.noise_draws_.mean()
        return mean, np.sqrt(rate.var(0) + noise)

    def predict_interval(self, X: Any, level: float = 0.9) -> Array:
        """The central interval of a new observation, (rows, 2), by one draw of it for each draw
        of the posterior.
        """
        if not holds(lambda x: 0 < x < 1, level):
            raise refused("level", "a number between 0 and 1", level)
        eta = self._draws_of_eta(self._encoded(X))
        rng = np.random.default_rng(self.random_state)
        if self.family == "poisson":
            new = rng.poisson(np.exp(np.minimum(eta, 30.0))).astype(np.float64)
        else:
            new = eta + np.sqrt(self.noise_draws_)[:, None] * rng.standard_normal(eta.shape)
        return np.quantile(new, [(1 - level) / 2, (1 + level) / 2], axis=0).T

    def _pointwise(self, X: Any, y: Any) -> tuple[Array, Array, Array]:
        """Log likelihood and a new observation, (draws, rows), for each draw and row; y."""
        eta, y = self._draws_of_eta(self._encoded(X)), np.asarray(y, dtype=np.float64)
        check_consistent_length(X, y)
        rng = np.random.default_rng(self.random_state)
        if self.family == "poisson":
            eta = np.minimum(eta, 30.0)
            each = Poisson().log_likelihood(eta[..., None, None], y[:, None])
            return each, rng.poisson(np.exp(eta)).astype(np.float64), y
        var = self.noise_draws_[:, None]
        each = -0.5 * ((y - eta) ** 2 / var + np.log(2 * np.pi * var))
        return each, eta + np.sqrt(var) * rng.standard_normal(eta.shape), y

    def _draws_of_eta(self, encoded: Array) -> Array:
        return self.coef_draws_ @ encoded.T + self.intercept_draws_[:, None]
