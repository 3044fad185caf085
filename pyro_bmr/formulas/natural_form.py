r"""Members of exponential families by natural parameters λ and log-normaliser A: the continuous
families that torch knows.

Owns `NaturalForm`, `natural_form`, and what the discrete families of `discrete_form.py` share with
these. Imports torch only. In float64 from the parameters that the user gave. Next:
`discrete_form.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import singledispatch
from typing import Any, NamedTuple

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.dense import joint_reduction
from pyro_bmr.formulas.log_gamma import log_rising
from pyro_bmr.formulas.ratios import gain, ratios


class NaturalForm(NamedTuple):
    """One member of a family: its parameters λ, the log-normaliser A(λ) per batch element, where A
    is finite, and the way back.

    `carrier`: what of the distribution belongs to the carrier measure; equal for all members of one
    family. `dtype`: that of the answers, by default that of λ. `delta_f`: ΔF from the `source` of
    posterior, prior and reduced prior, where the difference of four A would lose digits that
    another form keeps.
    """

    family: str
    lam: tuple[Tensor, ...]
    log_normalizer: Callable[..., Tensor]
    contains: Callable[..., Tensor]
    member: Callable[..., Distribution]
    carrier: tuple[Any, ...] = ()
    dtype: torch.dtype | None = None
    source: tuple[Tensor, ...] = ()
    delta_f: Callable[..., Tensor] | None = None


@singledispatch
def natural_form(distribution: Any) -> NaturalForm:
    """The distribution by natural parameters. Register a family of your own with
    `natural_form.register`.

    Raises:
        ReductionError: the family is not known.
    """
    raise ReductionError(
        f"{type(distribution).__name__} is not known as a member of one exponential family; use"
        " monte_carlo_delta_f with draws of the posterior"
    )


def positive(*lam: Tensor) -> Tensor:
    """Whether all are > 0."""
    return torch.stack([(x > 0).all() for x in lam]).all()


def definite(matrix: Tensor) -> Tensor:
    """Whether all matrices are positive definite."""
    symmetric = (matrix + matrix.mT) / 2
    return (
        symmetric.isfinite().all()
        & (torch.linalg.cholesky_ex(symmetric.nan_to_num()).info == 0).all()
    )


def not_nan(*lam: Tensor) -> Tensor:
    """Whether none is NaN."""
    return ~torch.stack([x.isnan().any() for x in lam]).any()


def wide(*parameters: Tensor) -> tuple[Tensor, ...]:
    """In float64, in which all of this is computed."""
    return tuple(t.double() for t in torch.broadcast_tensors(*parameters))


def cast_like(like: Tensor, *parameters: Tensor) -> Any:
    """Parameters in the dtype of `like`."""
    return tuple(t.to(like.dtype) for t in parameters)


@natural_form.register
def _(d: td.Normal) -> NaturalForm:
    loc, scale = wide(d.loc, d.scale)
    precision = scale**-2  # T(x) = (x, −½ x²)
    return NaturalForm(
        "Normal",
        (loc * precision, precision),
        lambda h, p: 0.5 * h.square() / p - 0.5 * p.log(),
        lambda h, p: positive(p) & not_nan(h),
        lambda h, p: td.Normal(*cast_like(d.loc, h / p, p.rsqrt())),
        dtype=d.loc.dtype,
        source=(loc, scale.square()),
        delta_f=lambda q, p, r: gain(ratios(*q, *p, *r)),
    )


@natural_form.register
def _(d: td.HalfNormal) -> NaturalForm:
    (scale,) = wide(d.scale)
    return NaturalForm(
        "HalfNormal",
        (scale**-2,),
        lambda p: -0.5 * p.log(),
        positive,
        lambda p: td.HalfNormal(*cast_like(d.scale, p.rsqrt())),
        dtype=d.scale.dtype,
    )


@natural_form.register(td.MultivariateNormal)
@natural_form.register(td.LowRankMultivariateNormal)
def _(d: td.MultivariateNormal | td.LowRankMultivariateNormal) -> NaturalForm:
    def log_normalizer(h: Tensor, p: Tensor) -> Tensor:
        chol = torch.linalg.cholesky(p)
        return 0.5 * torch.linalg.solve_triangular(chol, h[..., None], upper=False)[
            ..., 0
        ].square().sum(-1) - chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def member(h: Tensor, p: Tensor) -> Distribution:
        chol = torch.linalg.cholesky(p)
        tril = torch.linalg.cholesky(torch.cholesky_inverse(chol))
        mean, tril = cast_like(d.loc, torch.cholesky_solve(h[..., None], chol)[..., 0], tril)
        return td.MultivariateNormal(mean, scale_tril=tril)

    def delta_f(
        q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor], r: tuple[Tensor, Tensor]
    ) -> Tensor:
        return joint_reduction(q[1], p[1], r[1], q[0] - r[0], r[0] - p[0]).delta_f

    loc, tril = d.loc.double(), _scale_tril(d)
    p = torch.cholesky_inverse(tril)
    lam = ((p @ loc[..., None])[..., 0], p)
    return NaturalForm(
        "MultivariateNormal",
        lam,
        log_normalizer,
        lambda h, p: definite(p) & not_nan(h),
        member,
        (),
        d.loc.dtype,
        source=(loc, tril),
        delta_f=delta_f,
    )


def _scale_tril(d: Any) -> Tensor:
    """The Cholesky factor of a covariance or a scale, from the parameter that the user gave:
    torch's own has the errors of its dtype.
    """
    if isinstance(d, td.LowRankMultivariateNormal):
        factor = d.cov_factor.double()
        return torch.linalg.cholesky(factor @ factor.mT + d.cov_diag.double().diag_embed())
    given = vars(d)
    if "covariance_matrix" in given:
        return torch.linalg.cholesky(given["covariance_matrix"].double())
    if "precision_matrix" in given:
        return torch.linalg.cholesky(
            torch.cholesky_inverse(torch.linalg.cholesky(given["precision_matrix"].double()))
        )
    return d.scale_tril.double()


def _gamma(concentration: Tensor, rate: Tensor) -> NaturalForm:
    def delta_f(
        q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor], r: tuple[Tensor, Tensor]
    ) -> Tensor:
        more, faster = r[0] - p[0], r[1] - p[1]
        rates = (
            more * ((q[1] + faster).log() - r[1].log())
            + q[0] * (faster / q[1]).log1p()
            - p[0] * (faster / p[1]).log1p()
        )
        return log_rising(q[0], more) - log_rising(p[0], more) - rates

    lam = wide(concentration, rate)
    return NaturalForm(
        "Gamma",
        lam,
        lambda a, b: torch.lgamma(a) - a * b.log(),
        positive,
        lambda a, b: td.Gamma(*cast_like(concentration, a, b)),
        dtype=concentration.dtype,
        source=lam,
        delta_f=delta_f,
    )


@natural_form.register
def _(d: td.Gamma) -> NaturalForm:  # a Chi2 is one
    return _gamma(d.concentration, d.rate)


@natural_form.register
def _(d: td.Exponential) -> NaturalForm:
    return _gamma(torch.ones_like(d.rate), d.rate)


def _dirichlet_delta_f(q: tuple[Tensor], p: tuple[Tensor], r: tuple[Tensor]) -> Tensor:
    more = r[0] - p[0]
    parts, totals = (
        (log_rising(a, k) - log_rising(b, k))
        for a, b, k in ((q[0], p[0], more), (q[0].sum(-1), p[0].sum(-1), more.sum(-1)))
    )
    return parts.sum(-1) - totals


@natural_form.register
def _(d: td.Beta) -> NaturalForm:
    lam = wide(d.concentration1, d.concentration0)
    return NaturalForm(
        "Beta",
        lam,
        lambda a, b: torch.lgamma(b) - log_rising(a, b),
        positive,
        lambda a, b: td.Beta(*cast_like(d.concentration1, a, b)),
        dtype=d.concentration1.dtype,
        source=(torch.stack(lam, -1),),
        delta_f=_dirichlet_delta_f,
    )


@natural_form.register
def _(d: td.Dirichlet) -> NaturalForm:
    lam = wide(d.concentration)
    return NaturalForm(
        "Dirichlet",
        lam,
        lambda a: torch.lgamma(a).sum(-1) - torch.lgamma(a.sum(-1)),
        positive,
        lambda a: td.Dirichlet(*cast_like(d.concentration, a)),
        dtype=d.concentration.dtype,
        source=lam,
        delta_f=_dirichlet_delta_f,
    )


@natural_form.register
def _(d: td.VonMises) -> NaturalForm:
    def log_normalizer(c: Tensor, s: Tensor) -> Tensor:  # log I₀(κ)
        kappa = torch.hypot(c, s)
        return torch.special.i0e(kappa).log() + kappa

    loc, concentration = wide(d.loc, d.concentration)
    return NaturalForm(
        "VonMises",
        (concentration * loc.cos(), concentration * loc.sin()),
        log_normalizer,
        not_nan,
        lambda c, s: td.VonMises(*cast_like(d.loc, torch.atan2(s, c), torch.hypot(c, s))),
        dtype=d.loc.dtype,
    )


@natural_form.register
def _(d: td.Wishart) -> NaturalForm:
    k = d.event_shape[-1]

    def log_normalizer(inv_scale: Tensor, df: Tensor) -> Tensor:
        return 0.5 * df * (
            k * math.log(2) - torch.linalg.slogdet(inv_scale).logabsdet
        ) + torch.mvlgamma(df / 2, k)

    return NaturalForm(
        "Wishart",
        (torch.cholesky_inverse(_scale_tril(d)), d.df.double()),
        log_normalizer,
        lambda inv_scale, df: definite(inv_scale) & positive(df - (k - 1)),
        lambda inv_scale, df: td.Wishart(
            df.to(d.df.dtype), precision_matrix=inv_scale.to(d.df.dtype)
        ),
        dtype=d.df.dtype,
    )


@natural_form.register
def _(d: td.TransformedDistribution) -> NaturalForm:
    """p̃/p does not change under a bijection."""
    if not all(t.bijective for t in d.transforms):
        raise ReductionError(
            f"{type(d).__name__} is a transform that has no inverse; give its base distribution"
        )
    base = natural_form(d.base_dist)

    def member(*lam: Tensor) -> Distribution:
        return td.TransformedDistribution(base.member(*lam), d.transforms)

    return base._replace(
        family=f"transformed {base.family}", member=member, carrier=(*base.carrier, *d.transforms)
    )
