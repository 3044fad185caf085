r"""Reduction between Gaussian priors: ΔF and the reduced posterior, for every covariance structure.

Owns the structures `Diagonal` and `Dense` and the generic functions `delta_f` and `reduced_posterior`; `low_rank.py` and
`matrix_normal.py` add their structures to the same two functions. Imports torch only: tensors in, tensors out. Next: `spike_and_slab.py`.

Notation (docs/notation.md): prior N(η, Π⁻¹), posterior N(μ, P⁻¹), reduced prior N(η̃, Π̃⁻¹), reduced posterior N(μ̃, P̃⁻¹);
L = P − Π is the precision of what the data said, h = Pμ − Πη its weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import singledispatch
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError

_PIECE = 1 << 16  # weights at once, where a whole site would leave the cache


@dataclass(frozen=True)
class Diagonal:
    """Independent Gaussians, N(mean, var) element by element. `var` may be 0: the point `mean`."""

    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Dense:
    """A multivariate Gaussian: `mean` of shape (d,), covariance `cov` of shape (d, d)."""

    mean: Tensor
    cov: Tensor


class Message(NamedTuple):
    """What the data said of each weight, as the Gaussian factor exp(h w − ½ L w²) in w = θ − η."""

    h: Tensor
    precision: Tensor  # L


@singledispatch
def delta_f(posterior: Any, prior: Any, reduced_prior: Any) -> Tensor:
    r"""ΔF = log p̃(y) − log p(y), the change of log evidence when `prior` is replaced by `reduced_prior`. Positive favours the reduced prior.

    .. math:: \Delta F = \log \mathbb{E}_{q(\theta)}\left[\tilde p(\theta) / p(\theta)\right]

    Exact when `posterior` is exact. Source: Friston & Penny 2011, NeuroImage 56(4); Friston, Parr & Zeidman 2018, arXiv 1805.07092.

    Args:
        posterior: anything with `mean` and `var` (or `variance`) of one shape — `Diagonal`, a site of a `Posterior`, a torch `Normal` —
            or one of the structures `Dense`, `LowRank`, `MatrixNormal`.
        prior, reduced_prior: the same kind of thing, or for the diagonal form anything that broadcasts to the posterior's shape,
            `Gaussian(scale=0.3)` included. In the diagonal form a reduced prior of variance 0 is the point spike at its mean; for the other
            structures that question is `prune_subset`'s, for `Dense`.

    Returns:
        In nats. Diagonal: one value per element, whose sum is that of the block. Other structures: one value for the whole block.

    Raises:
        ReductionError: moments are not finite, a variance is not positive, or no reduced posterior exists.

    Example:
        >>> delta_f(torch.distributions.Normal(0.1, 0.5), Gaussian(1.0), Gaussian(0.0))  # log 2 − ½ (0.1/0.5)²
        tensor(0.6731)
    """
    q, p, p_ = _diagonals(posterior, prior, reduced_prior)
    return log_evidence_ratio(message(q, p), p.var, p_.var, p_.mean - p.mean)


@singledispatch
def reduced_posterior(posterior: Any, prior: Any, reduced_prior: Any) -> Any:
    r"""The posterior under the reduced prior, q̃(θ) ∝ q(θ) p̃(θ)/p(θ), in the structure of `posterior`; no new fit.

    .. math:: \tilde P = P + \tilde\Pi - \Pi, \qquad \tilde\mu = \tilde P^{-1}(P\mu + \tilde\Pi\tilde\eta - \Pi\eta)

    Arguments, sources and errors as for `delta_f`.
    """
    q, p, p_ = _diagonals(posterior, prior, reduced_prior)
    h, precision = _informative(message(q, p), p_.var)
    growth = 1 + p_.var * precision  # P̃/Π̃
    return Diagonal(p.mean + (p_.var * h + p_.mean - p.mean) / growth, p_.var / growth)


def message(q: Diagonal, p: Diagonal) -> Message:
    """The data's factor in the posterior: L = P − Π and h = P(μ − η), for weights counted from the prior mean."""
    return Message(h=(q.mean - p.mean) / q.var, precision=1 / q.var - 1 / p.var)


def log_evidence_ratio(data: Message, prior_var: Tensor, reduced_var: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    r"""ΔF per element between N(0, σ₀²) and N(e, v) given the message exp(h w − ½ L w²); safe at v = 0 and in float32.

    .. math:: \Delta F = -\tfrac12 \log\frac{1 + vL}{1 + \sigma_0^2 L}
        + \frac{h^2 (v - \sigma_0^2)}{2 (1 + vL)(1 + \sigma_0^2 L)} + \frac{2he - Le^2}{2 (1 + vL)}

    No difference of large numbers and no division by v or L, so the point spike (v = 0) is the same line. Where the
    posterior is wider than its prior (L ≤ 0) the data said nothing: the message counts as h = L = 0 unless v = 0, which needs no L.
    """
    h, precision = _informative(data, reduced_var)
    full, reduced = 1 + prior_var * precision, 1 + reduced_var * precision
    scale_part = 0.5 * (full.log() - reduced.log()) + 0.5 * (h / full) * (h * ((reduced_var - prior_var) / reduced))  # h² would leave the floats
    return scale_part + (2 * h * shift - precision * shift**2) / (2 * reduced)


def point_spike_delta_f(posterior: Diagonal, prior: Diagonal, mask: Tensor | None = None) -> Tensor:
    r"""ΔF of setting each weight to 0 by itself, the Savage–Dickey ratio of its marginals; NaN where `mask` says that it is pruned already.

    .. math:: \Delta F = \log q(0) - \log p(0) = \tfrac12 \log\frac{\sigma_0^2}{\sigma^2} - \tfrac12\frac{\mu^2}{\sigma^2} + \tfrac12\frac{\eta^2}{\sigma_0^2}

    The same number as `delta_f` with a reduced prior of mean 0 and variance 0, for many weights: in pieces that stay in a core's cache, and with
    no tensor of the site's size but the result. `prior`: expanded to the posterior's shape or of one element.

    Raises:
        ReductionError: as `delta_f`, for the entries that live.
    """
    mean, var = posterior.mean, posterior.var
    out = torch.empty_like(mean, memory_format=torch.contiguous_format)
    zero = mean.new_zeros(())
    numbers = prior.mean.numel() == prior.var.numel() == 1 and mean.numel() > 0
    parts = (_pieces(t.expand(mean.shape)) for t in (mean, var, prior.mean, prior.var))
    masks: Iterable[Tensor | None] = repeat(None) if mask is None else mask.reshape(-1).split(_PIECE)
    for piece, alive, m, v, pm, pv in zip(out.view(-1).split(_PIECE), masks, *parts, strict=False):
        log_var = v.log()
        torch.div(m, v, out=piece)
        piece.mul_(m).add_(log_var)  # μ²/σ² + log σ²
        at_zero = pv.log() + pm * (pm / pv)
        piece.sub_(float(at_zero) if numbers else at_zero).mul_(-0.5)
        whole = alive is None or bool(alive.all())
        if not math.isfinite(float(piece.sum() if whole else piece[alive].sum())):
            here = slice(None) if whole else alive
            _diagonals(Diagonal(m[here], v[here]), Diagonal(pm.expand_as(m)[here], pv.expand_as(m)[here]), Diagonal(zero, zero))
        if alive is not None and not whole:
            piece.masked_fill_(~alive, torch.nan)
    return out


def _pieces(whole: Tensor) -> Iterable[Tensor]:
    """The tensor in flat pieces, as views; a number that was expanded stays one number."""
    if whole.numel() and all(stride == 0 or size == 1 for stride, size in zip(whole.stride(), whole.shape, strict=True)):
        return repeat(whole.as_strided((1,), (1,)))
    return whole.reshape(-1).split(_PIECE)


def _informative(data: Message, reduced_var: Tensor) -> Message:
    silent = (data.precision <= 0) & (reduced_var > 0)
    return Message(data.h.masked_fill(silent, 0.0), data.precision.masked_fill(silent, 0.0))


def moments(gaussian: Any, like: Tensor | None = None) -> Diagonal:
    """`gaussian` (anything with `mean` and `var` or `variance`) as a `Diagonal`, expanded to the shape, dtype and device of `like`."""
    if not (hasattr(gaussian, "mean") and (hasattr(gaussian, "var") or hasattr(gaussian, "variance"))):
        raise ReductionError(f"a Gaussian, with mean and var, is wanted; got {gaussian!r}")
    var = gaussian.var if hasattr(gaussian, "var") else gaussian.variance
    if like is None:
        return Diagonal(torch.as_tensor(gaussian.mean), torch.as_tensor(var))
    mean, var = (torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in (gaussian.mean, var))
    try:
        return Diagonal(mean.expand_as(like), var.expand_as(like))
    except RuntimeError:
        shape = tuple(torch.broadcast_shapes(mean.shape, var.shape))
        raise ReductionError(f"a prior of shape {shape} does not fit a posterior of shape {tuple(like.shape)}; give one of that shape or a number") from None


def _diagonals(posterior: Any, prior: Any, reduced_prior: Any) -> tuple[Diagonal, Diagonal, Diagonal]:
    q = moments(posterior)
    p, p_ = moments(prior, q.mean), moments(reduced_prior, q.mean)
    for role, one, floor in (("posterior", q, "> 0"), ("prior", p, "> 0"), ("reduced prior", p_, ">= 0")):
        good = one.var > 0 if floor == "> 0" else one.var >= 0
        if not bool((good & one.mean.isfinite() & one.var.isfinite()).all()):
            raise ReductionError(
                f"the {role} must have finite moments and variance {floor}; got {int((~good).sum())} of {good.numel()} variances outside, "
                f"{int((~one.mean.isfinite() | ~one.var.isfinite()).sum())} not finite; a point estimate has no variance to reduce"
            )
    return q, p, p_


@delta_f.register
def _(posterior: Dense, prior: Dense, reduced_prior: Dense) -> Tensor:
    r"""½ log(|P||Π̃| / (|P̃||Π|)) − ½(μᵀPμ + η̃ᵀΠ̃η̃ − ηᵀΠη − μ̃ᵀP̃μ̃)."""
    _check_sizes(posterior, prior, reduced_prior)
    chol_post, chol_prior, chol_reduced = (_cholesky(g.cov, role) for g, role in ((posterior, "posterior"), (prior, "prior"), (reduced_prior, "reduced prior")))
    reduced = reduced_posterior(posterior, prior, reduced_prior)
    chol_result = _cholesky(reduced.cov, "reduced posterior")
    half_log_det = _half_log_det(chol_result) + _half_log_det(chol_prior) - _half_log_det(chol_post) - _half_log_det(chol_reduced)
    quadratic = (
        _quadratic(chol_post, posterior.mean)
        + _quadratic(chol_reduced, reduced_prior.mean)
        - _quadratic(chol_prior, prior.mean)
        - _quadratic(chol_result, reduced.mean)
    )
    return half_log_det - 0.5 * quadratic


@reduced_posterior.register
def _(posterior: Dense, prior: Dense, reduced_prior: Dense) -> Dense:
    """P̃ = P + Π̃ − Π must be positive definite: a posterior wider than its prior, under a wider reduced prior, has none."""
    _check_sizes(posterior, prior, reduced_prior)
    inv_post, inv_prior, inv_reduced = (
        torch.cholesky_inverse(_cholesky(g.cov, role)) for g, role in ((posterior, "posterior"), (prior, "prior"), (reduced_prior, "reduced prior"))
    )
    chol_prec = _cholesky(
        inv_post + inv_reduced - inv_prior,
        "reduced posterior precision P + Π̃ − Π",
        "the posterior is wider than its prior in some direction; fit longer, or reduce to a narrower prior",
    )
    weighted = inv_post @ posterior.mean + inv_reduced @ reduced_prior.mean - inv_prior @ prior.mean
    return Dense(torch.cholesky_solve(weighted[:, None], chol_prec)[:, 0], torch.cholesky_inverse(chol_prec))


@singledispatch
def prune_subset(posterior: Any, prior: Any, pruned: Tensor) -> tuple[Tensor, Any]:
    r"""ΔF of setting the entries where `pruned` is True to exactly 0, and the posterior of the rest given that.

    .. math:: \Delta F = \log N(0; \mu_S, \Sigma_{SS}) - \log N(0; \eta_S, \Pi^{-1}_{SS}), \quad
        \mu_R - \Sigma_{RS}\Sigma_{SS}^{-1}\mu_S, \quad \Sigma_{RR} - \Sigma_{RS}\Sigma_{SS}^{-1}\Sigma_{SR}

    The Savage–Dickey ratio for a block; the shift of the mean is the optimal-brain-surgeon update (Hassibi & Stork 1993).

    Example:
        >>> gain, rest = prune_subset(Dense(mean, cov), Gaussian(1.0), tensor([True, False, True]))  # without the first and the third
    """
    if pruned.dtype != torch.bool or pruned.shape != posterior.mean.shape:
        raise ReductionError(f"pruned: a bool tensor of shape {tuple(posterior.mean.shape)} is wanted, got {pruned.dtype} of shape {tuple(pruned.shape)}")
    s, r = pruned, ~pruned
    prior = prior if isinstance(prior, Dense) else _dense(moments(prior, posterior.mean))
    chol_post, chol_prior = _cholesky(posterior.cov[s][:, s], "posterior"), _cholesky(prior.cov[s][:, s], "prior")
    gain = _half_log_det(chol_prior) - _half_log_det(chol_post) - 0.5 * _quadratic(chol_post, posterior.mean[s]) + 0.5 * _quadratic(chol_prior, prior.mean[s])
    cross = posterior.cov[r][:, s]
    solved = torch.cholesky_solve(cross.mT, chol_post)  # Σ_SS⁻¹ Σ_SR
    return gain, Dense(posterior.mean[r] - solved.mT @ posterior.mean[s], posterior.cov[r][:, r] - cross @ solved)


def _check_sizes(*gaussians: Dense) -> None:
    d = len(gaussians[0].mean)
    if any(g.mean.shape != (d,) or g.cov.shape != (d, d) for g in gaussians):
        shapes = ", ".join(f"{tuple(g.mean.shape)} and {tuple(g.cov.shape)}" for g in gaussians)
        raise ReductionError(f"mean and cov of posterior, prior and reduced prior: shapes (d,) and (d, d) with one d are wanted, got {shapes}")


def _dense(g: Diagonal) -> Dense:
    return Dense(g.mean, torch.diag(g.var))


def _cholesky(matrix: Tensor, role: str, mend: str = "give a symmetric positive definite matrix") -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0 or not bool(factor.isfinite().all()):
        raise ReductionError(f"the {role} is not positive definite (leading minor {int(info)} of {matrix.shape[-1]}); {mend}")
    return factor


def _half_log_det(chol: Tensor) -> Tensor:
    return chol.diagonal().log().sum()


def _quadratic(chol: Tensor, vector: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(chol, vector[:, None], upper=False).square().sum()
