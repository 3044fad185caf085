r"""The law of reduction for exponential families: one formula for Gaussian, Gamma, Beta, Dirichlet,
Categorical and the rest that torch knows.

Owns `natural_delta_f` and `natural_posterior`; `natural_form.py` and `discrete_form.py` know the
families. Imports torch only. The Gaussian forms of `gaussian.py` are special cases, tested against
it, and take its place where the difference of log-normalisers has no digits. Computed in float64.

A family is a carrier measure h with p(x | λ) = h(x) exp(λ·T(x) − A(λ)). The carrier cancels in p̃/p
only between members of one family, so what belongs to the carrier (the number of trials of a
binomial, the transforms of a transformed distribution) must agree.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.diagonal import rounded
from pyro_bmr.formulas.discrete_form import natural_form
from pyro_bmr.formulas.natural_form import NaturalForm


def natural_delta_f(
    posterior: Distribution, prior: Distribution, reduced_prior: Distribution
) -> Tensor:
    r"""ΔF = log p̃(y) − log p(y) by natural parameters λ and log-normaliser A, per element of the
    batch.

    .. math:: \tilde\lambda' = \lambda' + \tilde\lambda - \lambda, \qquad
        \Delta F = A(\tilde\lambda') - A(\tilde\lambda) - A(\lambda') + A(\lambda)

    λ' is the posterior's parameter, λ the prior's, λ̃ the reduced prior's. The three must be of one
    family; an Exponential or Chi2 counts as a Gamma, a `TransformedDistribution` (LogNormal,
    InverseGamma, ...) as its base when the transforms agree, and `Independent` sums over its event.
    A category that the reduced prior rules out (probability 0) may be asked about. Source: Friston,
    Parr & Zeidman 2018, arXiv 1805.07092.

    Raises:
        ReductionError: the families differ, shapes do not fit the posterior's, or λ̃' is outside
            the family (the posterior is wider than its prior).

    Example:
        >>> # seven of nine throws, and a prior that asks for a fair coin
        >>> natural_delta_f(Beta(8.0, 3.0), Beta(1.0, 1.0), Beta(5.0, 5.0))
        tensor(0.0179)
    """
    if isinstance(posterior, td.Independent):
        forms = _independent(posterior, prior, reduced_prior)
        return (
            natural_delta_f(*(d.base_dist for d in forms))
            .flatten(-forms[0].reinterpreted_batch_ndims)
            .sum(-1)
        )
    q, p, r, new = _forms(posterior, prior, reduced_prior)
    gain = (
        _four_log_normalizers(q, p, r, new)
        if q.delta_f is None
        else q.delta_f(q.source, p.source, r.source)
    )
    if not bool(gain.isfinite().all()):
        raise ReductionError(
            f"ΔF is not finite in the {q.family} family: a parameter is not finite, or the prior"
            " rules out what the reduced prior allows"
        )
    return rounded(gain, q.dtype or q.lam[0].dtype, "ΔF")


def _four_log_normalizers(
    q: NaturalForm, p: NaturalForm, r: NaturalForm, new: tuple[Tensor, ...]
) -> Tensor:
    """A(λ̃') − A(λ̃) − A(λ') + A(λ); an error where four large numbers leave no digits."""
    four = torch.broadcast_tensors(
        q.log_normalizer(*new),
        -r.log_normalizer(*r.lam),
        -q.log_normalizer(*q.lam),
        p.log_normalizer(*p.lam),
    )
    gain = (four[0] + four[1]) + (four[2] + four[3])
    doubt = 4 * torch.finfo(gain.dtype).eps * sum(part.abs() for part in four)
    if bool(((doubt > 1e-5) & (doubt > 1e-4 * gain.abs())).any()):
        raise ReductionError(
            f"ΔF in the {q.family} family is the difference of log-normalisers of up to"
            f" {float(max(part.abs().max() for part in four)):.1g} nats, which leaves it no digits"
            f" in {gain.dtype}"
        )
    return gain


def natural_posterior(
    posterior: Distribution, prior: Distribution, reduced_prior: Distribution
) -> Distribution:
    r"""The posterior under the reduced prior, λ̃' = λ' + λ̃ − λ, as a distribution of the same
    family. Arguments and errors as for `natural_delta_f`.

    Example:
        >>> natural_posterior(Beta(8.0, 3.0), Beta(1.0, 1.0), Beta(5.0, 5.0)).mean  # of Beta(12, 7)
        tensor(0.6316)
    """
    if isinstance(posterior, td.Independent):
        forms = _independent(posterior, prior, reduced_prior)
        return td.Independent(
            natural_posterior(*(d.base_dist for d in forms)), forms[0].reinterpreted_batch_ndims
        )
    q, _, _, new = _forms(posterior, prior, reduced_prior)
    try:
        return q.member(*new)
    except ValueError as error:  # of torch's own check of the parameters
        raise ReductionError(
            f"the reduced posterior of the {q.family} family leaves the range of {q.dtype}:"
            f" {str(error).splitlines()[0]}"
        ) from None


def _forms(
    posterior: Distribution, prior: Distribution, reduced_prior: Distribution
) -> tuple[NaturalForm, NaturalForm, NaturalForm, tuple[Tensor, ...]]:
    """The natural forms of the three, and λ̃'."""
    q, p, r = (natural_form(d) for d in (posterior, prior, reduced_prior))
    if not q.family == p.family == r.family:
        names = ", ".join(type(d).__name__ for d in (posterior, prior, reduced_prior))
        raise ReductionError(
            f"posterior, prior, reduced_prior: expected one exponential family, got {names}"
        )
    for role, distribution, form in (("prior", prior, p), ("reduced prior", reduced_prior, r)):
        fits = distribution.event_shape == posterior.event_shape and _broadcasts(
            distribution.batch_shape, posterior.batch_shape
        )
        if not fits:
            raise ReductionError(
                f"a {role} of batch shape {tuple(distribution.batch_shape)} and event shape"
                f" {tuple(distribution.event_shape)} does not fit a posterior of batch shape"
                f" {tuple(posterior.batch_shape)} and event shape {tuple(posterior.event_shape)};"
                " give one of that shape or a single one"
            )
        if not all(_equal(a, b) for a, b in zip(q.carrier, form.carrier, strict=True)):
            raise ReductionError(
                f"the {role} has another carrier measure than the posterior (number of trials, or"
                " transforms); give them the same"
            )
    # −∞ is the log of a probability 0: what the reduced prior rules out stays ruled out, whatever
    # the others say
    new = tuple(
        torch.where(c.isneginf(), c, a + c - b) for a, b, c in zip(q.lam, p.lam, r.lam, strict=True)
    )
    if not bool(q.contains(*new).all()):
        raise ReductionError(
            f"no reduced posterior exists in the {q.family} family for these parameters: the"
            " posterior is wider than its prior; fit longer, or reduce to a narrower prior"
        )
    return q, p, r, new


def _independent(*distributions: Distribution) -> tuple[td.Independent, ...]:
    first = distributions[0]
    assert isinstance(first, td.Independent)
    for d in distributions[1:]:
        if (
            not isinstance(d, td.Independent)
            or d.reinterpreted_batch_ndims != first.reinterpreted_batch_ndims
            or d.event_shape != first.event_shape
        ):
            raise ReductionError(
                "posterior, prior, reduced_prior: expected one event shape, got"
                f" {tuple(first.event_shape)} and {tuple(d.event_shape)}; give all three the same"
                " .to_event()"
            )
    return distributions  # type: ignore[return-value]


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False)
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return bool((a == b).all())
    return a == b
