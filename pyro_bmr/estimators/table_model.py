"""What the two estimators share: a table becomes a regression, a fit becomes coefficients in the
table's own units.

Owns `TableModel`, the base of `SparseRegressor` and `SparseClassifier`, which scikit-learn's
`BaseEstimator` is under. Next: `pictures.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data

from pyro_bmr.data.table_encoding import TableError, check_told_apart, refused
from pyro_bmr.data.tables import check_index
from pyro_bmr.errors import DataError, holds, warn
from pyro_bmr.estimators.columns import Columns, alike, alike_names, fit_columns
from pyro_bmr.estimators.engine_choice import engine_of, fitted
from pyro_bmr.estimators.engines import generalised_model, linear_model
from pyro_bmr.estimators.families import Family
from pyro_bmr.estimators.model_average import Average
from pyro_bmr.estimators.subset_evidence import Array, Regression

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ALIKE = "columns are nearly the same"


class TableModel(BaseEstimator):
    """The parts of an estimator that do not depend on what is predicted.

    Attributes of a fit:

    - `columns_`: how a table becomes columns.
    - `coefficient_names_`: of all coefficients.
    - `coef_`: posterior means in the units of the table, (coefficients,), or (classes,
      coefficients).
    - `intercept_`: the same of the intercept.
    - `coef_draws_`, `intercept_draws_`: posterior draws of both, draws first.
    - `inclusion_`: (coefficients,) probabilities that each belongs in the model; with
      prior="horseshoe" P(κ < 1/2), that each is shrunk by less than half, which may be above 1/2
      for noise.
    - `kept_`: (coefficients,) bool, the reported model. Select columns by it.
    - `delta_f_`: (coefficients,) nats.
    - `alike_`: groups of columns that are nearly the same, by their names.
    - `engine_`: which engine fitted it; `repr` says it too, and `summary().attrs["engine"]`.
    """

    prior: str
    engine: str | None
    steps: int | None
    draws: int
    random_state: Any

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        """The arguments that are not the default, and, after a fit, its engine."""
        said = super().__repr__(N_CHAR_MAX)
        return f"{said}, fitted by {self.engine_}" if hasattr(self, "engine_") else said

    def summary(self, level: float = 0.9) -> pd.DataFrame:
        """A row for each coefficient, in the units of its column: posterior mean, standard
        deviation, the ends of the central interval of `level`, the inclusion (`inclusion_`; its
        meaning depends on the prior, so select columns by `kept_`), and ΔF, the change of log
        evidence without it (nats; negative: it is needed).

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
        found = pd.DataFrame({**columns, "inclusion": inclusion, "delta_f": change}, index=index)
        found.attrs = {"prior": self.prior, "engine": self.engine_}
        return found

    def plot(self, X: Any = None, y: Any = None) -> Figure:
        """A figure: intervals of the coefficients, their probabilities of inclusion, and, with rows
        `X` and `y`, predictions against what was observed.
        """
        from pyro_bmr.estimators.pictures import figure_of

        check_is_fitted(self)
        check_rows(X, y)
        return figure_of(self, X, y)

    def to_arviz(self, X: Any = None, y: Any = None) -> Any:
        """The draws as an ArviZ `DataTree`, and, for rows `X` and `y`, their predictive draws, log
        likelihood and observed values; see `data_tree`. Needs the extra "arviz".
        """
        from pyro_bmr.estimators.inference_data import data_tree

        check_is_fitted(self)
        check_rows(X, y)
        return data_tree(self, X, y)

    def _table(self, X: Any, reset: bool) -> pd.DataFrame:
        """The rows as a DataFrame, checked against the training columns."""
        import pandas as pd

        if isinstance(X, pd.DataFrame):
            if reset and (twice := X.columns[X.columns.duplicated()].tolist()):
                raise TableError(f"X: expected columns of different names, got {twice[0]!r} twice")
            if X.columns.nlevels > 1:
                raise TableError(
                    f"X: expected names of one level, got {X.columns.nlevels}; join them into one"
                )
            with as_table_error("X"):
                validate_data(self, X, reset=reset, skip_check_array=True)
            if not len(X):
                raise TableError("X: expected at least one row, got 0")
            if reset and len(X) < 2:
                raise TableError(f"X: expected at least 2 rows, got n_samples = {len(X)}")
            if reset and not X.shape[1]:
                raise TableError(f"X: expected at least one column, got the shape {X.shape}")
            return X
        rules: dict[str, Any] = {"dtype": np.float64, "ensure_all_finite": "allow-nan"}
        if reset:
            rules["ensure_min_samples"] = 2
        with as_table_error("X"):
            array = validate_data(self, X, reset=reset, **rules)
        names = getattr(self, "feature_names_in_", None)
        if names is None:
            names = [f"x{k}" for k in range(array.shape[1])]
        given = np.asarray(X)
        if reset and given.dtype.kind in "iu":
            for name, column in zip(names, given.T, strict=True):
                check_told_apart(name, pd.Series(column))
        return pd.DataFrame(array, columns=names)

    def _fit_table(
        self, table: pd.DataFrame, y: Array, family: Family | None
    ) -> tuple[Average, Any]:
        """Finds `columns_`, and the posterior in the columns of the regression; also the family
        with its parameters.
        """
        _check_whole("draws", self.draws, 2)
        if self.steps is not None:
            _check_whole("steps", self.steps, 4)
        engine_of(self.prior, self.engine, 0, family is None)
        self.columns_: Columns = fit_columns(table)
        x, groups = self.columns_.matrix(table), self.columns_.groups
        self.engine_ = engine_of(self.prior, self.engine, x.shape[1], family is None)
        rng = np.random.default_rng(self.random_state)
        of = (
            linear_model(x, y, groups)
            if family is None
            else generalised_model(family, x, y, groups)
        )
        found, of = fitted(of, self.prior, self.engine_, self.steps, self.draws, rng)
        terms = self.columns_.terms
        same = alike(x, groups, found.inclusion)
        self.alike_ = [[terms[k].name for k in group] for group in same]
        if same:
            warn(
                f"{ALIKE}, |r| > 0.99: {alike_names(self.alike_)}. Their effect and their inclusion"
                " are shared among them: none may be kept although together they matter, or several"
                " where one would do. Leave out all but one of each group"
            )
        return found, None if isinstance(of, Regression) else of.family

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
        return self._encoded_rows(X)[0]

    def _encoded_rows(self, X: Any) -> tuple[Array, Array | float]:
        """The same, and the log exposure of each row, or 0."""
        check_is_fitted(self)
        table, log_exposure = split_exposure(self._table(X, reset=False), self._exposure())
        return self.columns_.encoded(table), log_exposure

    def _exposure(self) -> int | str | None:
        """The column with the exposure of each row, if the family has one."""
        return None


class _TableTypeError(TableError, TypeError):
    """Cells of objects that are no numbers; scikit-learn expects a TypeError."""


def check_rows(X: Any, y: Any, name: str = "y") -> None:
    """Raises a TableError if two tables have the same rows in another order; see `check_index`."""
    try:
        check_index(X, y, ("X", name))
    except DataError as error:
        raised = TableError(str(error))
        raise raised from None


@contextmanager
def as_table_error(argument: str) -> Iterator[None]:
    """Names the argument of an error of scikit-learn's checks, whose words its tests expect."""
    try:
        yield
    except TableError:
        raise
    except (TypeError, ValueError) as error:
        kind = _TableTypeError if isinstance(error, TypeError) else TableError
        raised = kind(f"{argument}: {error}")
        raise raised from None


def split_exposure(
    table: pd.DataFrame, exposure: int | str | None
) -> tuple[pd.DataFrame, Array | float]:
    """The table without the column `exposure`, and the logarithm of that column; a number that is
    no name of a column is its place.
    """
    import pandas as pd

    if exposure is None:
        return table, 0.0
    name: Any = exposure
    if exposure not in table.columns:
        places = range(-table.shape[1], table.shape[1])
        if not isinstance(exposure, int) or exposure not in places:
            names = ", ".join(map(str, table.columns[:10]))
            raise refused("exposure", f"a column of the table, {names}, or its place", exposure)
        name = table.columns[exposure]
    values = np.asarray(pd.to_numeric(table[name], errors="coerce"), dtype=np.float64)
    if not bool((np.isfinite(values) & (values > 0)).all()):
        raise TableError(
            f"X: expected a finite exposure > 0 in each row of the column {name!r}, got others;"
            " leave those rows out"
        )
    return table.drop(columns=name), np.log(values)


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not holds(lambda x: x >= least and x == int(x), value):
        raise refused(name, f"a whole number >= {least}", value)
