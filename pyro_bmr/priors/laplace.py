"""The Laplace prior, as in the Bayesian lasso.

Owns `Laplace`. Next: `student_t.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyro.distributions as dist
from torch import Tensor

from pyro_bmr.errors import ModelError
from pyro_bmr.priors.layer_scale import (
    check_scale,
    form_of_scaled,
    hyper_density,
    number,
    sample_scaled,
)
from pyro_bmr.priors.line_densities import WeightLaplace
from pyro_bmr.priors.mixing import mixing_grid
from pyro_bmr.priors.weight_form import WeightForm


@dataclass(frozen=True)
class Laplace:
    r"""w ~ Laplace(0, b), independently for each weight: all weights pulled to zero by the same
    force, whatever their size.

    .. math:: p(w) = \frac{1}{2b} e^{-|w|/b}, \qquad \mathrm{Var}(w) = 2b^2

    The most probable weights are those of the lasso (Tibshirani 1996, JRSS B 58(1)), and many of
    them are zero. The posterior is different: it shrinks large weights by a constant and small ones
    less than a horseshoe does, so a fit sets no weight to zero. Source: Park & Casella 2008, JASA
    103(482); `mixture` is their mixture over variances, v ~ Exponential with mean 2b². A fit uses
    the density above, without a variance for each weight.

    Args:
        scale: b, the mean of `|w|`; or ``"layer"`` (default) for b = c/√fan_in, c ~ C⁺(0, 1)
            inferred at the site `<name>_scale`. The site of the weights is then the standardised
            w̄ ~ Laplace(0, 1). As the target of a reduction b counts in units of the site, and
            ``"layer"`` has it found by its evidence.
    """

    scale: float | Literal["layer"] = "layer"
    shrinkage: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_scale("Laplace", self.scale)

    def sample(self, name: str, shape: tuple[int, ...], init: Tensor | None = None) -> Tensor:
        return sample_scaled(
            self,
            name,
            shape,
            init,
            self.scale,
            lambda scale: dist.Laplace(scale.new_zeros(()), scale),
        )

    def form(self, name: str, shape: tuple[int, ...]) -> WeightForm:
        """The weight and the densities of its sites, written out."""
        return form_of_scaled(name, shape, self.scale, WeightLaplace)

    def log_prob(self, w: Tensor) -> Tensor:
        """The log density of each weight, nats; a ModelError if the scale is not a number."""
        scale = w.new_tensor(number(self))
        return dist.Laplace(scale.new_zeros(()), scale).log_prob(w)

    def mixture(
        self, scale: float | None = None, together: int = 1, reach: float = 1e4
    ) -> tuple[np.ndarray, np.ndarray]:
        """Variances 2b²E with E ~ Exponential(1), and their log weights; b = `scale`, or the
        prior's own number.

        For a weight of size w, √v is within b of √(w b). The nodes are equidistant in log √v below
        b and in √v above, as far as weights of size `reach` · b need; a reduction warns of larger
        weights. `together`: how many weights share v; its posterior is as narrow as 1/√(2n) in
        log √v. `reduce` uses the closed form of a single weight, in `formulas/laplace.py`.

        Raises:
            ModelError: a million nodes would not be enough.
        """
        low, high, step = -23.0, math.sqrt(reach) + 9.0, 0.25 / math.sqrt(together)
        if not high - low < 1e6 * step:
            raise ModelError(
                f"Laplace.mixture: {together} weights that share a variance, {reach:.3g} times as"
                " large as b, need more than a million nodes"
            )

        def root(u: Any) -> Any:
            return np.logaddexp(0.0, u)  # √v in units of b: eᵘ below 1, u above

        nodes, log_weights = mixing_grid(
            lambda u: np.log(root(u)) - 0.5 * root(u) ** 2 - np.logaddexp(0.0, -u), low, high, step
        )
        return (number(self, scale) * root(nodes)) ** 2, log_weights

    @property
    def log_hyper(self) -> Callable[[float], float]:
        """The log density of the half-Cauchy hyper-prior on an inferred scale, up to a constant; an
        AttributeError if the scale is a number.
        """
        return hyper_density(self)
