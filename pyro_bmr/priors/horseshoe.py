"""The (regularised) horseshoe prior, over tiers of scales.

Owns `Horseshoe`. Its exact reduction is in `formulas/scale_mixture.py`. Next: `spike_and_slab.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bmr.checks import check_arguments
from pyro_bmr.errors import described, holds
from pyro_bmr.formulas.occams_window import window_shift
from pyro_bmr.priors.gaussian import SCALES, fan_in, has_square, sample_normal
from pyro_bmr.priors.half_cauchy import (
    Parametrization,
    half_cauchy_divergence,
    half_cauchy_factors,
    sample_half_cauchy,
)
from pyro_bmr.priors.line_densities import LogGamma
from pyro_bmr.priors.tiers import TIERS, Tier, check_tier, spread, tier_parts
from pyro_bmr.priors.weight_form import ScaleSite, WeightForm

SITES: dict[Tier, str] = {"layer": "tau", "unit": "unit", "input": "input", "weight": "lambda"}
"""Tier → the site of its scales, `<name>_tau` and so on."""
_NOISE = 0.02  # nats
_PARAMETRIZATIONS = get_args(Parametrization)


@dataclass(frozen=True)
class Horseshoe:
    r"""w = γ w̄, w̄ ~ N(0, 1): a few weights are free, all others are shrunk to zero.

    .. math:: \psi = \tau \prod_t \lambda^{(t)} / \sqrt{\text{fan in}}, \quad
        \gamma^2 = \frac{c^2\psi^2}{c^2 + \psi^2}, \quad
        \tau \sim C^+(0, \tau_0), \; \lambda^{(t)} \sim C^+(0, 1)

    where c is in units of 1/√fan_in too, and the tiers t have one λ⁽ᵗ⁾ for each unit, input or
    weight. The site is w̄, so pruning w̄ prunes w. The scales are the sites `<name>_tau`,
    `<name>_unit`, `<name>_input` and `<name>_lambda`. Sources: Carvalho, Polson & Scott 2010,
    Biometrika 97(2); Piironen & Vehtari 2017, EJS 11(2) (the slab); Louizos, Ullrich & Welling
    2017, arXiv 1705.08665, and Ghosh, Yao & Doshi-Velez 2019, JMLR 20 (units).

    As the target of a reduction, the scales are in units of the site: v = c²τ²λ²/(c² + τ²λ²). The
    reduction is exact by quadrature over one λ, and the evidence determines τ. That covers λ per
    weight with τ per layer (the default) or per unit (tiers ``("unit", "weight")``), and λ per
    unit. `reduction_program` fits other tiers, and an inferred slab.

    A group prior is a horseshoe without the tier ``"weight"``: ``tiers=("layer", "unit")`` prunes
    whole units or output channels, ``"input"`` whole inputs or input channels. `block` makes the
    groups wider, such as the rows of an attention head.

    Args:
        tau0: the scale of τ, and τ itself without the tier ``"layer"``. Choose it small if few
            weights are expected to matter (`from_active` computes it). Default 1: the data
            determine τ.
        slab_scale: c, the size that a weight which escapes the shrinkage may reach; None for no
            slab. Default 2.
        tiers: what has a scale of its own, any of ``"layer"``, ``"unit"``, ``"input"``,
            ``"weight"``. Default: layer and weight.
        slab_df: None (default) for c = `slab_scale`; a number ν to infer one c per tensor, c⁻² ~
            Gamma(ν/2, ν·slab_scale²/2) at the site `<name>_slab_precision`, which makes the slab a
            Student-t with ν degrees of freedom.
        block: how many neighbouring units or inputs share the scale of their tier.
        parametrization: how half-Cauchys are drawn: ``"half-cauchy"`` (default), or ``"gamma"``,
            with two sites each (`half_cauchy.py`).
        by_fan_in: whether τ and c are in units of 1/√fan_in (default), so that one setting suits
            layers of any width; False for units of the weight.
    """

    tau0: float = 1.0
    slab_scale: float | None = 2.0
    tiers: tuple[Tier, ...] = ("layer", "weight")
    slab_df: float | None = None
    block: int = 1
    parametrization: Parametrization = "half-cauchy"
    by_fan_in: bool = True
    shrinkage: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive = f"a finite number > 0 ({SCALES})"
        check_arguments("Horseshoe", has_square(self.tau0), positive, tau0=self.tau0)
        check_arguments(
            "Horseshoe",
            self.slab_scale is None or has_square(self.slab_scale),
            f"{positive}, or None for no slab",
            slab_scale=self.slab_scale,
        )
        check_arguments(
            "Horseshoe",
            self.slab_df is None
            or (self.slab_scale is not None and holds(lambda x: 0 < x < math.inf, self.slab_df)),
            "slab_df to be a finite number > 0; it needs a slab_scale",
            slab_scale=self.slab_scale,
            slab_df=self.slab_df,
        )
        check_arguments(
            "Horseshoe",
            isinstance(self.parametrization, str) and self.parametrization in _PARAMETRIZATIONS,
            '"half-cauchy" or "gamma"',
            parametrization=self.parametrization,
        )
        self._check_tiers()
        # in order, and as a tuple: a saved posterior gives a list
        object.__setattr__(self, "tiers", tuple(tier for tier in TIERS if tier in self.tiers))

    def _check_tiers(self) -> None:
        """Raises ModelError unless the tiers differ, and one of them can have the block."""
        check_arguments(
            "Horseshoe",
            isinstance(self.tiers, (tuple, list))
            and bool(self.tiers)
            and holds(lambda t: len(set(t)) == len(t), self.tiers),
            f"a tuple of different tiers, from {', '.join(TIERS)}",
            tiers=self.tiers,
        )
        grouped = [tier for tier in self.tiers if tier in ("unit", "input")]
        for tier in self.tiers:
            check_tier(
                tier,
                self.block if tier in grouped or not grouped else 1,
                f"Horseshoe(tiers={described(self.tiers)})",
            )

    @classmethod
    def from_active(
        cls, active: float, of: int, rows: int, noise: float = 1.0, **options: Any
    ) -> Horseshoe:
        r"""The horseshoe that expects `active` of `of` weights (or units, or inputs) to matter in
        data of `rows` rows.

        .. math:: \tau_0 = \frac{p_0}{p - p_0} \cdot \frac{s}{\sqrt n}

        in units of the weight (`by_fan_in` is False), for inputs of variance 1. Source: Piironen &
        Vehtari 2017, EJS 11(2).

        Args:
            active, of: p₀ and p, 0 < p₀ < p.
            rows: n.
            noise: s, the standard deviation of the noise; for two balanced classes 2.
            options: other arguments of `Horseshoe`.

        Raises:
            ModelError: a number is out of range.

        Example:
            >>> Horseshoe.from_active(5, of=50, rows=100, noise=0.5).tau0
            0.00555...
        """
        check_arguments(
            "Horseshoe.from_active",
            holds(
                lambda a, p, n, s: 0 < a < p and n >= 1 and 0 < s < math.inf,
                *(active, of, rows, noise),
            ),
            "0 < active < of, rows >= 1, noise > 0",
            active=active,
            of=of,
            rows=rows,
            noise=noise,
        )
        return cls(
            tau0=active / (of - active) * noise / math.sqrt(rows), by_fan_in=False, **options
        )

    @classmethod
    def tiered(cls, weights: bool = False) -> Horseshoe:
        r"""The hierarchical prior of Marković, Friston & Kiebel 2024 (IEEE Access 12, arXiv
        2309.12095): layer, unit, slab, and with `weights` each weight.

        .. math:: c^{-2} \sim \mathrm{Gamma}(2, 6), \quad \psi_i = 0.01\, \epsilon\, \tau_i, \quad
            \epsilon, \tau_i \sim C^+(0, 1), \quad
            W_{ij} = \frac{c\,\psi_i}{\sqrt{c^2 + \psi_i^2}}\, \bar w_{ij}

        in units of the weight; ψ carries a factor λᵢⱼ ~ C⁺(0, 1) with `weights`, which the
        published runs left out. Their last layer has one half-Cauchy scale:
        ``Horseshoe(tiers=("layer",), slab_scale=None, by_fan_in=False)``.
        """
        tiers: tuple[Tier, ...] = ("layer", "unit", "weight") if weights else ("layer", "unit")
        return cls(tau0=0.01, slab_scale=math.sqrt(3.0), slab_df=4.0, tiers=tiers, by_fan_in=False)

    def sample(self, name: str, shape: tuple[int, ...], init: Tensor | None = None) -> Tensor:
        like = torch.zeros(shape) if init is None else init
        unit = 1 / math.sqrt(fan_in(shape)) if self.by_fan_in else 1.0
        gamma = self.sample_scale(name, shape, like)
        start = None if init is None else init / unit
        w = sample_normal(name, shape, like.new_zeros(()), like.new_ones(()), start, self)
        return unit * gamma * w

    def sample_scale(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """γ, which broadcasts to `shape`, drawn by the `pyro.sample` statements of the tiers and
        the slab, in the dtype and on the device of `like`.
        """
        psi = like.new_tensor(self.tau0)
        for tier in self.tiers:
            block = self.block if tier in ("unit", "input") else 1
            scale = psi if tier == "layer" else like.new_ones(())
            lam = sample_half_cauchy(
                f"{name}_{SITES[tier]}", scale, shape, tier, block, self.parametrization
            )
            psi = lam if tier == "layer" else psi * lam
        if self.slab_scale is None:
            return psi
        return psi / (1 + (psi / self._slab(name, like)).square()).sqrt()

    def form(self, name: str, shape: tuple[int, ...]) -> WeightForm:
        """The weight and the densities of its sites, written out."""
        sites = {tier: f"{name}_{SITES[tier]}" for tier in self.tiers}
        inner, factors = half_cauchy_factors(sites, self.tau0, self.block, self.parametrization)
        slab: float | ScaleSite | None = self.slab_scale
        if isinstance(slab, (int, float)) and self.slab_df is not None:
            density = LogGamma(self.slab_df / 2, self.slab_df / 2 * slab**2)
            slab = ScaleSite(f"{name}_slab_precision", density, -0.5)
        unit = 1 / math.sqrt(fan_in(shape)) if self.by_fan_in else 1.0
        return WeightForm(unit, inner, factors, slab)

    def _slab(self, name: str, like: Tensor) -> Tensor:
        assert self.slab_scale is not None
        if self.slab_df is None:
            return like.new_tensor(self.slab_scale)
        half = self.slab_df / 2
        precision: Tensor = pyro.sample(
            f"{name}_slab_precision",
            dist.Gamma(like.new_tensor(half), like.new_tensor(half * self.slab_scale**2)),
        )
        return precision.rsqrt()

    def drop(self, name: str, mean: Tensor, var: Tensor, sites: Mapping[str, Any]) -> Tensor:
        r"""Log odds of pruning each weight, the prior's own decision after a fit; a weight is
        pruned if they are positive.

        Given the scales, w̄ ~ N(0, 1), and without the weight the free energy gains Gᵢ = −½ log σ²
        − ½ μ²/σ² for a posterior N(μ, σ²): the point spike's ΔF. The weight's own scale then
        returns to its prior, and weights of little evidence go with `window_shift` δ:

        .. math:: \text{drop}_i = G_i + \mathrm{KL}(q(\lambda_i) \,\|\, C^+(0, 1)) + 0.02 + \delta

        0.02 is the noise of weights about which the data say nothing. Without the tier ``"weight"``
        a unit or input is pruned as a whole, by the sum over its weights and its scale's
        divergence. κ > ½, here with κ = σ², would prune almost all of a network, whose weights are
        little informed each. `sites`: the posterior, for the moments of the scales.
        """
        kept = var > 0  # pruned entries have variance 0
        sigma2 = var.clamp(max=1.0)
        gain = _NOISE - 0.5 * sigma2.log() - 0.5 * mean.square() / sigma2
        groups: list[Tier] = [tier for tier in self.tiers if tier in ("unit", "input")]
        if "weight" not in self.tiers and groups:
            by_group = [self._group_gain(name, gain, kept, tier, sites) for tier in groups]
            return torch.stack(by_group).amax(0).where(kept, torch.inf)
        if "weight" in self.tiers:
            gain = gain + half_cauchy_divergence(f"{name}_{SITES['weight']}", sites, gain)
        gain = gain.where(kept, torch.inf)
        return gain + window_shift(gain, gain.numel())

    def _group_gain(
        self, name: str, each: Tensor, kept: Tensor, tier: Tier, sites: Mapping[str, Any]
    ) -> Tensor:
        """What the gains `each` of a unit or input sum to, with that of its scale."""
        scale = half_cauchy_divergence(f"{name}_{SITES[tier]}", sites, each)
        total = scale + tier_parts(each.where(kept, 0), tier, self.block).sum(-1)
        left = tier_parts(kept.expand(each.shape), tier, self.block).any(-1)
        total = total + window_shift(total.where(left, torch.inf), total.numel())
        return spread(total, tier, self.block).expand(each.shape)

    def mixture(
        self, scale: float | None = None, together: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        r"""Variances and log weights of p(w) ≈ Σ_k w_k N(w; 0, v_k) given the product `scale` of
        all scales but one half-Cauchy λ (default `tau0`).

        With t = log λ the half-Cauchy has the density sech(t)/π, smooth and with exponential tails,
        so the trapezoid rule converges exponentially. t goes from −32 to 44: the nodes reach a
        posterior near zero that is 10¹³ times as narrow as τ, and a weight 10¹⁵ times as large.
        `together`: how many weights share λ; its posterior is as narrow as 1/√(2n) in t.
        """
        t = np.arange(-32.0, 44.0, 0.23 / math.sqrt(together))
        v = (self.tau0 if scale is None else scale) ** 2 * np.exp(2 * t)
        v = v if self.slab_scale is None else v / (1 + v / self.slab_scale**2)
        log_weights = -np.logaddexp(t, -t)
        return v, log_weights - np.logaddexp.reduce(log_weights)

    @property
    def log_hyper(self) -> Callable[[float], float]:
        """log C⁺(τ; 0, τ₀) up to a constant; an AttributeError if there is a single tier, since
        τ = τ₀ is then known.
        """
        if len(self.tiers) == 1:
            raise AttributeError(
                f"{described(self)} has a known global scale, and no hyper-prior on it"
            )
        return lambda scale: -math.log1p((scale / self.tau0) ** 2)
