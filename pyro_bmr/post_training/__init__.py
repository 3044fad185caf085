"""A trained network pruned without training: rounds of a Kronecker posterior, and Gauss–Newton
steps.
"""

from pyro_bmr.post_training.prune import PATH, prune
from pyro_bmr.post_training.pruned import Pruned

__all__ = ["PATH", "Pruned", "prune"]
