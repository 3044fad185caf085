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
from pyro_bmr.estimators.columns import contrasts
from pyro_bmr.estimators.families import Bernoulli, Categorical, Family
from pyro_bmr.estimators.subset_evidence import Array
from pyro_bmr.estimators.table_model import TableModel

_ROWS = 1024  # predicted at once


class SparseClassifier(ClassifierMixin, TableModel):
    """Which columns of a table predict a class, by the evidence of models with and without each.

    Logistic regression for two classes, softmax regression for more; a column is kept or pruned for
    all classes together. Tables, priors and attributes are as for `SparseRegressor`; `coef_` has
    the shape (coefficients,) for two classes and (classes, coefficients) for more.

    Args:
        prior: "spike-and-slab" or "gaussian".
        steps: of each of two runs of the search; by default 200.
        draws: of the posterior, that are kept.
        random_state: a seed, or None for another result each time.

    Raises:
        TableError: a column, the target or an option cannot be used.

    Example:
        >>> model = SparseClassifier().fit(table.drop(columns="species"), table["species"])
        >>> model.predict_proba(new)
    """

    def __init__(
        self,
        *,
        prior: str = "spike-and-slab",
        steps: int | None = None,
        draws: int = 2000,
        random_state: Any = 0,
    ) -> None:
        self.prior = prior
        self.steps = steps
        self.draws = draws
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SparseClassifier:
        """Fits; `X` is a DataFrame or an array (rows, columns), `y` (rows,) names the classes."""
        import pandas as pd

        if y is None:
            raise TableError(
                "y: expected a target; requires y to be passed, but the target y is None"
            )
        table = self._table(X, reset=True)
        y = column_or_1d(y, warn=True)
        if missing := int(pd.isna(y).sum()):
            raise TableError(
                f"y: expected a class in each row, got {missing} missing: contains NaN"
            )
        check_classification_targets(y)
        check_consistent_length(X, y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        count = len(self.classes_)
        if count < 2:
            raise TableError(
                f"y: expected at least two classes, got one class, {self.classes_[0]!r}"
            )
        family: Family = Bernoulli() if count == 2 else Categorical(contrasts(count))
        found = self._fit_table(table, labels.astype(np.float64), family)
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
        found = np.empty((len(encoded), len(self.classes_)))
        for at in range(0, len(encoded), _ROWS):
            part = encoded[at : at + _ROWS]
            if len(self.classes_) == 2:
                eta = part @ self.coef_draws_.T + self.intercept_draws_
                high = Bernoulli().mean(eta[..., None]).mean(1)
                found[at : at + _ROWS] = np.stack([1 - high, high], 1)
            else:
                total = np.zeros((len(part), len(self.classes_)))
                for b, intercept in zip(self.coef_draws_, self.intercept_draws_, strict=True):
                    eta = part @ b.T + intercept
                    grown = np.exp(eta - eta.max(1, keepdims=True))
                    total += grown / grown.sum(1, keepdims=True)
                found[at : at + _ROWS] = total / len(self.coef_draws_)
        return found

    def predict(self, X: Any) -> Any:
        """The most probable class, (rows,)."""
        probability = self.predict_proba(X)
        return self.classes_[probability.argmax(1)]

    def _pointwise(self, X: Any, y: Any) -> tuple[Array, Array, Array]:
        """Log probability of the class of each row and a class drawn anew, (draws, rows), and the
        numbers of the classes of `y`.
        """
        check_consistent_length(X, y)
        known = {name: k for k, name in enumerate(self.classes_.tolist())}
        if unknown := set(np.asarray(y).tolist()) - set(known):
            raise TableError(f"y: expected the classes of the fit, got {sorted(unknown)[0]!r}")
        labels = np.array([known[name] for name in np.asarray(y).tolist()])
        encoded = self._encoded(X)
        if len(known) == 2:
            eta = self.coef_draws_ @ encoded.T + self.intercept_draws_[:, None]
            logits = np.stack([np.zeros_like(eta), eta], -1)
        else:
            logits = (
                np.swapaxes(self.coef_draws_ @ encoded.T, 1, 2) + self.intercept_draws_[:, None]
            )
        log_p = logits - np.logaddexp.reduce(logits, -1)[..., None]
        each = log_p[:, np.arange(len(labels)), labels]
        below = np.exp(log_p).cumsum(-1)
        uniform = np.random.default_rng(self.random_state).random(each.shape)
        new = (uniform[..., None] > below[..., :-1]).sum(-1)
        return each, new, labels
