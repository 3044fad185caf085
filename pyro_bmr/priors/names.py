"""The priors by the names that the command line and study files use.

Owns `PRIORS` and `prior_from_name`. Next: `likelihoods/likelihood.py`.
"""

from __future__ import annotations

from pyro_bmr.errors import ModelError
from pyro_bmr.priors.gaussian import Gaussian, Prior
from pyro_bmr.priors.horseshoe import Horseshoe
from pyro_bmr.priors.laplace import Laplace
from pyro_bmr.priors.spike_and_slab import SpikeAndSlab
from pyro_bmr.priors.student_t import StudentT

PRIORS: dict[str, Prior] = {
    "gaussian": Gaussian(),
    "gaussian:layer": Gaussian("layer"),
    "gaussian:unit": Gaussian("layer", per="unit"),
    "gaussian:input": Gaussian("layer", per="input"),
    "gaussian:weight": Gaussian("layer", per="weight"),
    "gaussian:pretrained": Gaussian(mean="init"),
    "laplace": Laplace(),
    "student-t": StudentT(),
    "horseshoe": Horseshoe(),
    "horseshoe:unit": Horseshoe(tiers=("layer", "unit")),
    "horseshoe:input": Horseshoe(tiers=("layer", "input")),
    "horseshoe:tiered": Horseshoe.tiered(),
    "spike-and-slab": SpikeAndSlab(),
    "spike-and-slab:relaxed": SpikeAndSlab(temperature=0.5),
    "spike-and-slab:unit": SpikeAndSlab(temperature=0.5, per="unit"),
}


def prior_from_name(name: str) -> Prior:
    """A prior by its name; ``gaussian:0.1`` is `Gaussian(scale=0.1)`.

    Raises:
        ModelError: there is no such prior.
    """
    if name in PRIORS:
        return PRIORS[name]
    family, _, number = name.partition(":")
    try:
        if family == "gaussian":
            return Gaussian(float(number))
    except ValueError:
        pass
    raise ModelError(
        f"no prior '{name}'; the priors are: {', '.join(PRIORS)} and gaussian:SCALE with a number"
    )
