"""What is believed before the data: one family a file, each a frozen dataclass that declares sites
and names reductions.

A prior that is exported here is `bmr.priors.NAME`, and saved posteriors can name it.
"""

from pyro_bmr.priors.gaussian import Gaussian, Prior, ScaleMixture
from pyro_bmr.priors.horseshoe import Horseshoe
from pyro_bmr.priors.laplace import Laplace
from pyro_bmr.priors.spike_and_slab import SpikeAndSlab
from pyro_bmr.priors.student_t import StudentT

__all__ = [
    "Gaussian",
    "Horseshoe",
    "Laplace",
    "Prior",
    "ScaleMixture",
    "SpikeAndSlab",
    "StudentT",
]
