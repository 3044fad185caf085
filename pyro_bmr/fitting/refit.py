"""`refit`: the reduced model fitted from the reduced posterior, and the change of its free energy
beside the one that the reduction predicted.

Owns `refit`, its result `Refit`, and `evidence_bound`. Next: `shrinking/refusals.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_bmr.errors import FitError, described
from pyro_bmr.fitting.elbo import masked_terms
from pyro_bmr.fitting.fit import Fit, fit
from pyro_bmr.fitting.rows import HasTrainingData
from pyro_bmr.isolation import isolated, seed_generators
from pyro_bmr.likelihoods.whole_data import WholeData
from pyro_bmr.priors.empirical_bayes import EmpiricalScales
from pyro_bmr.reduction.correlations import spike_gain
from pyro_bmr.reduction.result import Reduction

_CHUNK = 4096  # rows


@dataclass(frozen=True)
class Refit:
    r"""A reduction held against a fit of the reduced model.

    `fit`: the reduced model, fitted. `predicted`: ΔF of the reduction, nats. `observed`: the bound
    −F of the refit minus the bound of the fit before, with its `standard_error` over draws. They
    differ where the approximate posterior is wrong, and where either fit has not converged.
    """

    fit: Fit
    predicted: float
    observed: float
    standard_error: float


def refit(
    fit_: Fit,
    reduction: Reduction,
    data: tuple[Tensor, Tensor] | HasTrainingData,
    *,
    draws: int = 64,
    seed: int = 0,
    **settings: Any,
) -> Refit:
    """The reduced model, fitted from the reduced posterior, and the change of its free energy
    beside the predicted change.

    Refit a reduction that prunes nothing (`kept=1.0`) to see what more training would change by
    itself.

    Args:
        fit_: the fit that was reduced, of `MeanField`.
        reduction: of `fit_.posterior`, to the point spike, to a spike and slab, or to a Gaussian of
            another scale.
        data: what `fit_` was fitted to.
        draws: of the posterior, for both free energies; the same noise in both.
        settings: of `fit`: epochs, batch_size, optimizer, ...; `fit_` gives the temperature.

    Raises:
        FitError: the reduced prior is not Gaussian, or the program does not declare it, or the
            guide is not `MeanField`.

    Example:
        >>> again = refit(fit_, reduce(fit_.posterior, to=Gaussian(scale=0)), data, epochs=10)
        >>> again.predicted, again.observed, again.standard_error  # nats
    """
    if not isinstance(reduction, Reduction):
        raise FitError(
            f"refit: expected a Reduction, as reduce(...) gives it, got {type(reduction).__name__}"
        )
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 2:
        raise FitError(
            f"refit(draws={described(draws)}): expected a whole number >= 2, for a standard error"
        )
    predicted = predicted_delta_f(reduction)
    result = fit(
        fit_.program,
        data,
        temperature=fit_.temperature,
        start=reduction.posterior,
        seed=seed,
        **settings,
    )
    x, y = data if isinstance(data, tuple) else (data.x_train, data.y_train)
    before, after = (evidence_bound(each, x, y, draws, seed) for each in (fit_, result))
    change = after - before
    return Refit(result, predicted, float(change.mean()), float(change.std()) / math.sqrt(draws))


def predicted_delta_f(reduction: Reduction) -> float:
    """ΔF of the model with the reduction's masks and Gaussian priors, nats; a spike and slab counts
    with the set it chose.
    """
    total = 0.0
    for name, result in reduction.sites.items():
        before, after = reduction.before[name], result.site
        if after.prior is None or before.prior is None:
            raise FitError(
                f"site '{name}': its reduced prior is not Gaussian, so the program cannot be"
                " refitted under it; fit a program that declares that prior"
            )
        if after.prior is not before.prior and before.declared is None:
            raise FitError(
                f"site '{name}': its program declares a prior of its own, whose scale a refit"
                " cannot change; write the reduced prior in the program"
            )
        if after.prior is not before.prior:
            total += result.delta_f
            continue
        total += spike_gain(before, after.kept, result.spike_delta_f)
    return total


@isolated(autocast=True)
@torch.no_grad()
def evidence_bound(fit_: Fit, x: Tensor, y: Tensor, draws: int = 64, seed: int = 0) -> Tensor:
    r"""−F = E_q[log p(y|θ)]/T − KL(q‖p) of a fit over all rows, one estimate per draw, (draws,),
    nats. One seed, one noise for all mean-field fits.
    """
    program, guide, x, y = fit_.program, fit_.guide, *(_like(fit_, part) for part in (x, y))
    full_data = WholeData(len(x), min(_CHUNK, len(x)))
    scaled = EmpiricalScales(fit_.scales)(full_data(program))
    values = []
    with pyro.settings.context(module_local_params=True):
        for draw in range(draws):
            likelihood, kl = 0.0, 0.0
            for k, rows in enumerate(torch.arange(len(x), device=x.device).split(_CHUNK)):
                full_data.rows = len(rows)
                seed_generators(seed * 1_000_003 + draw)
                terms = masked_terms(scaled, guide, (x[rows], y[rows]), fit_.masks)
                likelihood += float(terms.expected_log_likelihood) * len(rows) / len(x)
                kl = float(terms.kl) if k == 0 else kl
            values.append(likelihood / fit_.temperature - kl)
    return torch.tensor(values, dtype=torch.float64)


def _like(fit_: Fit, values: Tensor) -> Tensor:
    like = next(iter(fit_.posterior.sites.values())).mean
    return values.to(like.device, like.dtype if values.is_floating_point() else values.dtype)
