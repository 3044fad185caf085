r"""Reduction between Gaussian priors: ΔF and the reduced posterior, for every covariance structure.

Owns the structures `Diagonal` and `Dense`, the generic functions `delta_f`, `reduced_posterior` and
`prune_subset`, and their diagonal form; `dense.py`, `low_rank.py` and `matrix_normal.py` add theirs
to the same functions, `ratios.py` has the formulas of one weight. Imports torch only: tensors in,
tensors out. Next: `dense.py`.

Notation (docs/notation.md): prior N(η, Π⁻¹), posterior N(μ, P⁻¹), reduced prior N(η̃, Π̃⁻¹),
reduced posterior N(μ̃, P̃⁻¹); L = P − Π is the precision of what the data said, h = Pμ − Πη its
weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce, singledispatch
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from pyro_bmr.errors import ReductionError, described
from pyro_bmr.formulas.ratios import Ratios, gain, informative, ratios, reduced_moments

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
        Tensor: In nats. Diagonal: one value per element, whose sum is that of the block; 0 where
            the posterior is wider than its prior, about which the data said nothing, unless the
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
    dtype, *gaussians = _diagonals(posterior, prior, reduced_prior)
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
    dtype, *gaussians = _diagonals(posterior, prior, reduced_prior)
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


def message(q: Any, p: Any, about: Tensor | float | None = None) -> Message:
    r"""The data's factor in the posterior: L = P − Π and h = P(μ − η), for weights counted from the
    prior mean.

    `about`: another point e from which they are counted; then h = P(μ − e) + Π(e − η), which is the
    same factor in w = θ − e.

    Raises:
        ReductionError: as `delta_f`, or the message is outside the range of its dtype.
    """
    dtype, q, p, _ = _diagonals(q, p, p)
    precision = (p.var - q.var) / p.var / q.var
    h = (q.mean - (p.mean if about is None else about)) / q.var
    h = h if about is None else h + (about - p.mean) / p.var
    return Message(
        rounded(h.to(dtype), dtype, "the message"),
        rounded(precision.to(dtype), dtype, "the message"),
    )


def log_evidence_ratio(
    data: Message, prior_var: Tensor, reduced_var: Tensor, shift: Tensor | float = 0.0
) -> Tensor:
    r"""ΔF per element between N(0, σ₀²) and N(e, v) given the message exp(h w − ½ L w²); safe at v
    = 0.

    .. math:: \Delta F = -\tfrac12 \log\frac{1 + vL}{1 + \sigma_0^2 L}
        + \frac{h^2 (v - \sigma_0^2)}{2 (1 + vL)(1 + \sigma_0^2 L)} + \frac{2he - Le^2}{2 (1 + vL)}

    Where the posterior is wider than its prior (L ≤ 0) the data said nothing: the message counts as
    h = L = 0 unless v = 0, which needs no L. A message of large means and small variances, h ≈ Le,
    has lost what `delta_f` sees in the moments themselves.
    """
    h, precision, p, v, e = (
        torch.as_tensor(t, device=data.h.device).double()
        for t in (*data, prior_var, reduced_var, shift)
    )
    silent = (precision <= 0) & (v > 0)
    h, precision = h.masked_fill(silent, 0.0), precision.masked_fill(silent, 0.0)
    full, root = 1 + p * precision, p.sqrt()  # p/s
    at_e = (p * (h - e * precision) - e) / (full * root)  # (μ − e)/√p
    return gain(
        Ratios(1 / full, p * precision / full, v / p, (p - v) / p, h * root / full, e / root, at_e)
    ).to(data.h.dtype)


def point_spike_delta_f(posterior: Diagonal, prior: Diagonal, mask: Tensor | None = None) -> Tensor:
    r"""ΔF of setting each weight to 0 by itself, the Savage–Dickey ratio of its marginals; NaN
    where `mask` says that it is pruned already.

    .. math:: \Delta F = \log q(0) - \log p(0) =
        \tfrac12 \log\frac{\sigma_0^2}{\sigma^2} - \tfrac12\frac{\mu^2}{\sigma^2} +
        \tfrac12\frac{\eta^2}{\sigma_0^2}

    The same number as `delta_f` with a reduced prior of mean 0 and variance 0, for many weights: in
    pieces that stay in a core's cache, with no tensor of the site's size but the result, and
    without gradients. `prior`: expanded to the posterior's shape or of one element.
    `reduction/rules.py` calls it for each site (`site_reduction`).

    Raises:
        ReductionError: as `delta_f`, for the entries that live.
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
    half = 0.5 * number(prior.var).detach().double().log()
    parts = [_pieces(t.detach().expand(mean.shape)) for t in (prior.mean, prior.var)]
    halves = (
        repeat(float(half))
        if half.numel() == 1
        else half.expand(mean.shape).reshape(-1).to(mean.dtype).split(_PIECE)
    )
    masks: Iterable[Tensor | None] = (
        repeat(None) if mask is None else mask.reshape(-1).split(_PIECE)
    )
    columns = zip(
        out.view(-1).split(_PIECE),
        masks,
        mean.reshape(-1).split(_PIECE),
        var.reshape(-1).split(_PIECE),
        *parts,
        halves,
        strict=False,
    )
    for piece, alive, m, v, pm, pv, half_log in columns:
        whole = alive is None or bool(alive.all())
        if quick:
            torch.div(m, v, out=piece)
            # −½(μ²/σ² + log σ²) + ½ log σ₀²
            torch.addcmul(v.log(), m, piece, out=piece).mul_(-0.5).add_(half_log)
        if not (quick and math.isfinite(float(piece.sum() if whole else piece[alive].sum()))):
            here = slice(None) if whole else alive
            piece[here] = delta_f(
                Diagonal(m[here], v[here]),
                Diagonal(pm.expand_as(m)[here], pv.expand_as(m)[here]),
                spike,
            )
        if alive is not None and not whole:
            piece.masked_fill_(~alive, torch.nan)
    return out


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


def total(each: Tensor) -> float:
    """Σ of the values in float64, in pieces that stay in a core's cache."""
    return math.fsum(
        float(piece.sum(dtype=torch.float64)) for piece in each.reshape(-1).split(_PIECE)
    )


def _pieces(whole: Tensor) -> Iterable[Tensor]:
    """The tensor in flat pieces, as views; a number that was expanded stays one number."""
    one = number(whole)
    return (
        repeat(one.reshape(1))
        if one.ndim == 0 and whole.numel()
        else whole.reshape(-1).split(_PIECE)
    )


def number(t: Tensor) -> Tensor:
    """A number that was expanded, as a number again."""
    return (
        t.as_strided((), ())
        if t.numel()
        and all(stride == 0 or size == 1 for stride, size in zip(t.stride(), t.shape, strict=True))
        else t
    )


def rounded(value: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """`value` in `dtype`; ReductionError where it is outside its range."""
    value = value.to(dtype)
    if bad := int((~value.isfinite()).sum()):
        mend = (
            "give moments of torch.float64"
            if dtype != torch.float64
            else "the moments are too far apart for any float"
        )
        raise ReductionError(
            f"{what} leaves the range of {dtype} for {bad} of {value.numel()} values; {mend}"
        )
    return value


def moments(gaussian: Any, like: Tensor | None = None) -> Diagonal:
    """`gaussian` (anything with `mean` and `var` or `variance`) as a `Diagonal`, expanded to the
    shape of `like`, on its device. Numbers are in float64.
    """
    known = (
        hasattr(gaussian, "mean")
        and (hasattr(gaussian, "var") or hasattr(gaussian, "variance"))
        and not callable(gaussian.mean)
    )
    if isinstance(gaussian, type) or not known:
        raise ReductionError(f"a Gaussian, with mean and var, is wanted; got {described(gaussian)}")
    if isinstance(gaussian, Normal):  # its own variance may underflow
        mean, var = gaussian.loc, gaussian.scale.double().square()
    else:
        mean, var = (
            _floating(t)
            for t in (
                gaussian.mean,
                gaussian.var if hasattr(gaussian, "var") else gaussian.variance,
            )
        )
    if like is not None:
        mean, var = mean.to(like.device), var.to(like.device)
    shape = like.shape if like is not None else None
    try:
        return Diagonal(
            *(
                torch.broadcast_tensors(mean, var)
                if shape is None
                else (mean.expand(shape), var.expand(shape))
            )
        )
    except RuntimeError:
        got = (
            f"{tuple(mean.shape)}"
            if mean.shape == var.shape
            else f"{tuple(mean.shape)} and {tuple(var.shape)}"
        )
        if shape is None:
            raise ReductionError(
                f"mean and var of shapes {got} do not fit each other; give one shape"
            ) from None
        raise ReductionError(
            f"a prior of shape {got} does not fit a posterior of shape {tuple(shape)}; give one of"
            " that shape or a number"
        ) from None


def _floating(value: Any) -> Tensor:
    number_ = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        tensor = torch.tensor(value, dtype=torch.float64) if number_ else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ReductionError(
            f"mean and var must be floating-point numbers, got {described(value)}; give tensors"
        ) from None
    if not tensor.is_floating_point():
        raise ReductionError(
            f"mean and var must be floating-point numbers, got {tensor.dtype}; give tensor.float()"
        )
    return tensor


def result_dtype(gaussian: Any) -> torch.dtype:
    """The dtype in which answers about a posterior are given: that of its moments."""
    if isinstance(gaussian, Normal):
        return gaussian.loc.dtype
    parts = (gaussian.mean, gaussian.var if hasattr(gaussian, "var") else gaussian.variance)
    dtypes = [_floating(t).dtype for t in parts if hasattr(t, "dtype")]
    return reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()


def check_mask(pruned: Tensor, mean: Tensor) -> None:
    """ReductionError unless `pruned` is a bool tensor of the shape of `mean`."""
    if not isinstance(pruned, Tensor) or pruned.dtype != torch.bool or pruned.shape != mean.shape:
        got = (
            f"{pruned.dtype} of shape {tuple(pruned.shape)}"
            if isinstance(pruned, Tensor)
            else type(pruned).__name__
        )
        raise ReductionError(
            f"pruned: a bool tensor of shape {tuple(mean.shape)} is wanted, got {got}"
        )


def check_diagonal(role: str, one: Diagonal, floor: str = "> 0") -> None:
    """ReductionError unless the means are finite and the variances finite and > 0, or >= 0."""
    good = one.var > 0 if floor == "> 0" else one.var >= 0
    if not bool((good & one.mean.isfinite() & one.var.isfinite()).all()):
        raise ReductionError(
            f"the {role} must have finite moments and variance {floor}; got {int((~good).sum())} of"
            f" {good.numel()} variances outside,"
            f" {int((~one.mean.isfinite() | ~one.var.isfinite()).sum())} not finite; a point"
            " estimate has no variance to reduce"
        )


def _diagonals(
    posterior: Any, prior: Any, reduced_prior: Any
) -> tuple[torch.dtype, Diagonal, Diagonal, Diagonal]:
    """The posterior's dtype, and the three with moments that are fit for a formula, expanded to its
    shape.
    """
    q = moments(posterior)
    p, p_ = moments(prior, q.mean), moments(reduced_prior, q.mean)
    for role, one, floor in (
        ("posterior", q, "> 0"),
        ("prior", p, "> 0"),
        ("reduced prior", p_, ">= 0"),
    ):
        check_diagonal(role, one, floor)
    return result_dtype(posterior), q, p, p_
