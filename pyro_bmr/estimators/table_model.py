"""What the two estimators share: a table becomes a regression, a fit becomes coefficients in the
table's own units.

Owns `TableModel`, the base of `SparseRegressor` and `SparseClassifier`, which scikit-learn's
`BaseEstimator` is under. Next: `pictures.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data

from pyro_bmr.data.table_encoding import TableError, refused
from pyro_bmr.errors import holds
from pyro_bmr.estimators.columns import Columns, fit_columns
from pyro_bmr.estimators.engines import (
    Options,
    gaussian,
    generalised_model,
    linear_model,
    spike_and_slab,
)
from pyro_bmr.estimators.families import Family
from pyro_bmr.estimators.horseshoe_chain import horseshoe
from pyro_bmr.estimators.model_average import Average
from pyro_bmr.estimators.subset_evidence import Array, Regression

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PRIORS = ("spike-and-slab", "horseshoe", "gaussian")
_STEPS = {"spike-and-slab": (1000, 200), "horseshoe": (2000, 0), "gaussian": (1, 1)}
"""By default: of a linear model, of a generalised one."""
_WIDEST = 2000  # columns of a full Gaussian posterior


class TableModel(BaseEstimator):
    """The parts of an estimator that do not depend on what is predicted.

    Attributes of a fit:

    - `columns_`: how a table becomes columns.
    - `coefficient_names_`: of all coefficients.
    - `coef_`: posterior means in the units of the table, (coefficients,), or (classes,
      coefficients).
    - `intercept_`: the same of the intercept.
    - `coef_draws_`, `intercept_draws_`: posterior draws of both, draws first.
    - `inclusion_`: (coefficients,) probabilities that each is not zero.
    - `kept_`: (coefficients,) bool, the reported model.
    - `delta_f_`: (coefficients,) nats.
    """

    prior: str
    steps: int | None
    draws: int
    random_state: Any

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def summary(self, level: float = 0.9) -> pd.DataFrame:
        """A row for each coefficient, in the units of its column: posterior mean, standard
        deviation, the ends of the central interval of `level`, the probability of inclusion, and
        ΔF, the change of log evidence without it (nats; negative: it is needed).

        The coefficient of a category is its difference from the mean over the categories. Missing
        values have a row of their own, "NAME missing". For several classes the rows have two names,
        coefficient and class; a class's coefficient is its difference from the mean over classes.
        """
        import pandas as pd

        check_is_fitted(self)
        if not holds(lambda x: 0 < x < 1, level):
            raise refused("level", "a number between 0 and 1", level)
        draws = np.concatenate([self.intercept_draws_[..., None], self.coef_draws_], -1)
        mean = np.concatenate([np.asarray(self.intercept_)[..., None], self.coef_], -1)
        low, high = (1 - level) / 2, (1 + level) / 2
        ends = np.quantile(draws, [low, high], axis=0)
        names = ["(intercept)", *self.coefficient_names_]
        inclusion = np.concatenate([[1.0], self.inclusion_])
        change = np.concatenate([[np.nan], self.delta_f_])
        index: Any = pd.Index(names, name="coefficient")
        if mean.ndim > 1:
            classes = self.classes_.tolist()
            index = pd.MultiIndex.from_product([names, classes], names=["coefficient", "class"])
            mean, spread = mean.T.ravel(), draws.std(0).T.ravel()
            ends = np.stack([end.T.ravel() for end in ends])
            inclusion, change = (np.repeat(part, len(classes)) for part in (inclusion, change))
        else:
            spread = draws.std(0)
        columns = {"mean": mean, "sd": spread, f"{low:.0%}": ends[0], f"{high:.0%}": ends[1]}
        return pd.DataFrame({**columns, "inclusion": inclusion, "delta_f": change}, index=index)

    def plot(self, X: Any = None, y: Any = None) -> Figure:
        """A figure: intervals of the coefficients, their probabilities of inclusion, and, with rows
        `X` and `y`, predictions against what was observed.
        """
        from pyro_bmr.estimators.pictures import figure_of

        check_is_fitted(self)
        return figure_of(self, X, y)

    def to_arviz(self, X: Any = None, y: Any = None) -> Any:
        """The draws as an ArviZ `DataTree`, and, for rows `X` and `y`, their predictive draws, log
        likelihood and observed values; see `data_tree`. Needs the extra "arviz".
        """
        from pyro_bmr.estimators.inference_data import data_tree

        check_is_fitted(self)
        return data_tree(self, X, y)

    def _table(self, X: Any, reset: bool) -> pd.DataFrame:
        """The rows as a DataFrame, checked against the training columns."""
        import pandas as pd

        if isinstance(X, pd.DataFrame):
            if reset and (twice := X.columns[X.columns.duplicated()].tolist()):
                raise TableError(f"X: expected columns of different names, got {twice[0]!r} twice")
            validate_data(self, X, reset=reset, skip_check_array=True)
            if reset and len(X) < 2:
                raise TableError(f"X: expected at least 2 rows, got n_samples = {len(X)}")
            if reset and not X.shape[1]:
                raise TableError(f"X: expected at least one column, got the shape {X.shape}")
            return X
        rules: dict[str, Any] = {"dtype": np.float64, "ensure_all_finite": "allow-nan"}
        if reset:
            rules["ensure_min_samples"] = 2
        array = validate_data(self, X, reset=reset, **rules)
        names = getattr(self, "feature_names_in_", None)
        if names is None:
            names = [f"x{k}" for k in range(array.shape[1])]
        return pd.DataFrame(array, columns=names)

    def _fit_table(self, table: pd.DataFrame, y: Array, family: Family | None) -> Average:
        """Finds `columns_`, and the posterior in the columns of the regression."""
        self._check_options(family)
        self.columns_: Columns = fit_columns(table)
        x, groups = self.columns_.matrix(table), self.columns_.groups
        rng = np.random.default_rng(self.random_state)
        of = (
            linear_model(x, y, groups)
            if family is None
            else generalised_model(family, x, y, groups)
        )
        self._family = family if isinstance(of, Regression) else of.family
        usual = _STEPS[self.prior][family is not None]
        options = Options(usual if self.steps is None else self.steps, self.draws)
        if self.prior == "horseshoe" and isinstance(of, Regression) and groups:
            return horseshoe(of, options, rng)
        if self.prior != "gaussian":
            return spike_and_slab(of, options, rng)
        if sum(map(len, of.groups)) > _WIDEST:
            raise TableError(
                f"prior='gaussian': expected at most {_WIDEST} columns, got"
                f" {sum(map(len, of.groups))}; take prior='spike-and-slab'"
            )
        return gaussian(of, options, rng)

    def _check_options(self, family: Family | None) -> None:
        if self.prior not in PRIORS:
            raise refused("prior", f"one of {', '.join(PRIORS)}", self.prior)
        if self.prior == "horseshoe" and family is not None:
            raise refused(
                "prior", "'spike-and-slab' or 'gaussian' for a family that is not normal",
                self.prior,
            )  # fmt: skip
        _check_whole("draws", self.draws, 2)
        if self.steps is not None:
            _check_whole("steps", self.steps, 4)

    def _store(self, found: Average, intercepts: int) -> tuple[Array, Array, Array, Array]:
        """Keeps what the table's coefficients share; gives intercept and coefficients, mean and
        draws, each with the predictors before the coefficients, in units of the targets of the fit.
        """
        columns = self.columns_
        self.coefficient_names_ = columns.names
        of_name = columns.term_of_name
        self.inclusion_, self.kept_ = found.inclusion[of_name], found.kept[of_name]
        self.delta_f_, self.noise_draws_ = found.delta_f[of_name], found.noise
        self.models_, self.model_probability_ = found.models, found.probability
        parts = []
        for values in (found.mean, found.draws):
            b = values[..., intercepts:].reshape(*values.shape[:-1], -1, intercepts)
            coefficients = columns.coefficients(np.swapaxes(b, -1, -2))
            offset = columns.offset(coefficients)
            parts += [values[..., :intercepts] - offset, coefficients]
        return parts[0], parts[1], parts[2], parts[3]

    def _encoded(self, X: Any) -> Array:
        """The columns of the table that coefficients belong to, (rows, coefficients)."""
        check_is_fitted(self)
        return self.columns_.encoded(self._table(X, reset=False))


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not holds(lambda x: x >= least and x == int(x), value):
        raise refused(name, f"a whole number >= {least}", value)
