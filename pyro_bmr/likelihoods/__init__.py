"""How a network's output meets the data: one family a file. A likelihood owns the plate over the
data, and with it the number of rows N.
"""

from pyro_bmr.likelihoods.categorical import Categorical
from pyro_bmr.likelihoods.likelihood import Likelihood, data_plate
from pyro_bmr.likelihoods.normal import Normal

__all__ = ["Categorical", "Likelihood", "Normal", "data_plate"]
