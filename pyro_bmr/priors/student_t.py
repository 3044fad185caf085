"""The Student-t prior: near zero like a Gaussian, with heavier tails.

Owns `StudentT`. Next: `horseshoe.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import pyro.distributions as dist
from torch import Tensor

from pyro_bmr.checks import check_arguments
from pyro_bmr.errors import holds
from pyro_bmr.priors.layer_scale import (
    check_scale,
    form_of_scaled,
    hyper_density,
    number,
    sample_scaled,
)
from pyro_bmr.priors.line_densities import WeightStudentT
from pyro_bmr.priors.mixing import mixing_grid
from pyro_bmr.priors.weight_form import WeightForm


@dataclass(frozen=True)
class StudentT:
    r"""w ~ t_ν(0, s), independently for each weight: like a Gaussian near zero, and hardly shrunk
    far from it.

    .. math:: p(w) = \frac{\Gamma(\frac{\nu + 1}{2})}{\Gamma(\frac\nu2)\sqrt{\nu\pi}\,
        s}\left(1 + \frac{w^2}{\nu s^2}\right)^{-\frac{\nu + 1}{2}},
        \qquad \mathrm{Var}(w) = \frac{\nu s^2}{\nu - 2} \text{ for } \nu > 2

    A fit sets no weight to zero. Source: Gelman, Jakulin, Pittau & Su 2008, Annals of
    Applied Statistics 2(4); as a mixture over precisions Tipping 2001, JMLR 1. A fit uses the
    density. The same prior with a site for the precision of each weight is ``Gaussian("layer",
    per="weight", concentration=df / 2, rate=df / 2)``.

    Args:
        df: ν, the degrees of freedom: 1 is a Cauchy, above 30 it is practically a Gaussian.
            Default 4.
        scale: s, the typical size of a weight; or ``"layer"`` (default) for s = c/√fan_in, c ~
            C⁺(0, 1) inferred at the site `<name>_scale`. The site of the weights is then the
            standardised w̄ ~ t_ν(0, 1). As the target of a reduction s counts in units of the site,
            and ``"layer"`` has it found by its evidence.
    """

    df: float = 4.0
    scale: float | Literal["layer"] = "layer"
    shrinkage: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_arguments(
            "StudentT",
            holds(lambda x: 0 < x < math.inf, self.df),
            "a finite number > 0, the degrees of freedom",
            df=self.df,
        )
        check_scale("StudentT", self.scale)

    def sample(self, name: str, shape: tuple[int, ...], init: Tensor | None = None) -> Tensor:
        return sample_scaled(
            self,
            name,
            shape,
            init,
            self.scale,
            lambda scale: dist.StudentT(scale.new_tensor(self.df), scale.new_zeros(()), scale),
        )

    def form(self, name: str, shape: tuple[int, ...]) -> WeightForm:
        """The weight and the densities of its sites, written out."""
        return form_of_scaled(name, shape, self.scale, partial(WeightStudentT, self.df))

    def log_prob(self, w: Tensor) -> Tensor:
        """The log density of each weight, nats; a ModelError if the scale is not a number."""
        scale = w.new_tensor(number(self))
        return dist.StudentT(scale.new_tensor(self.df), scale.new_zeros(()), scale).log_prob(w)

    def mixture(
        self, scale: float | None = None, together: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Variances s²/g with g ~ Gamma(ν/2, ν/2), and their log weights; s = `scale`, or the
        prior's own number. Right for weights up to 10¹⁰ s.

        `together`: how many weights share g, whose posterior is as narrow as √(2/(ν + n)) in its
        logarithm.
        """
        half = self.df / 2
        step = min(0.25, 0.6 / math.sqrt(half + (together - 1) / 2))
        # g is below with probability < 1e-18, or as far out as floats allow
        low = max(min(-42.0 / half - 12 / math.sqrt(half), -60.0), -600.0)
        nodes, log_weights = mixing_grid(
            lambda u: half * (u - np.exp(u)), low, math.log1p(60 / half), step
        )
        return number(self, scale) ** 2 * np.exp(-nodes), log_weights

    @property
    def log_hyper(self) -> Callable[[float], float]:
        """The log density of the half-Cauchy hyper-prior on an inferred scale, up to a constant; an
        AttributeError if the scale is a number.
        """
        return hyper_density(self)
