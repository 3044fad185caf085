"""`refit`: the reduced model fitted from the reduced posterior, and the change of its free energy
beside the one that the reduction predicted.

Owns `refit`, its result `Refit`, and `evidence_bound`. Next: `shrinking/refusals.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_bmr.data.batch import Batch, BatchChecks, rows_at
from pyro_bmr.data.given import source_of
from pyro_bmr.data.inputs import Inputs, of_each, rows_in
from pyro_bmr.data.row_sources import Held, Source, Stream, chunks
from pyro_bmr.errors import FitError, described
from pyro_bmr.fitting.elbo import masked_terms
from pyro_bmr.fitting.fit import Fit, fit
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
    data: Any,
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
        data: what `fit_` was fitted to, in any form that `fit` takes and that can be read again.
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
    source = source_of(data, size=settings.get("size"))
    if isinstance(source, Stream) and not source.again:
        raise FitError(
            f"refit: expected data that can be read again, got {source.about}; give a loader, a"
            " data set or tensors"
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
    before, after = (_bound(each, source, draws, seed) for each in (fit_, result))
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


def evidence_bound(fit_: Fit, x: Inputs, y: Tensor, draws: int = 64, seed: int = 0) -> Tensor:
    r"""−F = E_q[log p(y|θ)]/T − KL(q‖p) of a fit over all rows, one estimate per draw, (draws,),
    nats. One seed, one noise for all mean-field fits.
    """
    return _bound(fit_, Held(x, y), draws, seed)


@isolated(autocast=True)
@torch.no_grad()
def _bound(fit_: Fit, source: Source, draws: int, seed: int) -> Tensor:
    """`evidence_bound`, over rows that are read once."""
    size = rows_in(source.x) if isinstance(source, Held) else source.size
    assert size is not None
    full_data = WholeData(size, min(_CHUNK, size))
    scaled = EmpiricalScales(fit_.scales)(full_data(fit_.program))
    likelihoods, kls = [0.0] * draws, [0.0] * draws
    with pyro.settings.context(module_local_params=True):
        for k, batch in enumerate(_batches(fit_, source)):
            rows = full_data.rows = len(batch[1])
            for draw in range(draws):
                seed_generators(seed * 1_000_003 + draw)
                terms = masked_terms(scaled, fit_.guide, batch, fit_.masks)
                likelihoods[draw] += float(terms.expected_log_likelihood) * rows / size
                kls[draw] = float(terms.kl) if k == 0 else kls[draw]
    pairs = zip(likelihoods, kls, strict=True)
    values = [likelihood / fit_.temperature - kl for likelihood, kl in pairs]
    return torch.tensor(values, dtype=torch.float64)


def _batches(fit_: Fit, source: Source) -> Iterator[Batch]:
    """All rows, at most some thousands at a time, on the device and in the dtype of the fit."""
    for x, y in chunks(
        source, _CHUNK, BatchChecks(getattr(fit_.program, "missing_targets", False))
    ):
        for first in range(0, len(y), _CHUNK):
            part, targets = rows_at((x, y), slice(first, first + _CHUNK))
            yield of_each(partial(_like, fit_), part), _like(fit_, targets)


def _like(fit_: Fit, values: Tensor) -> Tensor:
    like = next(iter(fit_.posterior.sites.values())).mean
    return values.to(like.device, like.dtype if values.is_floating_point() else values.dtype)
