"""`SparseRegressor`: a sparse regression of numbers or counts on the columns of a table. Next:
`classifier.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.utils.validation import (
    check_array,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
)

from pyro_bmr.data.table_encoding import TableError, refused
from pyro_bmr.errors import holds, warn
from pyro_bmr.estimators.declared_family import (
    COUNTS,
    NUMBERS,
    declared,
    exposure_of,
    number_family,
)
from pyro_bmr.estimators.families import NumberFamily
from pyro_bmr.estimators.real_families import Normal, StudentT
from pyro_bmr.estimators.subset_evidence import Array
from pyro_bmr.estimators.table_model import (
    TableModel,
    as_table_error,
    check_rows,
    split_exposure,
)

_ROWS = 1024  # predicted at once
_ROUNDING = 1e-13  # of its largest value, in which a constant target differs
_DISPERSED = 1.5  # times the variance of Poisson counts


class SparseRegressor(RegressorMixin, TableModel):
    """Which columns of a table predict a number, by the evidence of models with and without each.

    A DataFrame may have columns of numbers, texts, categories and truth values, with missing ones.
    Columns are scaled inside, coefficients are in the table's units, and the intercept has no
    penalty. Constant columns are left out with a warning.

    Args:
        family: a name, or a likelihood of the library with its arguments.

            - "normal", noise inferred, or ``bmr.Normal(noise=2.0)``.
            - "student-t", for targets with outliers: scale and degrees of freedom are the most
              probable ones (`family_`), or given, ``bmr.likelihoods.StudentT(df=4)``.
            - "poisson", counts with a log link, ``bmr.Poisson(exposure="years")``: the column with
              the exposure of each row, such as the time under observation, has no coefficient.
            - "negative-binomial", counts that vary more, whose concentration is the most probable
              one (`concentration_`); ``bmr.NegativeBinomial(exposure="years")``.
        prior: "spike-and-slab": averages over subsets of the columns, each weighed by its evidence,
            exact for "normal" and by Laplace's method otherwise. "gaussian": all columns, and what
            `greedy_search` leaves of them. "horseshoe": all columns, most of them shrunk.
        engine: None takes the first of those that the prior has. "spike-and-slab": "search" over
            subsets, or "mean-field" (the default beyond 20,000 columns, and beyond 5,000 of a
            family that is not normal). "gaussian": "search", or "nuts", Pyro's, which takes
            minutes. "horseshoe": "gibbs".
        steps: of each of two runs of the search, of the sampler, or of the warm-up of NUTS; by
            default 1,000 for the search (200 for a family that is not normal), 2,000 for Gibbs
            sampling (4,000), 500 for NUTS.
        draws: of the posterior, that are kept.
        random_state: a seed, or None for another result each time.

    Attributes are those of `TableModel`; `noise_draws_`, draws of the noise variance of "normal";
    and `family_`, the family with its parameters, of a target divided by `target_scale_`.

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
        family: Any = "normal",
        prior: str = "spike-and-slab",
        engine: str | None = None,
        steps: int | None = None,
        draws: int = 2000,
        random_state: Any = 0,
    ) -> None:
        self.family = family
        self.prior = prior
        self.engine = engine
        self.steps = steps
        self.draws = draws
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SparseRegressor:
        """Fits; `X` is a DataFrame or an array (rows, columns), `y` (rows,) has no missing
        values.
        """
        check_rows(X, y)
        name, likelihood = declared(self.family, NUMBERS)
        if y is None:
            raise TableError(
                "y: expected a target; requires y to be passed, but the target y is None"
            )
        with as_table_error("y"):
            y = column_or_1d(
                check_array(y, ensure_2d=False, dtype=np.float64, input_name="y"), warn=True
            )
        table = self._table(X, reset=True)
        with as_table_error("y"):
            check_consistent_length(X, y)
        constant = name not in COUNTS and bool(np.ptp(y) <= _ROUNDING * np.abs(y).max())
        center, scale = (float(y[0]), 1.0) if constant else _units(name, y)
        family = number_family(name, likelihood, y, scale)
        if constant and (family is None or "scale" in getattr(family, "learned", ())):
            y = np.full(len(y), center)
            _warn_of_constant(y, self.prior, exact=family is None)
        table, log_exposure = split_exposure(table, self._exposure())
        if name in COUNTS:
            family = replace(family, log_exposure=log_exposure)  # type: ignore[type-var]
        found, self.family_ = self._fit_table(table, (y - center) / scale, family)
        self._target, self.target_scale_ = name, scale
        mean, coefficients, mean_draws, coefficient_draws = self._store(found, 1)
        self.coef_, self.coef_draws_ = scale * coefficients[0], scale * coefficient_draws[:, 0]
        self.intercept_ = float(center + scale * mean[0])
        self.intercept_draws_ = center + scale * mean_draws[:, 0]
        self.noise_draws_ = scale**2 * self.noise_draws_
        if name == "poisson":
            self._warn_of_dispersion(X, y)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """The posterior mean of the target, (rows,); with `return_std` also the standard deviation
        of a new observation, infinite for Student's distribution with up to 2 degrees of freedom.
        """
        check_is_fitted(self)
        if self._target not in COUNTS and not return_std:
            return self._encoded(X) @ self.coef_ + self.intercept_
        parts = [self._moments(*part) for part in self._some_rows(X)]
        mean, std = (np.concatenate([part[k] for part in parts]) for k in range(2))
        return (mean, std) if return_std else mean

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R² of the predictions of the rows `X`."""
        check_rows(X, y)
        check_rows(X, sample_weight, "sample_weight")
        return float(super().score(X, y, sample_weight))

    def predict_interval(self, X: Any, level: float = 0.9) -> Array:
        """The central interval of a new observation, (rows, 2), by one draw of it for each draw
        of the posterior.
        """
        if not holds(lambda x: 0 < x < 1, level):
            raise refused("level", "a number between 0 and 1", level)
        rng = np.random.default_rng(self.random_state)
        ends = [(1 - level) / 2, (1 + level) / 2]
        new = (family.draw(self._eta(part), rng) for part, family in self._some_rows(X))
        return np.concatenate([np.quantile(part, ends, axis=0).T for part in new])

    @property
    def concentration_(self) -> float:
        """r of the negative binomial's variance μ + μ²/r; infinite for Poisson counts."""
        return float(getattr(self.family_, "concentration", np.inf))

    def _exposure(self) -> int | str | None:
        return exposure_of(declared(self.family, NUMBERS)[1])

    def _eta(self, encoded: Array) -> Array:
        """(draws, rows, 1)."""
        return (self.coef_draws_ @ encoded.T + self.intercept_draws_[:, None])[..., None]

    def _predictive(self, log_exposure: Array | float) -> NumberFamily:
        """Of rows with these exposures, in the units of the target."""
        scale, family = self.target_scale_, self.family_
        if self._target == "normal":
            known = self.noise_draws_[:, None] if family is None else family.var * scale**2
            return Normal(known)
        if isinstance(family, StudentT):
            return replace(family, scale=family.scale * scale)
        found: NumberFamily = replace(family, log_exposure=log_exposure)
        return found

    def _some_rows(self, X: Any) -> list[tuple[Array, NumberFamily]]:
        """The rows some at a time: there is a number for each draw and row."""
        encoded, log_exposure = self._encoded_rows(X)
        parts = max(1, -(-len(encoded) // _ROWS))
        exposures = np.array_split(np.broadcast_to(log_exposure, len(encoded)), parts)
        return [
            (part, self._predictive(exposure))
            for part, exposure in zip(np.array_split(encoded, parts), exposures, strict=True)
        ]

    def _moments(self, encoded: Array, family: NumberFamily) -> tuple[Array, Array]:
        """Mean and standard deviation of a new observation of each row."""
        eta = self._eta(encoded)
        mean, var = family.mean(eta), family.variance(eta).mean(0)
        center = mean.mean(0) if self._target in COUNTS else encoded @ self.coef_ + self.intercept_
        return center, np.sqrt(mean.var(0) + var)

    def _pointwise(self, X: Any, y: Any) -> tuple[Array, Array, Array]:
        """Log likelihood and a new observation, (draws, rows), for each draw and row; y."""
        encoded, log_exposure = self._encoded_rows(X)
        eta, y = self._eta(encoded), np.asarray(y, dtype=np.float64)
        check_consistent_length(X, y)
        family = self._predictive(log_exposure)
        new = family.draw(eta, np.random.default_rng(self.random_state))
        return family.log_density(eta, y), new, y

    def _warn_of_dispersion(self, X: Any, y: Array) -> None:
        """Warns if the counts vary more than Poisson counts: their intervals would be too narrow,
        and noise would be taken for effects.
        """
        rate = self.predict(X)
        ratio = float(((y - rate) ** 2 / np.maximum(rate, 1e-9)).sum()) / len(y)
        if ratio > _DISPERSED + 4 * np.sqrt(2 / len(y)):
            warn(
                f"family='poisson': the counts vary {ratio:.1f} times as much as their means allow;"
                " take family='negative-binomial'"
            )


def _warn_of_constant(y: Array, prior: str, exact: bool) -> None:
    """Warns that a target is the same in all rows. `exact`: the noise is 0 then, which a prior
    without zeros has no posterior for.
    """
    said = f"y is the same in all {len(y)} rows, {y[0]:.6g}: there is nothing to predict"
    mend = "leave a constant target out, or give the noise, family=bmr.Normal(noise=1.0)"
    if exact and prior in ("gaussian", "horseshoe"):
        raise TableError(
            f"y: expected a target that varies for prior={prior!r} and a noise that is inferred,"
            f" but {said}; {mend}"
        )
    warn(f"{said}, and the noise and the intervals go to 0; {mend}")


def _units(name: str, y: Array) -> tuple[float, float]:
    """What is subtracted from the target, and what it is divided by."""
    if name == "normal":
        return float(y.mean()), float(y.std()) or 1.0
    if name == "student-t":
        middle = float(np.median(y))
        spread = 1.4826 * float(np.median(np.abs(y - middle)))
        return middle, spread or float(y.std()) or 1.0
    return 0.0, 1.0
