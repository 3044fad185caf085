"""A trained network pruned without labels: rounds of a Kronecker posterior, and steps towards the
dense network.
"""

from pyro_bmr.post_training.prune import PATH, prune
from pyro_bmr.post_training.pruned import Pruned

__all__ = ["PATH", "Pruned", "prune"]
