"""`SparseRegressor`: a sparse regression of numbers or counts on the columns of a table. Next:
`classifier.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.utils.validation import check_array, check_consistent_length, column_or_1d

from pyro_bmr.data.table_encoding import TableError, refused
from pyro_bmr.errors import holds, warn
from pyro_bmr.estimators.families import Family, NegativeBinomial, Poisson
from pyro_bmr.estimators.subset_evidence import Array
from pyro_bmr.estimators.table_model import TableModel

FAMILIES = ("normal", "poisson", "negative-binomial")
_LARGEST = 30.0  # η
_ROWS = 1024  # predicted at once
_DISPERSED = 1.5  # times the variance of Poisson counts


class SparseRegressor(RegressorMixin, TableModel):
    """Which columns of a table predict a number, by the evidence of models with and without each.

    A DataFrame may have columns of numbers, texts, categories and truth values, with missing ones.
    Columns are scaled inside, coefficients are in the table's units, and the intercept has no
    penalty. Constant columns are left out with a warning.

    Args:
        family: "normal", noise inferred; "poisson", counts with a log link; "negative-binomial",
            counts that vary more, whose concentration is the most likely one (`concentration_`).
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
        counts = self.family != "normal"
        if counts and not bool(((y >= 0) & (y == np.floor(y))).all()):
            rule = f"counts 0, 1, 2, … for family={self.family!r}"
            raise TableError(f"y: expected {rule}, got other numbers; take family='normal'")
        center, scale = (0.0, 1.0) if counts else (y.mean(), y.std() or 1.0)
        families: dict[str, Family | None] = {
            "normal": None, "poisson": Poisson(), "negative-binomial": NegativeBinomial(1.0)
        }  # fmt: skip
        found = self._fit_table(table, (y - center) / scale, families[self.family])
        mean, coefficients, mean_draws, coefficient_draws = self._store(found, 1)
        self.coef_, self.coef_draws_ = scale * coefficients[0], scale * coefficient_draws[:, 0]
        self.intercept_ = float(center + scale * mean[0])
        self.intercept_draws_ = center + scale * mean_draws[:, 0]
        self.noise_draws_ = scale**2 * self.noise_draws_
        if self.family == "poisson":
            self._warn_of_dispersion(table, y)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """The posterior mean of the target, (rows,); with `return_std` also the standard deviation
        of a new observation.
        """
        encoded = self._encoded(X)
        if self.family == "normal" and not return_std:
            return encoded @ self.coef_ + self.intercept_
        parts = [self._moments(part) for part in _some_rows(encoded)]
        mean, std = (np.concatenate([part[k] for part in parts]) for k in range(2))
        return (mean, std) if return_std else mean

    def predict_interval(self, X: Any, level: float = 0.9) -> Array:
        """The central interval of a new observation, (rows, 2), by one draw of it for each draw
        of the posterior.
        """
        if not holds(lambda x: 0 < x < 1, level):
            raise refused("level", "a number between 0 and 1", level)
        rng = np.random.default_rng(self.random_state)
        ends = [(1 - level) / 2, (1 + level) / 2]
        new = (self._new(self._draws_of_eta(part), rng) for part in _some_rows(self._encoded(X)))
        return np.concatenate([np.quantile(part, ends, axis=0).T for part in new])

    def _moments(self, encoded: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of a new observation of each row."""
        eta = self._draws_of_eta(encoded)
        if self.family == "normal":
            mean, noise = encoded @ self.coef_ + self.intercept_, self.noise_draws_.mean()
            return mean, np.sqrt(eta.var(0) + noise)
        rate = np.exp(np.minimum(eta, _LARGEST))
        noise = (rate + rate**2 / self.concentration_).mean(0)
        return rate.mean(0), np.sqrt(rate.var(0) + noise)

    def _new(self, eta: Array, rng: np.random.Generator) -> Array:
        """An observation for each draw and row."""
        if self.family == "normal":
            return eta + np.sqrt(self.noise_draws_)[:, None] * rng.standard_normal(eta.shape)
        rate = np.exp(np.minimum(eta, _LARGEST))
        if np.isfinite(r := self.concentration_):
            rate = rng.gamma(r, rate / r)
        return rng.poisson(rate).astype(np.float64)

    def _pointwise(self, X: Any, y: Any) -> tuple[Array, Array, Array]:
        """Log likelihood and a new observation, (draws, rows), for each draw and row; y."""
        eta, y = self._draws_of_eta(self._encoded(X)), np.asarray(y, dtype=np.float64)
        check_consistent_length(X, y)
        if self.family == "normal":
            var = self.noise_draws_[:, None]
            each = -0.5 * ((y - eta) ** 2 / var + np.log(2 * np.pi * var))
        else:
            r = self.concentration_
            family: Family = NegativeBinomial(r) if np.isfinite(r) else Poisson()
            each = family.log_likelihood(eta[..., None, None], y[:, None])
        return each, self._new(eta, np.random.default_rng(self.random_state)), y

    @property
    def concentration_(self) -> float:
        """r of the negative binomial's variance μ + μ²/r; infinite for Poisson counts."""
        return float(getattr(self._family, "concentration", np.inf))

    def _warn_of_dispersion(self, table: Any, y: Array) -> None:
        """Warns if the counts vary more than Poisson counts: their intervals would be too narrow,
        and noise would be taken for effects.
        """
        rate = self.predict(table)
        ratio = float(((y - rate) ** 2 / np.maximum(rate, 1e-9)).sum()) / len(y)
        if ratio > _DISPERSED + 4 * np.sqrt(2 / len(y)):
            warn(
                f"family='poisson': the counts vary {ratio:.1f} times as much as their means allow;"
                " take family='negative-binomial'"
            )

    def _draws_of_eta(self, encoded: Array) -> Array:
        return self.coef_draws_ @ encoded.T + self.intercept_draws_[:, None]


def _some_rows(encoded: Array) -> list[Array]:
    """The rows some at a time: there is a number for each draw and row."""
    return np.array_split(encoded, max(1, -(-len(encoded) // _ROWS)))
