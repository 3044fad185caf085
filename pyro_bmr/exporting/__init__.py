"""From a posterior to plain torch, and from a network to a folder with all that it needs to run.

No file that is written here needs Pyro or this library to be read.
"""

from pyro_bmr.exporting.deployed_folder import load_network
from pyro_bmr.exporting.deployment import deploy
from pyro_bmr.exporting.plain_network import ensemble, export, point_weights
from pyro_bmr.exporting.weights_file import save

__all__ = ["deploy", "ensemble", "export", "load_network", "point_weights", "save"]
