r"""Reduction between Gaussian priors: ΔF and the reduced posterior, for every covariance structure.

Owns the generic functions `delta_f`, `reduced_posterior`, `prune_subset` and `rescaled` with their
diagonal form, `point_spike_delta_f` and `total`. `dense.py`, `low_rank.py` and `matrix_normal.py`
add their forms to the same functions; `ratios.py` has the formulas of one weight. Imports torch
only: tensors in, tensors out. Next: `message.py`.

Notation (docs/notation.md): prior N(η, Π⁻¹), posterior N(μ, P⁻¹), reduced prior N(η̃, Π̃⁻¹),
reduced posterior N(μ̃, P̃⁻¹); L = P − Π is the precision of what the data said, h = Pμ − Πη its
weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import singledispatch
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.diagonal import (
    Diagonal,
    check_mask,
    diagonals,
    moments,
    number,
    rounded,
)
from pyro_bmr.formulas.ratios import gain, informative, ratios, reduced_moments
from pyro_bmr.formulas.structure import Rescaled

_PIECE = 1 << 16  # weights at once, where a whole site would leave the cache


@singledispatch
def delta_f(posterior: Any, prior: Any, reduced_prior: Any) -> Tensor:
    r"""ΔF = log p̃(y) − log p(y), the change of log evidence when `prior` is replaced by
    `reduced_prior`. Positive favours the reduced prior.

    .. math:: \Delta F = \log \mathbb{E}_{q(\theta)}\left[\tilde p(\theta) / p(\theta)\right]

    Exact when `posterior` is exact. Source: Friston & Penny 2011, NeuroImage 56(4); Friston, Parr &
    Zeidman 2018, arXiv 1805.07092. Computed in float64 and rounded once to the posterior's dtype,
    so that the last digits are right whatever the moments are.

    Args:
        posterior: anything with `mean` and `var` (or `variance`) of one shape — `Diagonal`, a site
            of a `Posterior`, a torch `Normal` — or one of the structures `Dense`, `LowRank`,
            `MatrixNormal`.
        prior, reduced_prior: the same kind of thing, or for the diagonal form anything that
            broadcasts to the posterior's shape, `Gaussian(scale=0.3)` included. In the diagonal
            form a reduced prior of variance 0 is the point spike at its mean; for the other
            structures that question is `prune_subset`'s, for `Dense`.

    Returns:
        Tensor: In nats. Diagonal: one value per element, which add up to the block's ΔF; 0 where
            the posterior is wider than its prior, since the data said nothing there, unless the
            reduced prior is a point spike. Other structures: one value for the whole block.

    Raises:
        ReductionError: moments are not finite or not floating-point numbers, a variance is not
            positive, a covariance is not symmetric positive definite, no reduced posterior exists,
            or the answer is outside the range of its dtype.

    Example:
        >>> # log 2 − ½ (0.1/0.5)²
        >>> delta_f(torch.distributions.Normal(0.1, 0.5), Gaussian(1.0), Gaussian(0.0))
        tensor(0.6731)
    """
    dtype, *gaussians = diagonals(posterior, prior, reduced_prior)
    gains = [gain(ratios(*informative(*piece))).to(dtype) for piece in _in_pieces(*gaussians)]
    return rounded(_whole(gains, gaussians[0]), dtype, "ΔF")


@singledispatch
def reduced_posterior(posterior: Any, prior: Any, reduced_prior: Any) -> Any:
    r"""The posterior under the reduced prior, q̃(θ) ∝ q(θ) p̃(θ)/p(θ), in the structure of
    `posterior`; no new fit.

    .. math:: \tilde P = P + \tilde\Pi - \Pi, \qquad
        \tilde\mu = \tilde P^{-1}(P\mu + \tilde\Pi\tilde\eta - \Pi\eta)

    Arguments, sources and errors as for `delta_f`.
    """
    dtype, *gaussians = diagonals(posterior, prior, reduced_prior)
    means, variances = zip(
        *(
            [t.to(dtype) for t in reduced_moments(*informative(*piece))]
            for piece in _in_pieces(*gaussians)
        ),
        strict=True,
    )
    mean, var = (_whole(parts, gaussians[0]) for parts in (means, variances))
    if bool(((var == 0) & (gaussians[2].var > 0)).any()):
        raise ReductionError(
            f"the reduced posterior has a variance below the range of {dtype}; give moments of"
            " torch.float64"
        )
    return Diagonal(
        rounded(mean, dtype, "the reduced mean"), rounded(var, dtype, "the reduced variance")
    )


@singledispatch
def prune_subset(posterior: Any, prior: Any, pruned: Tensor) -> tuple[Tensor, Any]:
    r"""ΔF of setting the entries where `pruned` is True to exactly 0, and the posterior of the rest
    given that.

    .. math:: \Delta F = \log N(0; \mu_S, \Sigma_{SS}) - \log N(0; \eta_S, \Pi^{-1}_{SS}), \quad
        \mu_R - \Sigma_{RS}\Sigma_{SS}^{-1}\mu_S, \quad
        \Sigma_{RR} - \Sigma_{RS}\Sigma_{SS}^{-1}\Sigma_{SR}

    The Savage–Dickey ratio for a block; the shift of the mean is the optimal-brain-surgeon update
    (Hassibi & Stork 1993). `prior`: diagonal moments, for `Dense` also a `Dense`.

    Raises:
        ReductionError: as `delta_f`, or `pruned` is no mask of the posterior.

    Example:
        >>> # without the first and the third
        >>> gain, rest = prune_subset(Dense(mean, cov), Gaussian(1.0), tensor([True, False, True]))
    """
    q = moments(posterior)
    check_mask(pruned, q.mean)
    p = moments(prior, q.mean)
    each = delta_f(
        Diagonal(q.mean[pruned], q.var[pruned]),
        Diagonal(p.mean[pruned], p.var[pruned]),
        Diagonal(*q.mean.new_zeros(2).unbind()),
    )
    return each.sum(dtype=torch.float64).to(each.dtype), Diagonal(q.mean[~pruned], q.var[~pruned])


@singledispatch
def rescaled(posterior: Any, prior: Any, target: Any) -> Rescaled | None:
    """A structure under the diagonal Gaussian `target` in place of `prior`; None if there is no
    closed form.
    """
    after = reduced_posterior(posterior, prior, target)
    gain = total(delta_f(posterior, prior, target))
    return Rescaled(gain, after.mean, after.marginal_var, after)


def point_spike_delta_f(posterior: Diagonal, prior: Diagonal, mask: Tensor | None = None) -> Tensor:
    r"""ΔF of setting each weight to 0 by itself, the Savage–Dickey ratio of its marginals; NaN
    where `mask` says that it is pruned already.

    .. math:: \Delta F = \log q(0) - \log p(0) =
        \tfrac12 \log\frac{\sigma_0^2}{\sigma^2} - \tfrac12\frac{\mu^2}{\sigma^2} +
        \tfrac12\frac{\eta^2}{\sigma_0^2}

    The same number as `delta_f` with a reduced prior of mean 0 and variance 0, for many weights: in
    pieces that stay in a core's cache, with no tensor of the site's size but the result, and
    without gradients. `prior`: expanded to the posterior's shape or of one element.
    `reduction/reduced_site.py` calls it for each site (`site_reduction`).

    Raises:
        ReductionError: as `delta_f`, for the kept entries.
    """
    mean, var = posterior.mean.detach(), posterior.var.detach()
    out = torch.empty_like(mean, memory_format=torch.contiguous_format)
    spike = Diagonal(*mean.new_zeros(2).unbind())
    # with η = 0 two terms are left, which keep their digits in the posterior's own dtype
    quick = (
        mean.dtype == var.dtype
        and mean.dtype in (torch.float32, torch.float64)
        and not bool(number(prior.mean).any())
    )
    for piece, kept, m, v, pm, pv, half_log in _spike_pieces(out, mean, var, prior, mask):
        whole = kept is None or bool(kept.all())
        if quick:
            torch.div(m, v, out=piece)
            # −½(μ²/σ² + log σ²) + ½ log σ₀²
            torch.addcmul(v.log(), m, piece, out=piece).mul_(-0.5).add_(half_log)
        if not (quick and math.isfinite(float(piece.sum() if whole else piece[kept].sum()))):
            here = slice(None) if whole else kept
            piece[here] = delta_f(
                Diagonal(m[here], v[here]),
                Diagonal(pm.expand_as(m)[here], pv.expand_as(m)[here]),
                spike,
            )
        if kept is not None and not whole:
            piece.masked_fill_(~kept, torch.nan)
    return out


def _spike_pieces(
    out: Tensor, mean: Tensor, var: Tensor, prior: Diagonal, mask: Tensor | None
) -> Iterable[Any]:
    """Flat pieces of the result, the mask, the posterior's moments, the prior's, and ½ log σ₀²."""
    half = 0.5 * number(prior.var).detach().double().log()
    halves = (
        repeat(float(half))
        if half.numel() == 1
        else half.expand(mean.shape).reshape(-1).to(mean.dtype).split(_PIECE)
    )
    masks: Iterable[Tensor | None] = (
        repeat(None) if mask is None else mask.reshape(-1).split(_PIECE)
    )
    first, *own = (t.reshape(-1).split(_PIECE) for t in (out.view(-1), mean, var))
    priors = (_pieces(t.detach().expand(mean.shape)) for t in (prior.mean, prior.var))
    return zip(first, masks, *own, *priors, halves, strict=False)


def _in_pieces(*gaussians: Diagonal) -> Iterable[list[Tensor]]:
    """Means and variances in turn: the first one's entries, some at a time and in float64, with
    those of the others.
    """
    first, *others = gaussians
    columns = [t.reshape(-1).split(_PIECE) for t in (first.mean, first.var)] + [
        _pieces(t) for g in others for t in (g.mean, g.var)
    ]
    for parts in zip(*columns, strict=False):
        yield [t.double() for t in parts]


def _whole(parts: Sequence[Tensor], like: Diagonal) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).view(like.mean.shape)


def total(each: Tensor, where: Tensor | None = None) -> float:
    """Σ of the values in float64, or of those that `where` has, in pieces that stay in a core's
    cache.
    """
    parts: Iterable[Tensor] = each.reshape(-1).split(_PIECE)
    if where is not None:
        flags = where.reshape(-1).split(_PIECE)
        parts = (part[here] for part, here in zip(parts, flags, strict=True))
    return math.fsum(float(part.sum(dtype=torch.float64)) for part in parts)


def _pieces(whole: Tensor) -> Iterable[Tensor]:
    """The tensor in flat pieces, as views; a number that was expanded stays one number."""
    one = number(whole)
    return (
        repeat(one.reshape(1))
        if one.ndim == 0 and whole.numel()
        else whole.reshape(-1).split(_PIECE)
    )
