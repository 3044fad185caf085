"""Half-Cauchy scales, drawn directly or as the root of a ratio of Gammas.

Owns the two parametrisations of `horseshoe.py`. Next: `mixing.py`.
"""

from __future__ import annotations

from typing import Literal

import pyro.distributions as dist
from torch import Tensor

from pyro_bmr.priors.tiers import Tier, sample_scales

Parametrization = Literal["half-cauchy", "gamma"]


def sample_half_cauchy(
    name: str,
    scale: Tensor,
    shape: tuple[int, ...],
    tier: Tier,
    block: int,
    parametrization: Parametrization,
) -> Tensor:
    r"""Half-Cauchy scales C⁺(0, `scale`) of a tier, spread so that they broadcast against a weight
    tensor of `shape`.

    ``"half-cauchy"``: the site `name`. ``"gamma"``: the sites `<name>_numerator` and
    `<name>_denominator`,

    .. math:: \lambda = \text{scale}\,\sqrt{a / b}, \qquad a, b \sim \mathrm{Gamma}(\tfrac12, 1),

    the same density in tails that a log-normal posterior follows more easily (Louizos, Ullrich &
    Welling 2017, arXiv 1705.08665).
    """
    if parametrization == "half-cauchy":
        return sample_scales(name, dist.HalfCauchy(scale), shape, tier, block)
    half = dist.Gamma(scale.new_tensor(0.5), scale.new_ones(()))
    numerator = sample_scales(f"{name}_numerator", half, shape, tier, block)
    denominator = sample_scales(f"{name}_denominator", half, shape, tier, block)
    return scale * (numerator / denominator).sqrt()
