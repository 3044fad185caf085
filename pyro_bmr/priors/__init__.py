"""What is believed before the data: one family a file, each a frozen dataclass that declares sites and names reductions."""

from pyro_bmr.priors.gaussian import Gaussian, Prior, ScaleMixture
from pyro_bmr.priors.horseshoe import Horseshoe
from pyro_bmr.priors.spike_and_slab import SpikeAndSlab

__all__ = ["Gaussian", "Horseshoe", "Prior", "ScaleMixture", "SpikeAndSlab"]
