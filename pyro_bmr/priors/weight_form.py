r"""A prior written out: the weight as a product of scales with a standardised weight, and the
densities of all its sites, so that a fit needs neither Pyro nor autograd for them.

Owns `WeightForm`, `ScaleSite` and `form_of`. `fitting/written_weights.py` evaluates
forms; the `sample` of a prior declares the same sites. Next: `gaussian.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyro_bmr.priors.line_densities import Density
from pyro_bmr.priors.tiers import Tier


@dataclass(frozen=True)
class ScaleSite:
    """A site beside that of the weights: one number for each layer, unit, input or weight.

    `density`: of the site, on the unconstrained line. `power`: with which its value enters a
    product. `unit_interval`: whether the site is in (0, 1), and not positive.
    """

    name: str
    density: Density
    power: float = 1.0
    tier: Tier = "layer"
    block: int = 1
    unit_interval: bool = False


@dataclass(frozen=True)
class WeightForm:
    r"""The weight w as a product of scales, indicators z in (0, 1) and w̄, the site of the weights.

    .. math:: w = u\, g(\psi)\, \bar w \prod z, \qquad \psi = \psi_0 \prod_t x_t^{p_t},
        \qquad g(\psi) = \psi \;\text{ or, with a slab, }\; \frac{c\,\psi}{\sqrt{c^2 + \psi^2}}

    Without `factors` w = w̄.

    Args:
        unit, inner: u and ψ₀.
        factors: the scales x_t with their powers p_t, and the indicators.
        slab: c, a number or a site with its power; None for no slab.
        density: of w̄; None where it is a Gaussian that depends on no other site, so that its
            divergence has a closed form.
        others: the sites that enter densities alone, such as an inclusion probability.
    """

    unit: float = 1.0
    inner: float = 1.0
    factors: tuple[ScaleSite, ...] = ()
    slab: float | ScaleSite | None = None
    density: Density | None = None
    others: tuple[ScaleSite, ...] = ()

    @property
    def scale_sites(self) -> tuple[ScaleSite, ...]:
        """All sites but w̄."""
        slab = (self.slab,) if isinstance(self.slab, ScaleSite) else ()
        return (*self.factors, *slab, *self.others)


def form_of(prior: Any, name: str, shape: tuple[int, ...]) -> WeightForm | None:
    """The form of the site `name` with weights of `shape`: what `prior.form(name, shape)` gives.
    None without that method, or where a class has a `sample` of its own and inherits the form.
    """
    owners = [
        next((c for c in type(prior).__mro__ if method in vars(c)), None)
        for method in ("sample", "form")
    ]
    return prior.form(name, shape) if owners[0] is owners[1] is not None else None
