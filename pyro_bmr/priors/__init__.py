"""What is believed before the data: one family a file, each a frozen dataclass that declares sites
and names reductions.

One line a prior: `as` makes the name public here, and saved posteriors know it again.
"""

from pyro_bmr.priors.gaussian import Gaussian as Gaussian
from pyro_bmr.priors.gaussian import Prior as Prior
from pyro_bmr.priors.gaussian import ScaleMixture as ScaleMixture
from pyro_bmr.priors.horseshoe import Horseshoe as Horseshoe
from pyro_bmr.priors.laplace import Laplace as Laplace
from pyro_bmr.priors.spike_and_slab import SpikeAndSlab as SpikeAndSlab
from pyro_bmr.priors.student_t import StudentT as StudentT
