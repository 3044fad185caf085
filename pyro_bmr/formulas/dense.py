r"""Reduction of Gaussians with a full covariance.

Owns `JointReduction`, the formulas for `gaussian.Dense` (and, with leading dimensions, for the
blocks of `matrix_normal.py` and a torch `MultivariateNormal`), and `covariance_factor`, which says
what a covariance must be. Imports torch only. Next: `low_rank.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.gaussian import (
    Dense,
    check_diagonal,
    check_mask,
    delta_f,
    moments,
    prune_subset,
    reduced_posterior,
    rounded,
)

# roundings of float64: a conditional variance that small in a marginal one has few digits left
_PIVOT = 1e3


class JointReduction(NamedTuple):
    """ΔF, and the reduced posterior N(mean, root rootᵀ) counted from the reduced prior's mean."""

    delta_f: Tensor
    mean: Tensor
    root: Tensor


def joint_reduction(
    post: Tensor, prior: Tensor, reduced: Tensor, to_reduced: Tensor, of_prior: Tensor
) -> JointReduction:
    r"""The reduction by the Cholesky factors of the three covariances, d = μ − η̃ and e = η̃ − η;
    leading dimensions are blocks.

    With F = C⁻¹C̃ and R = C₀⁻¹C̃ for the factors C of the posterior, C₀ of the prior and C̃ of the
    reduced prior,

    .. math:: M = I + F^\top F - R^\top R, \quad z = M^{-1} F^\top C^{-1} d, \quad
        a = C_0^{-1} e, \quad b = C_0^{-1} d, \qquad
        \Delta F = \log\frac{|C_0|}{|C| |M|^{1/2}} - \tfrac12 z^\top (\tilde C^{-1} d - R^\top b) +
        z^\top R^\top a
        + \tfrac12 |a|^2 + \tfrac12 a^\top R M^{-1} R^\top a

    and the reduced posterior is N(η̃ + C̃z + C̃M⁻¹Rᵀa, C̃M⁻¹C̃ᵀ). No precision is formed, and the
    terms are no larger than the prior's energies and the posterior's distance from the reduced
    prior.

    Raises:
        ReductionError: P̃ = C̃⁻ᵀMC̃⁻¹ is not positive definite.
    """
    f, r = _solve(post, reduced), _solve(prior, reduced)
    d = reduced.shape[-1]
    unit = torch.eye(d, dtype=f.dtype, device=f.device)
    seen, a, b = (
        _solve_vector(*pair)
        for pair in ((post, to_reduced), (prior, of_prior), (prior, to_reduced))
    )
    # the factor of I + FᵀF by orthogonal steps, beside FᵀC⁻¹d in its terms; then what RᵀR takes
    # away, relative to it
    beside = torch.cat([unit, unit.new_zeros(d, 1)], 1).expand(*f.shape[:-2], d, d + 1)
    triangle = torch.linalg.qr(torch.cat([torch.cat([f, seen[..., None]], -1), beside], -2)).R[
        ..., :d, :
    ]
    first = triangle[..., :d].mT
    against = _solve(first, r.mT)
    second, info = torch.linalg.cholesky_ex(unit - against @ against.mT)
    if bool(info.any()) or not bool(second.isfinite().all()):
        raise ReductionError(
            "the reduced posterior precision P + Π̃ − Π is not positive definite: the posterior is"
            " wider than its prior in some direction; fit longer, or reduce to a narrower prior"
        )
    chol = first @ second
    z = torch.linalg.solve_triangular(
        first.mT, torch.cholesky_solve(triangle[..., d:], second), upper=True
    )[..., 0]
    pulled = _times(r.mT, a)
    half_log_det = _half_log_det(prior) - _half_log_det(post) - _half_log_det(chol)
    distance = (z * (_solve_vector(reduced, to_reduced) - _times(r.mT, b))).sum(-1)
    energy = a.square().sum(-1) + _solve_vector(chol, pulled).square().sum(-1)
    gain = half_log_det - 0.5 * distance + (z * pulled).sum(-1) + 0.5 * energy
    return JointReduction(
        gain, _times(reduced, z + _both(chol, pulled)), _solve(chol, reduced.mT).mT
    )


@delta_f.register
def _(posterior: Dense, prior: Dense, reduced_prior: Dense) -> Tensor:
    """By `joint_reduction`."""
    return rounded(_reduction(posterior, prior, reduced_prior).delta_f, posterior.cov.dtype, "ΔF")


@reduced_posterior.register
def _(posterior: Dense, prior: Dense, reduced_prior: Dense) -> Dense:
    """P̃ = P + Π̃ − Π must be positive definite: a posterior wider than its prior, under a wider
    reduced prior, has none.
    """
    done = _reduction(posterior, prior, reduced_prior)
    return _in_dtype(
        reduced_prior.mean.double() + done.mean, done.root @ done.root.mT, posterior.cov.dtype
    )


@prune_subset.register
def _(posterior: Dense, prior: Any, pruned: Tensor) -> tuple[Tensor, Dense]:
    """By one factor of the covariance with the pruned entries first; its lower right block is the
    factor of what is left.
    """
    check_mask(pruned, posterior.mean)
    check_sizes(posterior, *([prior] if isinstance(prior, Dense) else []))
    s, r = pruned.nonzero()[:, 0], (~pruned).nonzero()[:, 0]
    order, size = torch.cat([s, r]), len(s)
    mean = posterior.mean.double()
    factor = covariance_factor(posterior.cov, "posterior", order)
    white = _solve_vector(factor[:size, :size], mean[s])
    log_q = -_half_log_det(factor[:size, :size]) - 0.5 * white.square().sum()
    if isinstance(prior, Dense):
        at_zero = covariance_factor(prior.cov, "prior", order)[:size, :size]
        log_p = (
            -_half_log_det(at_zero)
            - 0.5 * _solve_vector(at_zero, prior.mean.double()[s]).square().sum()
        )
    else:
        log_p = -half_log_and_energy(prior, posterior.mean, pruned)
    left = factor[size:, size:]
    dtype = posterior.cov.dtype
    return rounded(log_q - log_p, dtype, "ΔF"), _in_dtype(
        mean[r] - factor[size:, :size] @ white, left @ left.mT, dtype
    )


def half_log_and_energy(prior: Any, like: Tensor, where: Tensor) -> Tensor:
    """Σ ½ log σ₀² + ½ η²/σ₀² of a diagonal prior over the entries `where`, in float64."""
    p = moments(prior, like)
    check_diagonal("prior", p)
    mean, var = p.mean[where].double(), p.var[where].double()
    return 0.5 * (var.log() + mean * (mean / var)).sum()


def covariance_factor(cov: Tensor, role: str, order: Tensor | None = None) -> Tensor:
    """The Cholesky factor of a covariance in float64, its rows and columns in `order`.

    Raises:
        ReductionError: the matrix has NaN or infinities, is not symmetric, not positive definite,
            or so near to singular that float64 cannot tell.
    """
    matrix = cov.double()
    symmetric = (matrix + matrix.mT) / 2
    diagonal = matrix.diagonal()
    if order is not None:
        symmetric, diagonal = symmetric[order][:, order], diagonal[order]
    factor, info = torch.linalg.cholesky_ex(symmetric)
    clear = factor.diagonal().square() >= _PIVOT * torch.finfo(torch.float64).eps * diagonal
    if not cov.is_floating_point() or not bool((info == 0) & clear.all() & _even(cov).all()):
        raise ReductionError(_fault(cov, role, int(info)))
    return factor


def _even(cov: Tensor) -> Tensor:
    """Where an entry is that of the transpose, but for what products and inverses leave; False for
    NaN and infinities.
    """
    matrix = cov.double()
    scale = matrix.diagonal().clamp(min=0).sqrt() * torch.finfo(cov.dtype).eps ** 0.25
    return (matrix - matrix.mT).abs() <= scale[:, None] * scale


def _fault(cov: Tensor, role: str, minor: int) -> str:
    """What is wrong with a matrix that is no covariance."""
    if not cov.is_floating_point():
        return (
            f"the covariance of the {role} must be of floating-point numbers, got {cov.dtype}; give"
            " tensor.float()"
        )
    if bad := int((~cov.isfinite()).sum()):
        return f"the covariance of the {role} has {bad} entries that are not finite"
    if bool((cov.diagonal() <= 0).any()):
        return (
            f"the {role} is not positive definite: {int((cov.diagonal() <= 0).sum())} of {len(cov)}"
            " variances are not positive"
        )
    if uneven := int((~_even(cov)).sum()):
        return (
            f"the covariance of the {role} is not symmetric: {uneven // 2} pairs of entries differ"
            " by more than rounding; if their average is what is meant, give (cov + cov.mT) / 2"
        )
    if minor:
        return (
            f"the {role} is not positive definite (leading minor {minor} of {len(cov)}); give a"
            " symmetric positive definite covariance"
        )
    return (
        f"the {role} is not positive definite to the precision of float64: an entry is a linear"
        " combination of others; leave one of them out"
    )


def check_sizes(*gaussians: Dense) -> None:
    """ReductionError unless all have `mean` of one shape (d,), finite, and `cov` of shape (d,
    d).
    """
    d = len(gaussians[0].mean) if gaussians[0].mean.ndim else 0
    if any(g.mean.shape != (d,) or g.cov.shape != (d, d) for g in gaussians):
        shapes = ", ".join(f"{tuple(g.mean.shape)} and {tuple(g.cov.shape)}" for g in gaussians)
        raise ReductionError(
            "mean and cov of posterior, prior and reduced prior: shapes (d,) and (d, d) with one d"
            f" are wanted, got {shapes}"
        )
    for role, g in zip(("posterior", "prior", "reduced prior"), gaussians, strict=False):
        check_mean(role, g.mean)


def check_mean(role: str, mean: Tensor) -> None:
    """ReductionError unless the mean is finite."""
    if not mean.is_floating_point() or not bool(mean.isfinite().all()):
        raise ReductionError(
            f"the mean of the {role} must be finite floating-point numbers, got {mean.dtype} with"
            f" {int((~mean.isfinite()).sum())} not finite"
        )


def _reduction(posterior: Dense, prior: Dense, reduced_prior: Dense) -> JointReduction:
    three = (posterior, prior, reduced_prior)
    if not all(isinstance(g, Dense) for g in three):
        names = ", ".join(type(g).__name__ for g in three)
        raise ReductionError(
            f"posterior, prior and reduced prior must all be Dense, got {names}; Dense(mean,"
            " torch.diag(var)) is a diagonal one"
        )
    check_sizes(*three)
    post, prior_factor, reduced = (
        covariance_factor(g.cov, role)
        for g, role in zip(three, ("posterior", "prior", "reduced prior"), strict=True)
    )
    mu, eta, eta_ = (g.mean.double() for g in three)
    return joint_reduction(post, prior_factor, reduced, mu - eta_, eta_ - eta)


def _in_dtype(mean: Tensor, cov: Tensor, dtype: torch.dtype) -> Dense:
    return Dense(
        rounded(mean, dtype, "the reduced mean"), rounded(cov, dtype, "the reduced covariance")
    )


def _solve(lower: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(lower, right, upper=False)


def _solve_vector(lower: Tensor, vector: Tensor) -> Tensor:
    return _solve(lower, vector[..., None])[..., 0]


def _both(chol: Tensor, vector: Tensor) -> Tensor:
    return torch.cholesky_solve(vector[..., None], chol)[..., 0]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _half_log_det(chol: Tensor) -> Tensor:
    return chol.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
