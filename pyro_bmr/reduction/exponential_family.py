r"""The law of reduction for exponential families: one formula for Gaussian, Gamma, Beta, Dirichlet, Categorical and the rest that torch knows.

Owns `natural_delta_f`, `natural_posterior`, and the natural form of each family. Imports torch only. The Gaussian forms of `gaussian.py` are
special cases and are tested against it.

A family is a carrier measure h with p(x | λ) = h(x) exp(λ·T(x) − A(λ)). The carrier cancels in p̃/p only between members of one family, so what
belongs to the carrier (the number of trials of a binomial, the transforms of a transformed distribution) must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any, NamedTuple

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmr.errors import ReductionError


class NaturalForm(NamedTuple):
    """One member of a family: its parameters λ, the log-normaliser A(λ) per batch element, where A is finite, and the way back.

    `carrier`: what of the distribution belongs to the carrier measure; equal for all members of one family."""

    family: str
    lam: tuple[Tensor, ...]
    log_normalizer: Callable[..., Tensor]
    contains: Callable[..., Tensor]
    member: Callable[..., Distribution]
    carrier: tuple[Any, ...] = ()


def natural_delta_f(posterior: Distribution, prior: Distribution, reduced_prior: Distribution) -> Tensor:
    r"""ΔF = log p̃(y) − log p(y) by natural parameters λ and log-normaliser A, per element of the batch.

    .. math:: \tilde\lambda' = \lambda' + \tilde\lambda - \lambda, \qquad
        \Delta F = A(\tilde\lambda') - A(\tilde\lambda) - A(\lambda') + A(\lambda)

    λ' is the posterior's parameter, λ the prior's, λ̃ the reduced prior's. The three must be of one family; an Exponential or Chi2 counts as a
    Gamma, a `TransformedDistribution` (LogNormal, InverseGamma, ...) as its base when the transforms agree, and `Independent` sums over its event.
    A category that the reduced prior rules out (probability 0) may be asked about. Source: Friston, Parr & Zeidman 2018, arXiv 1805.07092.

    Raises:
        ReductionError: the families differ, shapes do not fit the posterior's, or λ̃' is outside the family (the posterior is wider than its prior).

    Example:
        >>> natural_delta_f(Beta(8.0, 3.0), Beta(1.0, 1.0), Beta(5.0, 5.0))  # seven of nine throws, and a prior that asks for a fair coin
        tensor(0.0179)
    """
    if isinstance(posterior, td.Independent):
        forms = _independent(posterior, prior, reduced_prior)
        return natural_delta_f(*(d.base_dist for d in forms)).flatten(-forms[0].reinterpreted_batch_ndims).sum(-1)
    q, p, r, new = _forms(posterior, prior, reduced_prior)
    gain = q.log_normalizer(*new) - r.log_normalizer(*r.lam) - q.log_normalizer(*q.lam) + p.log_normalizer(*p.lam)
    if not bool(gain.isfinite().all()):
        raise ReductionError(f"ΔF is not finite in the {q.family} family: a parameter is not finite, or the prior rules out what the reduced prior allows")
    return gain


def natural_posterior(posterior: Distribution, prior: Distribution, reduced_prior: Distribution) -> Distribution:
    r"""The posterior under the reduced prior, λ̃' = λ' + λ̃ − λ, as a distribution of the same family. Arguments and errors as for `natural_delta_f`.

    Example:
        >>> natural_posterior(Beta(8.0, 3.0), Beta(1.0, 1.0), Beta(5.0, 5.0)).mean  # of Beta(12, 7)
        tensor(0.6316)
    """
    if isinstance(posterior, td.Independent):
        forms = _independent(posterior, prior, reduced_prior)
        return td.Independent(natural_posterior(*(d.base_dist for d in forms)), forms[0].reinterpreted_batch_ndims)
    q, _, _, new = _forms(posterior, prior, reduced_prior)
    return q.member(*new)


def _forms(posterior: Distribution, prior: Distribution, reduced_prior: Distribution) -> tuple[NaturalForm, NaturalForm, NaturalForm, tuple[Tensor, ...]]:
    """The natural forms of the three, and λ̃'."""
    q, p, r = (natural_form(d) for d in (posterior, prior, reduced_prior))
    if not q.family == p.family == r.family:
        names = ", ".join(type(d).__name__ for d in (posterior, prior, reduced_prior))
        raise ReductionError(f"posterior, prior and reduced prior must be of one exponential family; got {names}")
    for role, distribution, form in (("prior", prior, p), ("reduced prior", reduced_prior, r)):
        fits = distribution.event_shape == posterior.event_shape and _broadcasts(distribution.batch_shape, posterior.batch_shape)
        if not fits:
            raise ReductionError(
                f"a {role} of batch shape {tuple(distribution.batch_shape)} and event shape {tuple(distribution.event_shape)} does not fit a posterior of "
                f"batch shape {tuple(posterior.batch_shape)} and event shape {tuple(posterior.event_shape)}; give one of that shape or a single one"
            )
        if not all(_equal(a, b) for a, b in zip(q.carrier, form.carrier, strict=True)):
            raise ReductionError(f"the {role} has another carrier measure than the posterior (number of trials, or transforms); give them the same")
    # −∞ is the log of a probability 0: what the reduced prior rules out stays ruled out, whatever the others say
    new = tuple(torch.where(c.isneginf(), c, a + c - b) for a, b, c in zip(q.lam, p.lam, r.lam, strict=True))
    if not bool(q.contains(*new).all()):
        raise ReductionError(
            f"no reduced posterior exists in the {q.family} family for these parameters: the posterior is wider than its "
            "prior; fit longer, or reduce to a narrower prior"
        )
    return q, p, r, new


def _independent(*distributions: Distribution) -> tuple[td.Independent, ...]:
    first = distributions[0]
    assert isinstance(first, td.Independent)
    for d in distributions[1:]:
        if not isinstance(d, td.Independent) or d.reinterpreted_batch_ndims != first.reinterpreted_batch_ndims or d.event_shape != first.event_shape:
            raise ReductionError(
                f"posterior, prior and reduced prior must have one event shape; got {tuple(first.event_shape)} and {tuple(d.event_shape)}; "
                "give all three the same .to_event()"
            )
    return distributions  # type: ignore[return-value]


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return bool((a == b).all())
    return a == b


@singledispatch
def natural_form(distribution: Any) -> NaturalForm:
    """The distribution by natural parameters. Register a family of your own with `natural_form.register`.

    Raises:
        ReductionError: the family is not known.
    """
    raise ReductionError(
        f"{type(distribution).__name__} is not known as a member of one exponential family; use monte_carlo_delta_f with draws of the posterior"
    )


def _positive(*lam: Tensor) -> Tensor:
    return torch.stack([(x > 0).all() for x in lam]).all()


def _definite(matrix: Tensor) -> Tensor:
    symmetric = (matrix + matrix.mT) / 2
    return symmetric.isfinite().all() & (torch.linalg.cholesky_ex(symmetric.nan_to_num()).info == 0).all()


def _not_nan(*lam: Tensor) -> Tensor:
    return ~torch.stack([x.isnan().any() for x in lam]).any()


@natural_form.register
def _(d: td.Normal) -> NaturalForm:
    precision = d.scale**-2  # T(x) = (x, −½ x²)
    return NaturalForm(
        "Normal",
        (d.loc * precision, precision),
        lambda h, p: 0.5 * h.square() / p - 0.5 * p.log(),
        lambda h, p: _positive(p) & _not_nan(h),
        lambda h, p: td.Normal(h / p, p.rsqrt()),
    )


@natural_form.register
def _(d: td.HalfNormal) -> NaturalForm:
    return NaturalForm("HalfNormal", (d.scale**-2,), lambda p: -0.5 * p.log(), _positive, lambda p: td.HalfNormal(p.rsqrt()))


@natural_form.register(td.MultivariateNormal)
@natural_form.register(td.LowRankMultivariateNormal)
def _(d: td.MultivariateNormal | td.LowRankMultivariateNormal) -> NaturalForm:
    def log_normalizer(h: Tensor, p: Tensor) -> Tensor:
        chol = torch.linalg.cholesky(p)
        return 0.5 * torch.linalg.solve_triangular(chol, h[..., None], upper=False)[..., 0].square().sum(-1) - chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def member(h: Tensor, p: Tensor) -> Distribution:
        return td.MultivariateNormal(torch.linalg.solve(p, h), precision_matrix=p)

    p = d.precision_matrix
    return NaturalForm("MultivariateNormal", ((p @ d.loc[..., None])[..., 0], p), log_normalizer, lambda h, p: _definite(p) & _not_nan(h), member)


def _gamma(concentration: Tensor, rate: Tensor) -> NaturalForm:
    return NaturalForm("Gamma", (concentration, rate), lambda a, b: torch.lgamma(a) - a * b.log(), _positive, td.Gamma)


@natural_form.register
def _(d: td.Gamma) -> NaturalForm:  # a Chi2 is one
    return _gamma(d.concentration, d.rate)


@natural_form.register
def _(d: td.Exponential) -> NaturalForm:
    return _gamma(torch.ones_like(d.rate), d.rate)


@natural_form.register
def _(d: td.Beta) -> NaturalForm:
    return NaturalForm("Beta", (d.concentration1, d.concentration0), lambda a, b: torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b), _positive, td.Beta)


@natural_form.register
def _(d: td.Dirichlet) -> NaturalForm:
    return NaturalForm("Dirichlet", (d.concentration,), lambda a: torch.lgamma(a).sum(-1) - torch.lgamma(a.sum(-1)), _positive, td.Dirichlet)


def _two_states(d: Any) -> Tensor:
    """(log(1 − p), log p) in a last dimension; exact at p = 0 and 1, where the `logits` of torch are clamped."""
    probs = d.__dict__.get("probs")
    if probs is not None and getattr(d, "_param", probs) is probs:
        return torch.stack([(-d.probs).log1p(), d.probs.log()], -1)
    return torch.nn.functional.logsigmoid(torch.stack([-d.logits, d.logits], -1))


def _states(d: td.Categorical) -> Tensor:
    return d.probs.log() if d._param is d.__dict__.get("probs") else d.logits


def _finite(family: str, log_p: Tensor, member: Callable[..., Distribution], trials: Tensor | int | None = None) -> NaturalForm:
    """K states with log weights λ. `trials` of them, independent, are one draw; their number is in the carrier."""
    n = 1 if trials is None else trials
    return NaturalForm(family, (log_p,), lambda x: n * x.logsumexp(-1), lambda x: _not_nan(x), member, () if trials is None else (trials,))


@natural_form.register
def _(d: td.Bernoulli) -> NaturalForm:
    return _finite("Bernoulli", _two_states(d), lambda x: td.Bernoulli(x.softmax(-1)[..., 1]))


@natural_form.register
def _(d: td.Binomial) -> NaturalForm:
    return _finite("Binomial", _two_states(d), lambda x: td.Binomial(d.total_count, x.softmax(-1)[..., 1]), d.total_count)


@natural_form.register
def _(d: td.Categorical) -> NaturalForm:
    return _finite("Categorical", _states(d), lambda x: td.Categorical(x.softmax(-1)))


@natural_form.register
def _(d: td.OneHotCategorical) -> NaturalForm:
    return _finite("OneHotCategorical", _states(d._categorical), lambda x: td.OneHotCategorical(x.softmax(-1)))


@natural_form.register
def _(d: td.Multinomial) -> NaturalForm:
    return _finite("Multinomial", _states(d._categorical), lambda x: td.Multinomial(d.total_count, x.softmax(-1)), d.total_count)


@natural_form.register
def _(d: td.Geometric) -> NaturalForm:  # (1 − p)^x p: λ = log(1 − p)
    return NaturalForm("Geometric", (_two_states(d)[..., 0],), lambda x: -(-x.expm1()).log(), lambda x: _positive(-x), lambda x: td.Geometric(-x.expm1()))


@natural_form.register
def _(d: td.NegativeBinomial) -> NaturalForm:  # ∝ p^x (1 − p)^n: λ = log p
    n = d.total_count
    return NaturalForm(
        "NegativeBinomial",
        (_two_states(d)[..., 1],),
        lambda x: -n * (-x.expm1()).log(),
        lambda x: _positive(-x),
        lambda x: td.NegativeBinomial(n, x.exp()),
        (n,),
    )


@natural_form.register
def _(d: td.Poisson) -> NaturalForm:
    return NaturalForm("Poisson", (d.rate.log(),), torch.exp, _not_nan, lambda x: td.Poisson(x.exp()))


@natural_form.register
def _(d: td.ContinuousBernoulli) -> NaturalForm:
    return NaturalForm("ContinuousBernoulli", (d.logits,), d._log_normalizer, _not_nan, lambda x: td.ContinuousBernoulli(logits=x))


@natural_form.register
def _(d: td.VonMises) -> NaturalForm:
    def log_normalizer(c: Tensor, s: Tensor) -> Tensor:  # log I₀(κ)
        kappa = torch.hypot(c, s)
        return torch.special.i0e(kappa).log() + kappa

    lam = (d.concentration * d.loc.cos(), d.concentration * d.loc.sin())
    return NaturalForm("VonMises", lam, log_normalizer, _not_nan, lambda c, s: td.VonMises(torch.atan2(s, c), torch.hypot(c, s)))


@natural_form.register
def _(d: td.Wishart) -> NaturalForm:
    k = d.event_shape[-1]

    def log_normalizer(inv_scale: Tensor, df: Tensor) -> Tensor:
        return 0.5 * df * (k * torch.log(torch.tensor(2.0, dtype=df.dtype)) - torch.linalg.slogdet(inv_scale).logabsdet) + torch.mvlgamma(df / 2, k)

    return NaturalForm(
        "Wishart",
        (d.precision_matrix, d.df),
        log_normalizer,
        lambda inv_scale, df: _definite(inv_scale) & _positive(df - (k - 1)),
        lambda inv_scale, df: td.Wishart(df, precision_matrix=inv_scale),
    )


@natural_form.register
def _(d: td.TransformedDistribution) -> NaturalForm:
    """p̃/p does not change under a bijection."""
    if not all(t.bijective for t in d.transforms):
        raise ReductionError(f"{type(d).__name__} is a transform that has no inverse; give its base distribution")
    base = natural_form(d.base_dist)

    def member(*lam: Tensor) -> Distribution:
        return td.TransformedDistribution(base.member(*lam), d.transforms)

    return base._replace(family=f"transformed {base.family}", member=member, carrier=(*base.carrier, *d.transforms))
