"""`SparseClassifier`: a sparse logistic regression on the columns of a table. Next:
`pictures.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, column_or_1d

from pyro_bmr.data.table_encoding import TableError
from pyro_bmr.estimators.class_families import Categorical
from pyro_bmr.estimators.declared_family import CLASSES, class_family, declared
from pyro_bmr.estimators.subset_evidence import Array
from pyro_bmr.estimators.table_model import TableModel, as_table_error, check_rows

_ROWS = 1024  # predicted at once
_DRAWS = 100  # used at once
_LEAST = 1e-300  # probability


class SparseClassifier(ClassifierMixin, TableModel):
    """Which columns of a table predict a class, by the evidence of models with and without each.

    Logistic regression for two classes, softmax regression for more; a column is kept or pruned for
    all classes together. Classes in an order, family="ordinal", have one coefficient for each
    column: the larger the sum, the higher the class. Tables, priors, engines and attributes are as
    for `SparseRegressor`; `coef_` has the shape (coefficients,) for two classes or an order, and
    (classes, coefficients) else.

    Args:
        family: "categorical", "bernoulli" (two classes) or "ordinal"; or ``bmr.Categorical()``,
            ``bmr.Bernoulli()``, ``bmr.Ordinal(5)``. The order is that of an ordered pandas
            category, or that of the sorted classes; `classes_` has it.
        prior, engine, steps, draws, random_state: as for `SparseRegressor`.

    Raises:
        TableError: a column, the target or an option cannot be used.

    Example:
        >>> model = SparseClassifier().fit(table.drop(columns="species"), table["species"])
        >>> model.predict_proba(new)
    """

    def __init__(
        self,
        *,
        family: Any = "categorical",
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

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # one sum for all classes cannot tell classes apart that have no order
        tags.classifier_tags.poor_score = "ordinal" in str(self.family).lower()
        return tags

    def fit(self, X: Any, y: Any) -> SparseClassifier:
        """Fits; `X` is a DataFrame or an array (rows, columns), `y` (rows,) names the classes."""
        import pandas as pd

        check_rows(X, y)
        if y is None:
            raise TableError(
                "y: expected a target; requires y to be passed, but the target y is None"
            )
        name, likelihood = declared(self.family, CLASSES)
        table = self._table(X, reset=True)
        order = _order(y) if name == "ordinal" else None
        with as_table_error("y"):
            y = column_or_1d(y, warn=True)
        if missing := int(pd.isna(y).sum()):
            raise TableError(
                f"y: expected a class in each row, got {missing} missing: contains NaN"
            )
        with as_table_error("y"):
            check_consistent_length(X, y)
            _check_kinds(y)
            check_classification_targets(y)
        self.classes_, labels = _labels(y, order)
        count = len(self.classes_)
        if count < 2:
            raise TableError(
                f"y: expected at least two classes, got one class, {self.classes_[0]!r}"
            )
        family = class_family(name, likelihood, count)
        found, self.family_ = self._fit_table(table, labels.astype(np.float64), family)
        parts = self._store(found, family.predictors)
        if isinstance(family, Categorical):
            intercept, coefficients, intercepts, draws = parts
            self.intercept_: Any = intercept @ family.basis.T
            self.intercept_draws_ = intercepts @ family.basis.T
            self.coef_, self.coef_draws_ = family.basis @ coefficients, family.basis @ draws
        else:
            self.intercept_, self.coef_ = float(parts[0][0]), parts[1][0]
            self.intercept_draws_, self.coef_draws_ = parts[2][:, 0], parts[3][:, 0]
        return self

    def predict_proba(self, X: Any) -> Array:
        """The posterior mean of each class's probability, (rows, classes)."""
        encoded = self._encoded(X)
        parts = np.array_split(encoded, max(1, -(-len(encoded) // _ROWS)))
        return np.concatenate([self._mean_probabilities(part) for part in parts])

    def _mean_probabilities(self, encoded: Array) -> Array:
        total = np.zeros((len(encoded), len(self.classes_)))
        draws = np.array_split(np.arange(self.draws), max(1, self.draws // _DRAWS))
        for some in draws:
            total += self._probabilities(encoded, some).sum(0)
        return total / len(self.coef_draws_)

    def _probabilities(self, encoded: Array, draws: Any) -> Array:
        """(draws, rows, classes)."""
        b, own = self.coef_draws_[draws], self.intercept_draws_[draws]
        if b.ndim == 2:
            eta = (b @ encoded.T + own[:, None])[..., None]
        else:
            logits = np.swapaxes(b @ encoded.T, 1, 2) + own[:, None]
            eta = logits @ self.family_.basis
        found: Array = self.family_.probabilities(eta)
        return found

    def predict(self, X: Any) -> Any:
        """The most probable class, (rows,)."""
        probability = self.predict_proba(X)
        return self.classes_[probability.argmax(1)]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of rows whose class is predicted."""
        check_rows(X, y)
        check_rows(X, sample_weight, "sample_weight")
        return float(super().score(X, y, sample_weight))

    def _pointwise(self, X: Any, y: Any) -> tuple[Array, Array, Array]:
        """Log probability of the class of each row and a class drawn anew, (draws, rows), and the
        numbers of the classes of `y`.
        """
        check_consistent_length(X, y)
        known = {name: k for k, name in enumerate(self.classes_.tolist())}
        if unknown := set(np.asarray(y).tolist()) - set(known):
            raise TableError(f"y: expected the classes of the fit, got {sorted(unknown)[0]!r}")
        labels = np.array([known[name] for name in np.asarray(y).tolist()])
        p = self._probabilities(self._encoded(X), slice(None))
        each = np.log(np.maximum(p[:, np.arange(len(labels)), labels], _LEAST))
        uniform = np.random.default_rng(self.random_state).random(each.shape)
        new = (uniform[..., None] > p.cumsum(-1)[..., :-1]).sum(-1)
        return each, new, labels


def _check_kinds(y: Any) -> None:
    """Raises a TableError unless the classes can be told apart and sorted."""
    try:
        np.unique(y)
    except (TypeError, ValueError):
        kinds = ", ".join(sorted({type(value).__name__ for value in y})[:5])
        raise TableError(
            f"y: expected classes of one kind, numbers or texts, got {kinds}; make texts of them,"
            " y.astype(str)"
        ) from None


def _order(y: Any) -> Any:
    """The categories of an ordered category of pandas, those that occur, or None."""
    found = getattr(getattr(y, "cat", y), "categories", None)
    if found is None or not getattr(getattr(y, "cat", y), "ordered", False):
        return None
    seen = set(np.asarray(y).tolist())
    return np.array([value for value in found.tolist() if value in seen])


def _labels(y: Any, order: Any) -> tuple[Any, Any]:
    """The classes in order, and the number of each row's class."""
    classes, labels = np.unique(y, return_inverse=True)
    if order is None:
        return classes, labels
    place = {value: k for k, value in enumerate(order.tolist())}
    return order, np.array([place[value] for value in classes.tolist()])[labels]
