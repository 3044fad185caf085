r"""Low-rank-plus-diagonal Gaussians, Σ = D + WWᵀ, under diagonal priors, without ever forming a d×d
matrix.

Owns the structure `LowRank` and its forms of `delta_f`, `reduced_posterior`, `prune_subset` and
`initial_state`. Imports torch only. Next: `matrix_normal.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.conditioning import LowRankState, State, initial_state, log_prior_at_zero
from pyro_bmr.formulas.covariance import half_log_and_energy
from pyro_bmr.formulas.diagonal import (
    Diagonal,
    check_diagonal,
    check_mask,
    moments,
    positive_priors,
    result_dtype,
    rounded,
)
from pyro_bmr.formulas.gaussian import delta_f, prune_subset, reduced_posterior
from pyro_bmr.formulas.ratios import Ratios, half_log_growth
from pyro_bmr.formulas.structure import Correlated, Noise, entries_as_units, spread

_WIDER = (
    "the reduced posterior precision P + Π̃ − Π is not positive definite; the posterior is wider"
    " than its prior in some direction: fit longer, or reduce to a narrower prior"
)


@dataclass(frozen=True)
class LowRank:
    """N(mean, diag(var) + factor factorᵀ): `mean` and `var` of shape (d,), `factor` of shape (d,
    k).
    """

    mean: Tensor
    var: Tensor
    factor: Tensor

    @property
    def marginal_var(self) -> Tensor:
        """D + Σ_k w_k²."""
        return self.var + self.factor.square().sum(-1)

    @property
    def unit_count(self) -> int:
        """d."""
        return self.mean.numel()

    def fits(self) -> bool:
        """Whether the shapes are (d,), (d,) and (d, k)."""
        d = self.mean.shape
        return len(d) == 1 and self.var.shape == d and self.factor.shape[:-1] == d

    def scaled(self, factor: float) -> LowRank:
        """With `factor` times the covariance."""
        return LowRank(self.mean, self.var * factor, self.factor * factor**0.5)

    def masked(self, kept: Tensor) -> LowRank:
        """With mean, variance and covariances 0 for the entries that are not `kept`."""
        flat = kept.flatten()
        return LowRank(
            self.mean.where(flat, 0), self.var.where(flat, 0), self.factor * flat[:, None]
        )

    def embedded(self, kept: Tensor) -> LowRank:
        """As the `kept` entries among pruned ones."""
        return LowRank(*(spread(part, kept) for part in (self.mean, self.var, self.factor)))

    def whole(self, kept: Tensor, turned: bool) -> LowRank:
        """As the `kept` entries of a site."""
        return self.embedded(kept.flatten())

    def correlated(self, prior: Any, kept: Tensor, labels: Tensor | None) -> Correlated:
        """The `kept` entries; no groups cut through one."""
        flat = kept.flatten()
        part = LowRank(self.mean[flat], self.var[flat], self.factor[flat])
        return entries_as_units(part, prior, kept, labels)

    def roots(self) -> tuple[Tensor, ...]:
        """None: a draw needs no factor but its own."""
        return ()

    def draw(self, roots: tuple[Tensor, ...], noise: Noise) -> Tensor:
        """μ + √D ε + Wz."""
        own = self.mean + self.var.sqrt() * noise(len(self.mean))
        return own + self.factor @ noise(self.factor.shape[1])


class _Parts(NamedTuple):
    """J = (σ₀² − v)/(Dσ₀² + v(σ₀² − D)), G = vσ₀²/(Dσ₀² + v(σ₀² − D)), H = I + WᵀJW, z = H⁻¹WᵀJd,
    with d = μ − η̃; in float64.
    """

    ratios: Ratios  # of the independent part
    chol: Tensor  # C, CCᵀ = H
    inner: Tensor  # J
    z: Tensor
    left: Tensor  # d − Wz
    carried: Tensor  # G(d − Wz)
    shift: Tensor  # e = η̃ − η
    pull: Tensor  # Πe
    var: Tensor  # D̃
    factor: Tensor  # W̃, Σ̃ = D̃ + W̃W̃ᵀ

    def spread(self, vector: Tensor) -> Tensor:
        """Σ̃ times the vector."""
        return self.var * vector + self.factor @ (self.factor.mT @ vector)


@delta_f.register
def _(posterior: LowRank, prior: Any, reduced_prior: Any) -> Tensor:
    r"""The dense form with every determinant and inverse taken through k×k matrices (Woodbury;
    matrix determinant lemma).

    .. math:: -\tfrac12 \log |H| - \tfrac12 \left[(d - Wz)^\top J (d - Wz) + z^\top z\right] +
        e^\top\Pi G (d - Wz)
        + \tfrac12 e^\top (\Pi + \Pi\tilde\Sigma\Pi) e

    and the logarithms of the independent part. The bracket is dᵀ(J − JWH⁻¹WᵀJ)d as a sum of
    squares.
    """
    x = _parts(posterior, prior, reduced_prior)
    growth = half_log_growth(x.ratios, (x.ratios.sigma + x.ratios.nu * x.ratios.tau).sqrt()).sum()
    quadratic = (x.inner * x.left.square()).sum() + x.z.square().sum()
    gain = (
        growth
        - x.chol.diagonal().abs().log().sum()
        - 0.5 * quadratic
        + x.pull @ x.carried
        + 0.5 * x.pull @ (x.shift + x.spread(x.pull))
    )
    return rounded(gain, _dtype(posterior), "ΔF")


@reduced_posterior.register
def _(posterior: LowRank, prior: Any, reduced_prior: Any) -> LowRank:
    r"""Again low rank plus diagonal: D̃ = GD, W̃ = GWH^(−½), mean η̃ + G(d − Wz) + Σ̃Πe."""
    x = _parts(posterior, prior, reduced_prior)
    mean = moments(reduced_prior, posterior.mean).mean.double() + x.carried + x.spread(x.pull)
    return LowRank(
        *(rounded(t, _dtype(posterior), "the reduced posterior") for t in (mean, x.var, x.factor))
    )


@prune_subset.register
def _(posterior: LowRank, prior: Any, pruned: Tensor) -> tuple[Tensor, LowRank]:
    r"""ΔF = log q_S(0) − log p_S(0), and the rest given w_S = 0, again low rank plus diagonal.

    With w = μ + D^½ε + Wz and z ~ N(0, I), the observation w_S = 0 leaves z ~ N(C⁻¹r, C⁻¹), C = I +
    W_SᵀD_S⁻¹W_S, r = −W_SᵀD_S⁻¹μ_S. `prior` is diagonal.
    """
    check_mask(pruned, posterior.mean)
    mean, var, factor = checked(posterior)
    chol, z = _latent(factor[pruned], 1 / var[pruned], mean[pruned])
    gain = _log_density_at_zero(mean[pruned], var[pruned], factor[pruned]) + half_log_and_energy(
        prior, posterior.mean, pruned
    )
    gain = gain + 0.5 * int(pruned.sum()) * math.log(2 * math.pi)
    # W_R C^(−½)
    rest = (
        mean[~pruned] - factor[~pruned] @ z,
        var[~pruned],
        torch.linalg.solve_triangular(chol, factor[~pruned].mT, upper=False).mT,
    )
    dtype = _dtype(posterior)
    return rounded(gain, dtype, "ΔF"), LowRank(*(rounded(t, dtype, "the rest") for t in rest))


@initial_state.register
def _(posterior: LowRank, prior: Any) -> State:
    mean, var, factor = checked(posterior)
    eye, zero = torch.eye(factor.shape[1]).to(factor), factor.new_zeros(factor.shape[1])
    held, log_p = torch.zeros_like(mean, dtype=torch.bool), log_prior_at_zero(prior, mean)
    return LowRankState(mean, var, factor, held, eye, zero, log_p)


def log_density_at_zero(g: LowRank) -> Tensor:
    """log N(0; mean, D + WWᵀ), one number."""
    return _log_density_at_zero(*checked(g)).to(_dtype(g))


def checked(g: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variances and factor in float64.

    Raises:
        ReductionError: shapes do not fit, something is not finite, or a variance is not positive.
    """
    if not g.fits():
        shapes = ", ".join(str(tuple(t.shape)) for t in (g.mean, g.var, g.factor))
        raise ReductionError(
            f"LowRank: expected mean (d,), var (d,) and factor (d, k), got {shapes}"
        )
    q = moments(Diagonal(g.mean, g.var))
    check_diagonal("posterior", q)
    if not g.factor.is_floating_point() or not bool(g.factor.isfinite().all()):
        raise ReductionError(
            "factor of the posterior: expected finite floating-point numbers, got"
            f" {int((~g.factor.isfinite()).sum())} not finite"
        )
    return q.mean.double(), q.var.double(), g.factor.double()


def _parts(posterior: LowRank, prior: Any, reduced_prior: Any) -> _Parts:
    mean, var, factor = checked(posterior)
    spike = "prune_subset is the reduction to a point spike"
    p, p_ = positive_priors(prior, reduced_prior, posterior.mean, spike)
    eta, v0, eta_, v = (t.double() for t in (p.mean, p.var, p_.mean, p_.var))
    distance, shift, root = mean - eta_, eta_ - eta, v0.sqrt()
    widths = var / v0, (v0 - var) / v0, v / v0, (v0 - v) / v0
    x = Ratios(*widths, (mean - eta) / root, shift / root, distance / root)
    total = x.sigma + x.nu * x.tau
    inner, kept = x.kappa / total / v0, x.nu / total
    if not bool((total > 0).all()):
        raise ReductionError(_WIDER)
    chol, z = _latent(factor, inner, distance)
    left = distance - factor @ z
    new_factor = kept[:, None] * torch.linalg.solve_triangular(chol, factor.mT, upper=False).mT
    return _Parts(x, chol, inner, z, left, kept * left, shift, shift / v0, var * kept, new_factor)


def _latent(factor: Tensor, weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    r"""A triangular C with CCᵀ = H = I + WᵀJW, and z = H⁻¹WᵀJy: the least squares of (√J(y − Wz),
    z).

    The rows with J > 0 by orthogonal steps, since H itself would not keep the I beside 1/D; the
    others, which are bounded by the prior, after them.
    """
    k = factor.shape[1]
    up, down = weights.clamp(min=0).sqrt()[:, None], (-weights).clamp(min=0).sqrt()[:, None]
    beside = torch.cat(
        [torch.eye(k, dtype=factor.dtype, device=factor.device), factor.new_zeros(k, 1)], 1
    )
    triangle = torch.linalg.qr(torch.cat([up * torch.cat([factor, target[:, None]], 1), beside])).R[
        :k
    ]
    first, solved = triangle[:, :k].mT, triangle[:, k]
    against = torch.linalg.solve_triangular(first, (down * factor).mT, upper=False)
    second, info = torch.linalg.cholesky_ex(
        torch.eye(k, dtype=factor.dtype, device=factor.device) - against @ against.mT
    )
    if int(info):
        raise ReductionError(_WIDER)
    solved = torch.cholesky_solve((solved - against @ (down[:, 0] * target))[:, None], second)
    return first @ second, torch.linalg.solve_triangular(first.mT, solved, upper=True)[:, 0]


def _log_density_at_zero(mean: Tensor, var: Tensor, factor: Tensor) -> Tensor:
    """With μᵀΣ⁻¹μ as a sum of squares, (μ − Wz)ᵀD⁻¹(μ − Wz) + zᵀz."""
    chol, z = _latent(factor, 1 / var, mean)
    left = mean - factor @ z
    quadratic = (left * (left / var)).sum() + z.square().sum()
    return (
        -0.5 * (mean.numel() * math.log(2 * math.pi) + var.log().sum() + quadratic)
        - chol.diagonal().abs().log().sum()
    )


def _dtype(g: LowRank) -> torch.dtype:
    return torch.promote_types(result_dtype(Diagonal(g.mean, g.var)), g.factor.dtype)
