"""How a network's output meets the data: one family a file. A likelihood owns the plate over the
data, and with it the number of rows N.
"""

from pyro_bmr.likelihoods.bernoulli import Bernoulli
from pyro_bmr.likelihoods.categorical import Categorical
from pyro_bmr.likelihoods.ignored import Ignoring
from pyro_bmr.likelihoods.likelihood import Likelihood, data_plate
from pyro_bmr.likelihoods.negative_binomial import NegativeBinomial
from pyro_bmr.likelihoods.normal import Normal
from pyro_bmr.likelihoods.ordinal import Ordinal
from pyro_bmr.likelihoods.poisson import Poisson
from pyro_bmr.likelihoods.student_t import StudentT
from pyro_bmr.likelihoods.weighted import Weighted

__all__ = [
    "Bernoulli",
    "Categorical",
    "Ignoring",
    "Likelihood",
    "NegativeBinomial",
    "Normal",
    "Ordinal",
    "Poisson",
    "StudentT",
    "Weighted",
    "data_plate",
]
