"""Sparse regression and classification of tables, as scikit-learn's estimators."""

from pyro_bmr.estimators.classifier import SparseClassifier
from pyro_bmr.estimators.regressor import SparseRegressor

__all__ = ["SparseClassifier", "SparseRegressor"]
