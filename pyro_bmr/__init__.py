"""Bayesian deep learning with Pyro, sparse by Bayesian model reduction. The public names, in the order of the pipeline."""

from pyro_bmr import metrics
from pyro_bmr.comparison import compare
from pyro_bmr.data import load
from pyro_bmr.data_set import Data
from pyro_bmr.elbo import elbo_terms
from pyro_bmr.errors import DataError, FitError, ModelError, PyroBMRError, ReductionError, ShrinkError
from pyro_bmr.exporting import deploy, ensemble, export, save
from pyro_bmr.fitting import Fit, adam, cosine, fit
from pyro_bmr.guides import FullRank, LowRankPlusDiagonal, MatrixVariate, MeanField, Point, ScaleCoupled
from pyro_bmr.likelihoods import Categorical, Normal
from pyro_bmr.networks import BayesianNetwork
from pyro_bmr.online_newton import natural_gradient
from pyro_bmr.posterior import Posterior
from pyro_bmr.prediction import predict
from pyro_bmr.priors import Gaussian, Horseshoe, Laplace, Prior, SpikeAndSlab, StudentT
from pyro_bmr.pruning import Every, Masked
from pyro_bmr.reduction.exponential_family import natural_delta_f
from pyro_bmr.reduction.gaussian import Dense, Diagonal, delta_f, prune_subset, reduced_posterior
from pyro_bmr.reduction.groups import Block, NofM
from pyro_bmr.reduction.low_rank import LowRank
from pyro_bmr.reduction.matrix_normal import MatrixNormal
from pyro_bmr.reduction.outcome import Reduction
from pyro_bmr.reduction.search import Search, exhaustive_search, greedy_search
from pyro_bmr.reduction.sites import reduce
from pyro_bmr.refitting import Refit, refit
from pyro_bmr.shrinking import ShrinkPlan, shrink, shrink_plan

__version__ = "0.1.0"

__all__ = [
    "BayesianNetwork",
    "Block",
    "Categorical",
    "Data",
    "DataError",
    "Dense",
    "Diagonal",
    "Every",
    "Fit",
    "FitError",
    "FullRank",
    "Gaussian",
    "Horseshoe",
    "Laplace",
    "LowRank",
    "LowRankPlusDiagonal",
    "Masked",
    "MatrixNormal",
    "MatrixVariate",
    "MeanField",
    "ModelError",
    "NofM",
    "Normal",
    "Point",
    "Posterior",
    "Prior",
    "PyroBMRError",
    "Reduction",
    "ReductionError",
    "Refit",
    "ScaleCoupled",
    "Search",
    "ShrinkError",
    "ShrinkPlan",
    "SpikeAndSlab",
    "StudentT",
    "adam",
    "compare",
    "cosine",
    "delta_f",
    "deploy",
    "elbo_terms",
    "ensemble",
    "exhaustive_search",
    "export",
    "fit",
    "greedy_search",
    "load",
    "metrics",
    "natural_delta_f",
    "natural_gradient",
    "predict",
    "prune_subset",
    "reduce",
    "reduced_posterior",
    "refit",
    "save",
    "shrink",
    "shrink_plan",
]  # fmt: skip
