r"""The law of reduction for exponential families: one formula for Gaussian, Gamma, Beta, Dirichlet and the rest that torch knows.

Owns `natural_delta_f`. Imports torch only. The Gaussian forms of `gaussian.py` are special cases and are tested against it.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributions import ExponentialFamily

from pyro_bmr.errors import ReductionError


def natural_delta_f(posterior: ExponentialFamily, prior: ExponentialFamily, reduced_prior: ExponentialFamily) -> Tensor:
    r"""ΔF = log p̃(y) − log p(y) by natural parameters λ and log-normaliser A, per element of the batch.

    .. math:: \tilde\lambda' = \lambda' + \tilde\lambda - \lambda, \qquad
        \Delta F = A(\tilde\lambda') - A(\tilde\lambda) - A(\lambda') + A(\lambda)

    λ' is the posterior's parameter, λ the prior's, λ̃ the reduced prior's. The three must be of one family, so that the carrier measure
    cancels. Source: Friston, Parr & Zeidman 2018, arXiv 1805.07092.

    Raises:
        ReductionError: the families differ, or λ̃' is outside the family (the posterior is wider than its prior).
    """
    if not (type(posterior) is type(prior) is type(reduced_prior)) or not isinstance(posterior, ExponentialFamily):
        names = ", ".join(type(d).__name__ for d in (posterior, prior, reduced_prior))
        raise ReductionError(f"posterior, prior and reduced prior must be of one exponential family; got {names}")
    lam_q, lam_p, lam_r = posterior._natural_params, prior._natural_params, reduced_prior._natural_params
    lam_new = tuple(q + r - p for q, p, r in zip(lam_q, lam_p, lam_r, strict=True))
    log_normalizer = posterior._log_normalizer
    gain = log_normalizer(*lam_new) - log_normalizer(*lam_r) - log_normalizer(*lam_q) + prior._log_normalizer(*lam_p)
    if not bool(gain.isfinite().all()):
        raise ReductionError(
            f"no reduced posterior exists in the {type(posterior).__name__} family for these parameters: the posterior is wider than its "
            "prior; fit longer, or reduce to a narrower prior"
        )
    return gain
