"""An `nn.Module` as a Pyro program with one site per parameter, and without the wrappers around its
parameters.
"""

from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.networks.plain_module import plain_copy

__all__ = ["BayesianNetwork", "plain_copy"]
