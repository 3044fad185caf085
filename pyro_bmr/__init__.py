"""Bayesian deep learning with Pyro, sparse by Bayesian model reduction. The public names, in the order of the pipeline."""

from pyro_bmr import metrics
from pyro_bmr.comparison import compare
from pyro_bmr.data import Data, load
from pyro_bmr.deployment import deploy
from pyro_bmr.elbo import elbo_terms
from pyro_bmr.errors import DataError, FitError, ModelError, PyroBMRError, ReductionError, ShrinkError
from pyro_bmr.exporting import ensemble, export, save
from pyro_bmr.fitting import Fit, adam, cosine, fit
from pyro_bmr.guides import MeanField, Point
from pyro_bmr.likelihoods import Categorical, Normal
from pyro_bmr.networks import BayesianNetwork
from pyro_bmr.posterior import Posterior
from pyro_bmr.prediction import predict
from pyro_bmr.priors import Gaussian, Horseshoe, Prior, SpikeAndSlab
from pyro_bmr.pruning import Every, Masked
from pyro_bmr.reduction.exponential_family import natural_delta_f
from pyro_bmr.reduction.gaussian import Dense, Diagonal, delta_f, prune_subset, reduced_posterior
from pyro_bmr.reduction.low_rank import LowRank
from pyro_bmr.reduction.matrix_normal import MatrixNormal
from pyro_bmr.reduction.sites import Reduction, reduce
from pyro_bmr.shrinking import ShrinkPlan, shrink, shrink_plan

__version__ = "0.1.0"

__all__ = [
    "BayesianNetwork",
    "Categorical",
    "Data",
    "DataError",
    "Dense",
    "Diagonal",
    "Every",
    "Fit",
    "FitError",
    "Gaussian",
    "Horseshoe",
    "LowRank",
    "Masked",
    "MatrixNormal",
    "MeanField",
    "ModelError",
    "Normal",
    "Point",
    "Posterior",
    "Prior",
    "PyroBMRError",
    "Reduction",
    "ReductionError",
    "ShrinkError",
    "ShrinkPlan",
    "SpikeAndSlab",
    "adam",
    "compare",
    "cosine",
    "delta_f",
    "deploy",
    "elbo_terms",
    "ensemble",
    "export",
    "fit",
    "load",
    "metrics",
    "natural_delta_f",
    "predict",
    "prune_subset",
    "reduce",
    "reduced_posterior",
    "save",
    "shrink",
    "shrink_plan",
]  # fmt: skip
