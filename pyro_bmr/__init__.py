"""Bayesian deep learning with Pyro, sparse by Bayesian model reduction. The public names, in the
order of the pipeline.
"""

from typing import TYPE_CHECKING, Any

from pyro_bmr.curvatures import curvature
from pyro_bmr.data.data_set import Data
from pyro_bmr.data.named import load
from pyro_bmr.errors import PyroBMRError, PyroBMRWarning
from pyro_bmr.experiments.compare import compare
from pyro_bmr.experiments.settings import Settings
from pyro_bmr.experiments.study import study
from pyro_bmr.exporting import deploy, export, load_network, save
from pyro_bmr.fitting.checkpoints import Checkpoints
from pyro_bmr.fitting.convergence import UntilConverged
from pyro_bmr.fitting.fit import Fit, fit
from pyro_bmr.fitting.natural_gradient import natural_gradient
from pyro_bmr.fitting.optimizers import adam
from pyro_bmr.fitting.refit import refit
from pyro_bmr.formulas.gaussian import delta_f
from pyro_bmr.guides import (
    FullRank,
    LowRankPlusDiagonal,
    MatrixVariate,
    MeanField,
    Point,
    ScaleCoupled,
)
from pyro_bmr.likelihoods import Bernoulli, Categorical, NegativeBinomial, Normal, Ordinal, Poisson
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.post_training import Pruned, prune
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.site import Site
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.predict import predict
from pyro_bmr.priors import Gaussian, Horseshoe, Laplace, SpikeAndSlab, StudentT
from pyro_bmr.pruning import Every, Masked
from pyro_bmr.reduction.reduce import reduce
from pyro_bmr.reduction.result import Reduction
from pyro_bmr.shrinking import shrink

if TYPE_CHECKING:
    from pyro_bmr.estimators import SparseClassifier, SparseRegressor

__version__ = "0.2.0"

__all__ = [
    "BayesianNetwork",
    "Bernoulli",
    "Categorical",
    "Checkpoints",
    "Data",
    "Every",
    "Fit",
    "FullRank",
    "Gaussian",
    "Horseshoe",
    "Laplace",
    "LowRankPlusDiagonal",
    "Masked",
    "MatrixVariate",
    "MeanField",
    "NegativeBinomial",
    "Normal",
    "Ordinal",
    "Point",
    "Poisson",
    "Posterior",
    "Pruned",
    "PyroBMRError",
    "PyroBMRWarning",
    "Reduction",
    "ScaleCoupled",
    "Settings",
    "Site",
    "SparseClassifier",
    "SparseRegressor",
    "SpikeAndSlab",
    "StudentT",
    "UntilConverged",
    "adam",
    "compare",
    "curvature",
    "delta_f",
    "deploy",
    "export",
    "fit",
    "load",
    "load_network",
    "metrics",
    "natural_gradient",
    "predict",
    "prune",
    "reduce",
    "refit",
    "save",
    "shrink",
    "study",
]


def __getattr__(name: str) -> Any:
    """The estimators, with which scikit-learn is imported, only when they are asked for."""
    if name in ("SparseClassifier", "SparseRegressor"):
        from pyro_bmr import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
