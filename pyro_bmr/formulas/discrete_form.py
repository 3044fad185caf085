r"""The discrete exponential families of torch by natural parameters, and the continuous Bernoulli.

Owns no name: it registers them with `natural_form`, and hands that on. Imports torch only. Next:
`exponential_family.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmr.formulas.natural_form import (
    NaturalForm,
    cast_like,
    natural_form,
    not_nan,
    positive,
    wide,
)

__all__ = ["natural_form"]


def _two_states(d: Any) -> Tensor:
    """(log(1 − p), log p) in a last dimension; exact at p = 0 and 1, where the `logits` of torch
    are clamped.
    """
    probs = d.__dict__.get("probs")
    if probs is not None and getattr(d, "_param", probs) is probs:
        probs = probs.double()
        return torch.stack([(-probs).log1p(), probs.log()], -1)
    logits = d.logits.double()
    return torch.nn.functional.logsigmoid(torch.stack([-logits, logits], -1))


def _states(d: td.Categorical) -> Tensor:
    return d.probs.double().log() if d._param is d.__dict__.get("probs") else d.logits.double()


def _finite(
    family: str,
    log_p: Tensor,
    dtype: torch.dtype,
    member: Callable[..., Distribution],
    trials: Tensor | int | None = None,
) -> NaturalForm:
    """K states with log weights λ. `trials` of them, independent, are one draw; their number is in
    the carrier. `member`: from probabilities.
    """
    n = 1 if trials is None else trials
    carrier = () if trials is None else (trials,)
    return NaturalForm(
        family,
        (log_p,),
        lambda x: n * x.logsumexp(-1),
        lambda x: not_nan(x),
        lambda x: member(x.softmax(-1).to(dtype)),
        carrier,
        dtype,
    )


@natural_form.register
def _(d: td.Bernoulli) -> NaturalForm:
    return _finite("Bernoulli", _two_states(d), d._param.dtype, lambda p: td.Bernoulli(p[..., 1]))


@natural_form.register
def _(d: td.Binomial) -> NaturalForm:
    return _finite(
        "Binomial",
        _two_states(d),
        d._param.dtype,
        lambda p: td.Binomial(d.total_count, p[..., 1]),
        d.total_count,
    )


@natural_form.register
def _(d: td.Categorical) -> NaturalForm:
    return _finite("Categorical", _states(d), d._param.dtype, td.Categorical)


@natural_form.register
def _(d: td.OneHotCategorical) -> NaturalForm:
    one = d._categorical
    return _finite("OneHotCategorical", _states(one), one._param.dtype, td.OneHotCategorical)


@natural_form.register
def _(d: td.Multinomial) -> NaturalForm:
    return _finite(
        "Multinomial",
        _states(d._categorical),
        d._categorical._param.dtype,
        lambda p: td.Multinomial(d.total_count, p),
        d.total_count,
    )


def _given_dtype(d: Any) -> torch.dtype:
    given = vars(d)
    return given["probs" if "probs" in given else "logits"].dtype


@natural_form.register
def _(d: td.Geometric) -> NaturalForm:  # (1 − p)^x p: λ = log(1 − p)
    dtype, lam = _given_dtype(d), (_two_states(d)[..., 0],)
    return NaturalForm(
        "Geometric",
        lam,
        lambda x: -(-x.expm1()).log(),
        lambda x: positive(-x),
        lambda x: td.Geometric(-x.expm1().to(dtype)),
        dtype=dtype,
    )


@natural_form.register
def _(d: td.NegativeBinomial) -> NaturalForm:  # ∝ p^x (1 − p)^n: λ = log p
    n, dtype = d.total_count, d._param.dtype
    return NaturalForm(
        "NegativeBinomial",
        (_two_states(d)[..., 1],),
        lambda x: -n * (-x.expm1()).log(),
        lambda x: positive(-x),
        lambda x: td.NegativeBinomial(n, x.exp().to(dtype)),
        (n,),
        dtype,
    )


@natural_form.register
def _(d: td.Poisson) -> NaturalForm:
    (rate,) = wide(d.rate)
    return NaturalForm(
        "Poisson",
        (rate.log(),),
        torch.exp,
        not_nan,
        lambda x: td.Poisson(*cast_like(d.rate, x.exp())),
        dtype=d.rate.dtype,
        source=(rate,),
        delta_f=lambda q, p, r: (q[0] - p[0]) * ((r[0] - p[0]) / p[0]),
    )


@natural_form.register
def _(d: td.ContinuousBernoulli) -> NaturalForm:
    def log_normalizer(x: Tensor) -> Tensor:  # log((eˣ − 1)/x)
        size = x.abs().clamp(min=1e-30)
        return x.clamp(min=0) + (-(-size).expm1() / size).log()

    dtype = d._param.dtype
    return NaturalForm(
        "ContinuousBernoulli",
        (d.logits.double(),),
        log_normalizer,
        not_nan,
        lambda x: td.ContinuousBernoulli(logits=x.to(dtype)),
        dtype=dtype,
    )
