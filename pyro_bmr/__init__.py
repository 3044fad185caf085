"""Bayesian deep learning with Pyro, sparse by Bayesian model reduction. The public names, in the
order of the pipeline.
"""

from pyro_bmr.data.data_set import Data
from pyro_bmr.data.named import load
from pyro_bmr.errors import (
    DataError,
    FitError,
    ModelError,
    PyroBMRError,
    PyroBMRWarning,
    ReductionError,
    ShrinkError,
)
from pyro_bmr.experiments.cells import Settings
from pyro_bmr.experiments.compare import compare
from pyro_bmr.experiments.study import StudyResults, study
from pyro_bmr.exporting import deploy, ensemble, export, save
from pyro_bmr.fitting.checkpoints import Checkpoints
from pyro_bmr.fitting.elbo import elbo_terms
from pyro_bmr.fitting.fit import Fit, adam, cosine, fit
from pyro_bmr.fitting.natural_gradient import natural_gradient
from pyro_bmr.fitting.refit import Refit, refit
from pyro_bmr.formulas.exponential_family import natural_delta_f, natural_posterior
from pyro_bmr.formulas.gaussian import (
    Dense,
    Diagonal,
    Message,
    delta_f,
    message,
    prune_subset,
    reduced_posterior,
)
from pyro_bmr.formulas.low_rank import LowRank
from pyro_bmr.formulas.matrix_normal import MatrixNormal
from pyro_bmr.formulas.monte_carlo import MonteCarlo, log_ratio_delta_f, monte_carlo_delta_f
from pyro_bmr.formulas.relevance import best_var
from pyro_bmr.formulas.scale_mixture import scale_mixture_reduction
from pyro_bmr.formulas.spike_and_slab import exact_inclusion
from pyro_bmr.guides import (
    FullRank,
    LowRankPlusDiagonal,
    MatrixVariate,
    MeanField,
    Point,
    ScaleCoupled,
)
from pyro_bmr.likelihoods import Categorical, Normal
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.site import Site
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.calibration import best_temperature, best_widening
from pyro_bmr.prediction.paired_losses import PairedLoss, paired_loss
from pyro_bmr.prediction.predict import predict
from pyro_bmr.priors import (
    Gaussian,
    Horseshoe,
    Laplace,
    Prior,
    ScaleMixture,
    SpikeAndSlab,
    StudentT,
)
from pyro_bmr.pruning import Every, Masked
from pyro_bmr.reduction.groups import Block, NofM
from pyro_bmr.reduction.programs import ScaleFlow, log_prior_ratio, reduction_program
from pyro_bmr.reduction.reduce import reduce
from pyro_bmr.reduction.result import Reduction
from pyro_bmr.reduction.search import Search, exhaustive_search, greedy_search
from pyro_bmr.reduction.slabs import shared_inclusion
from pyro_bmr.shrinking import ShrinkPlan, shrink, shrink_plan

__version__ = "0.2.0"

__all__ = [
    "BayesianNetwork",
    "Block",
    "Categorical",
    "Checkpoints",
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
    "Message",
    "ModelError",
    "MonteCarlo",
    "NofM",
    "Normal",
    "PairedLoss",
    "Point",
    "Posterior",
    "Prior",
    "PyroBMRError",
    "PyroBMRWarning",
    "Reduction",
    "ReductionError",
    "Refit",
    "ScaleCoupled",
    "ScaleFlow",
    "ScaleMixture",
    "Search",
    "Settings",
    "ShrinkError",
    "ShrinkPlan",
    "Site",
    "SpikeAndSlab",
    "StudentT",
    "StudyResults",
    "adam",
    "best_temperature",
    "best_var",
    "best_widening",
    "compare",
    "cosine",
    "delta_f",
    "deploy",
    "elbo_terms",
    "ensemble",
    "exact_inclusion",
    "exhaustive_search",
    "export",
    "fit",
    "greedy_search",
    "load",
    "log_prior_ratio",
    "log_ratio_delta_f",
    "message",
    "metrics",
    "monte_carlo_delta_f",
    "natural_delta_f",
    "natural_gradient",
    "natural_posterior",
    "paired_loss",
    "predict",
    "prune_subset",
    "reduce",
    "reduced_posterior",
    "reduction_program",
    "refit",
    "save",
    "scale_mixture_reduction",
    "shared_inclusion",
    "shrink",
    "shrink_plan",
    "study",
]  # fmt: skip
