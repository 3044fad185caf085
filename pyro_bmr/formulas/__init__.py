"""The mathematics of reduction: tensors in, tensors out, and torch alone. One formula or structure
a file.
"""

from pyro_bmr.formulas import matrix_blocks as matrix_blocks  # registers its forms
from pyro_bmr.formulas.dense import Dense
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.exponential_family import natural_delta_f, natural_posterior
from pyro_bmr.formulas.gaussian import prune_subset, reduced_posterior
from pyro_bmr.formulas.held_entries import HeldAtZero, held_at_zero
from pyro_bmr.formulas.held_evidence import Bounds, held_delta_f, held_var
from pyro_bmr.formulas.held_matrix_normal import HeldMatrixNormal
from pyro_bmr.formulas.laplace_evidence import LaplaceEvidence
from pyro_bmr.formulas.low_rank import LowRank
from pyro_bmr.formulas.matrix_normal import MatrixNormal
from pyro_bmr.formulas.message import Message, message
from pyro_bmr.formulas.monte_carlo import MonteCarlo, log_ratio_delta_f, monte_carlo_delta_f
from pyro_bmr.formulas.relevance import best_var
from pyro_bmr.formulas.scale_mixture import scale_mixture_reduction
from pyro_bmr.formulas.spike_and_slab import exact_inclusion

__all__ = [
    "Bounds",
    "Dense",
    "Diagonal",
    "HeldAtZero",
    "HeldMatrixNormal",
    "LaplaceEvidence",
    "LowRank",
    "MatrixNormal",
    "Message",
    "MonteCarlo",
    "best_var",
    "exact_inclusion",
    "held_at_zero",
    "held_delta_f",
    "held_var",
    "log_ratio_delta_f",
    "message",
    "monte_carlo_delta_f",
    "natural_delta_f",
    "natural_posterior",
    "prune_subset",
    "reduced_posterior",
    "scale_mixture_reduction",
]
