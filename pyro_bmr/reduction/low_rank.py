r"""Reduction of a low-rank-plus-diagonal posterior, Σ = D + WWᵀ, under diagonal priors, without ever forming a d×d matrix.

Owns the structure `LowRank`; adds it to `gaussian.delta_f` and `gaussian.reduced_posterior`. Imports torch only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.reduction.gaussian import delta_f, moments, reduced_posterior


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
        raise ReductionError("the reduced prior must have variance > 0 here; for a point spike take the Dense form and prune_subset")
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


def _capacitance(g: LowRank) -> Tensor:
    return torch.eye(g.factor.shape[1], dtype=g.factor.dtype, device=g.factor.device) + g.factor.mT @ (g.factor / g.var[:, None])


def _log_det(g: LowRank) -> Tensor:
    return g.var.log().sum() + torch.linalg.slogdet(_capacitance(g)).logabsdet


def _solve(g: LowRank, vector: Tensor) -> Tensor:
    """Σ⁻¹v = D⁻¹v − D⁻¹W C⁻¹ WᵀD⁻¹v."""
    scaled = vector / g.var
    return scaled - g.factor @ torch.linalg.solve(_capacitance(g), g.factor.mT @ scaled) / g.var
