"""The one training loop and what it is made of: objective, steps, processes, checkpoints."""

from pyro_bmr.fitting.elbo import elbo_terms
from pyro_bmr.fitting.optimizers import cosine
from pyro_bmr.fitting.refit import Refit

__all__ = ["Refit", "cosine", "elbo_terms"]
