r"""Reduction of a low-rank-plus-diagonal posterior, Σ = D + WWᵀ, under diagonal priors, without ever forming a d×d matrix.

Owns the structure `LowRank`; adds it to `gaussian.delta_f`, `reduced_posterior` and `prune_subset`. Imports torch only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.reduction.gaussian import delta_f, moments, prune_subset, reduced_posterior


@dataclass(frozen=True)
class LowRank:
    """N(mean, diag(var) + factor factorᵀ): `mean` and `var` of shape (d,), `factor` of shape (d, k)."""

    mean: Tensor
    var: Tensor
    factor: Tensor


@delta_f.register
def _(posterior: LowRank, prior: Any, reduced_prior: Any) -> Tensor:
    r"""The dense form with every determinant and inverse taken through k×k matrices (Woodbury; matrix determinant lemma)."""
    reduced = reduced_posterior(posterior, prior, reduced_prior)
    p, p_ = moments(prior, posterior.mean), moments(reduced_prior, posterior.mean)
    half_log_dets = 0.5 * (_log_det(reduced) + p.var.log().sum() - _log_det(posterior) - p_.var.log().sum())
    quadratic = (
        posterior.mean @ _solve(posterior, posterior.mean)
        + (p_.mean.square() / p_.var).sum()
        - (p.mean.square() / p.var).sum()
        - reduced.mean @ _solve(reduced, reduced.mean)
    )
    return half_log_dets - 0.5 * quadratic


@reduced_posterior.register
def _(posterior: LowRank, prior: Any, reduced_prior: Any) -> LowRank:
    r"""Σ̃ = E⁻¹ + E⁻¹U (C − UᵀE⁻¹U)⁻¹ UᵀE⁻¹ with U = D⁻¹W, C = I + WᵀD⁻¹W, E = D⁻¹ + Π̃ − Π: again low rank plus diagonal."""
    p, p_ = moments(prior, posterior.mean), moments(reduced_prior, posterior.mean)
    if not bool((p_.var > 0).all()):
        raise ReductionError("the reduced prior must have variance > 0 here; prune_subset is the reduction to a point spike")
    u = posterior.factor / posterior.var[:, None]
    e = 1 / posterior.var + 1 / p_.var - 1 / p.var
    inner, info = torch.linalg.cholesky_ex(_capacitance(posterior) - u.mT @ (u / e[:, None]))
    if int(info) != 0 or not bool((e > 0).all()):
        raise ReductionError(
            "the reduced posterior precision P + Π̃ − Π is not positive definite; the posterior is wider than its prior in some direction: "
            "fit longer, or reduce to a narrower prior"
        )
    factor = torch.linalg.solve_triangular(inner, (u / e[:, None]).mT, upper=False).mT
    weighted = _solve(posterior, posterior.mean) + p_.mean / p_.var - p.mean / p.var
    return LowRank(weighted / e + factor @ (factor.mT @ weighted), 1 / e, factor)


@prune_subset.register
def _(posterior: LowRank, prior: Any, pruned: Tensor) -> tuple[Tensor, LowRank]:
    r"""ΔF = log q_S(0) − log p_S(0), and the rest given w_S = 0, again low rank plus diagonal.

    With w = μ + D^½ε + Wz and z ~ N(0, I), the observation w_S = 0 leaves z ~ N(C⁻¹r, C⁻¹), C = I + W_SᵀD_S⁻¹W_S, r = −W_SᵀD_S⁻¹μ_S. `prior` is diagonal.
    """
    p = moments(prior, posterior.mean)
    block = LowRank(posterior.mean[pruned], posterior.var[pruned], posterior.factor[pruned])
    gain = log_density_at_zero(block) - log_density_at_zero(LowRank(p.mean[pruned], p.var[pruned], posterior.factor[pruned][:, :0]))
    chol = torch.linalg.cholesky(_capacitance(block))
    z = -torch.cholesky_solve((block.factor.mT @ (block.mean / block.var))[:, None], chol)[:, 0]
    factor = torch.linalg.solve_triangular(chol, posterior.factor[~pruned].mT, upper=False).mT  # W_R C^(−½)
    return gain, LowRank(posterior.mean[~pruned] + posterior.factor[~pruned] @ z, posterior.var[~pruned], factor)


def log_density_at_zero(g: LowRank) -> Tensor:
    """log N(0; mean, D + WWᵀ), one number."""
    return -0.5 * (g.mean.numel() * math.log(2 * math.pi) + _log_det(g) + g.mean @ _solve(g, g.mean))


def _capacitance(g: LowRank) -> Tensor:
    return torch.eye(g.factor.shape[1], dtype=g.factor.dtype, device=g.factor.device) + g.factor.mT @ (g.factor / g.var[:, None])


def _log_det(g: LowRank) -> Tensor:
    return g.var.log().sum() + torch.linalg.slogdet(_capacitance(g)).logabsdet


def _solve(g: LowRank, vector: Tensor) -> Tensor:
    """Σ⁻¹v = D⁻¹v − D⁻¹W C⁻¹ WᵀD⁻¹v."""
    scaled = vector / g.var
    return scaled - g.factor @ torch.linalg.solve(_capacitance(g), g.factor.mT @ scaled) / g.var
