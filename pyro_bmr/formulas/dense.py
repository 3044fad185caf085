r"""Gaussians with a full covariance.

Owns the structure `Dense` and its forms of `delta_f`, `reduced_posterior`, `prune_subset` and
`initial_state`; and `joint_reduction`, which takes leading dimensions too, for the blocks of
`matrix_normal.py` and a torch `MultivariateNormal`. Imports torch only. Next: `low_rank.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.conditioning import State, SweptState, initial_state, log_prior_at_zero
from pyro_bmr.formulas.covariance import (
    check_mean,
    covariance_factor,
    half_log_and_energy,
    symmetric_covariance,
)
from pyro_bmr.formulas.diagonal import check_mask, rounded
from pyro_bmr.formulas.gaussian import delta_f, prune_subset, reduced_posterior, rescaled
from pyro_bmr.formulas.structure import (
    Correlated,
    Noise,
    Rescaled,
    covariance_root,
    entries_as_units,
    spread,
    spread_square,
)


@dataclass(frozen=True)
class Dense:
    """A multivariate Gaussian: `mean` of shape (d,), covariance `cov` of shape (d, d)."""

    mean: Tensor
    cov: Tensor

    @property
    def marginal_var(self) -> Tensor:
        """The diagonal of the covariance."""
        return self.cov.diagonal()

    @property
    def unit_count(self) -> int:
        """d."""
        return self.mean.numel()

    def fits(self) -> bool:
        """Whether the shapes are (d,) and (d, d)."""
        return self.mean.ndim == 1 and self.cov.shape == (*self.mean.shape, *self.mean.shape)

    def scaled(self, factor: float) -> Dense:
        """With `factor` times the covariance."""
        return Dense(self.mean, self.cov * factor)

    def masked(self, kept: Tensor) -> Dense:
        """With mean, variance and covariances 0 for the entries that are not `kept`."""
        flat = kept.flatten()
        return Dense(self.mean.where(flat, 0), self.cov * (flat[:, None] & flat))

    def embedded(self, kept: Tensor) -> Dense:
        """As the `kept` entries among pruned ones."""
        return Dense(spread(self.mean, kept), spread_square(self.cov, kept))

    def whole(self, kept: Tensor, turned: bool) -> Dense:
        """As the `kept` entries of a site."""
        return self.embedded(kept.flatten())

    def correlated(self, prior: Any, kept: Tensor, labels: Tensor | None) -> Correlated:
        """The `kept` entries; no groups cut through one."""
        flat = kept.flatten()
        part = Dense(self.mean[flat], self.cov[flat][:, flat])
        return entries_as_units(part, prior, kept, labels)

    def roots(self) -> tuple[Tensor, ...]:
        """T of the covariance TTᵀ."""
        return (covariance_root(self.cov),)

    def draw(self, roots: tuple[Tensor, ...], noise: Noise) -> Tensor:
        """μ + Tε."""
        return self.mean + roots[0] @ noise(len(self.mean))


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


@rescaled.register
def _(posterior: Dense, prior: Any, target: Any) -> Rescaled:
    """With the priors as `Dense`."""
    priors = [Dense(g.mean, torch.diag(g.var)) for g in (prior, target)]
    after = reduced_posterior(posterior, *priors)
    return Rescaled(float(delta_f(posterior, *priors)), after.mean, after.marginal_var, after)


@initial_state.register
def _(posterior: Dense, prior: Any) -> State:
    check_sizes(posterior, *([prior] if isinstance(prior, Dense) else []))
    mean, cov = posterior.mean.double(), symmetric_covariance(posterior.cov, "posterior")
    held, zero = torch.zeros_like(mean, dtype=torch.bool), torch.zeros_like(mean)
    if isinstance(prior, Dense):
        prior_cov = symmetric_covariance(prior.cov, "prior")
        prior_mean = prior.mean.double()[:, None]
        own = SweptState(prior_cov, prior_mean, held, zero, None, 0.0, prior_cov.diagonal())
        return SweptState(cov, mean[:, None], held, zero, own, 0.0, cov.diagonal())
    log_p = log_prior_at_zero(prior, mean)
    return SweptState(cov, mean[:, None], held, log_p, None, 0.0, cov.diagonal())


def check_sizes(*gaussians: Dense) -> None:
    """ReductionError unless all have `mean` of one shape (d,), finite, and `cov` of shape (d,
    d).
    """
    d = len(gaussians[0].mean) if gaussians[0].mean.ndim else 0
    if any(g.mean.shape != (d,) or g.cov.shape != (d, d) for g in gaussians):
        shapes = ", ".join(f"{tuple(g.mean.shape)} and {tuple(g.cov.shape)}" for g in gaussians)
        raise ReductionError(
            "mean and cov of posterior, prior and reduced prior: expected shapes (d,) and (d, d)"
            f" with one d, got {shapes}"
        )
    for role, g in zip(("posterior", "prior", "reduced prior"), gaussians, strict=False):
        check_mean(role, g.mean)


def _reduction(posterior: Dense, prior: Dense, reduced_prior: Dense) -> JointReduction:
    three = (posterior, prior, reduced_prior)
    if not all(isinstance(g, Dense) for g in three):
        names = ", ".join(type(g).__name__ for g in three)
        raise ReductionError(
            f"posterior, prior and reduced prior: expected Dense for all three, got {names};"
            " Dense(mean, torch.diag(var)) is a diagonal one"
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
