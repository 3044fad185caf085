"""Many regressions of one size in one fit: a row of the weights is the regression of one seed.

Owns `fit_at_once`. The program is `models/linear_regression.py` with everything once per row: x, y,
the weights, their scales, the constant and the noise. No two rows share anything, the objective is
the sum of theirs, and the natural gradient works entry by entry. So each row is fitted as it would
be alone with the defaults of `compare`, but for its random draws. One row alone has the same draws
too, and the same posterior (tests/test_benchmarks.py). Reductions are made row by row, each to the
prior of its row. Next: `../kept_columns.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_bmr as bmr
from pyro_bmr.experiments.settings import Settings, length_of, optimizer_named
from pyro_bmr.fitting import flat_vectors
from pyro_bmr.posteriors.site import Site
from pyro_bmr.priors.spike_and_slab import SpikeSlabMixture
from pyro_bmr.pruning import Every
from pyro_bmr.reduction.reduce import quiet_reduction

PRIORS: dict[str, bmr.priors.Prior] = {
    "gaussian:layer": bmr.Gaussian("layer"),
    "horseshoe": bmr.Horseshoe(),
    "spike-and-slab": bmr.SpikeAndSlab(),
}
# what one row has under the names that the prior of one regression gives them
_NAMES = {"w_unit": "w_tau"}


def target_of(prior: str) -> bmr.priors.Prior:
    """What a reduction is to."""
    return bmr.Gaussian(scale=0.0) if prior == "gaussian:layer" else PRIORS[prior]


def _rows(prior: str, shape: tuple[int, int]) -> Tensor:
    """The weights of all seeds, each row under a prior of its own."""
    like = torch.zeros(shape)
    if prior == "gaussian:layer":
        layer = bmr.Gaussian("layer", per="unit")
        # a vector of weights has a fan-in of 1
        return math.sqrt(shape[1]) * layer.sample("w", shape, like)
    if prior == "horseshoe":
        return bmr.Horseshoe(tiers=("unit", "weight"), by_fan_in=False).sample("w", shape, like)
    column = (shape[0], 1)
    gamma = dist.Gamma(like.new_tensor(2.0), like.new_tensor(2.0)).expand(column).to_event(2)
    precision = pyro.sample("w_precision", gamma)
    beta = dist.Beta(like.new_tensor(1.0), like.new_tensor(1.0)).expand(column).to_event(2)
    inclusion = pyro.sample("w_inclusion", beta)
    spike = like.new_tensor(bmr.SpikeAndSlab().fitted_spike_scale)
    mixture = SpikeSlabMixture(inclusion, spike).expand(shape).to_event(2)
    infer: Any = {"prior": bmr.SpikeAndSlab(), "init": like}
    return precision.rsqrt() * pyro.sample("w", mixture, infer=infer)


def _program(prior: str, seeds: int, columns: int) -> Callable[..., Tensor]:
    def program(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = _rows(prior, (seeds, columns))
        b = pyro.sample("b", dist.Normal(x.new_zeros(seeds), 1.0).to_event(1))
        noise = pyro.sample("noise", dist.HalfNormal(x.new_ones(seeds)).to_event(1))
        with pyro.plate("data", len(x)):
            mean = torch.einsum("nsp,sp->ns", x, w) + b
            return pyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)

    return program


@dataclass(frozen=True)
class _RowByRow:
    """What `fit` asks of a reduction: of the weights, each row reduced by itself."""

    sites: dict[str, Any]
    before: bmr.Posterior
    masks: dict[str, Tensor]


@dataclass(frozen=True)
class _EveryRow(Every):
    """`Every`, with a decision for each row by itself, to the prior of that name."""

    priors: tuple[str, ...] = ()

    def reduce(self, posterior: bmr.Posterior, done: float) -> Any:
        rows = rows_of(posterior, "gaussian:layer")
        targets = map(target_of, self.priors)
        found = [quiet_reduction(*each) for each in zip(rows, targets, strict=True)]
        spikes = quiet_reduction(posterior, dict.fromkeys(("w", "b"), bmr.Gaussian(scale=0.0)))
        sites, masks = {}, {}
        for name in ("w", "b"):
            gain = torch.stack([one.sites[name].spike_delta_f for one in found])
            masks[name] = torch.stack([one.masks[name] for one in found])
            sites[name] = replace(spikes.sites[name], spike_delta_f=gain)
        return _RowByRow(sites, posterior, masks)


def rows_of(posterior: bmr.Posterior, prior: str) -> list[bmr.Posterior]:
    """The posterior of each seed, as a fit of its own would have it, of the weights and scales."""
    count = len(posterior["w"].mean)
    found = []
    for k in range(count):
        sites = {}
        for name, site in posterior.sites.items():
            one = _row(site, k)
            single = one.mean.numel() == 1 and name != "w"
            sites[_NAMES.get(name, name)] = _squeezed(one) if single else one
        sites["w"] = replace(sites["w"], declared=PRIORS[prior])
        found.append(bmr.Posterior(sites))
    return found


def _row(site: Site, k: int) -> Site:
    def part(t: Tensor) -> Tensor:
        return t.expand(site.mean.shape)[k]

    prior = site.prior and bmr.formulas.Diagonal(
        *(part(t) for t in (site.prior.mean, site.prior.var))
    )
    mask = None if site.mask is None else site.mask[k]
    return replace(site, mean=site.mean[k], var=site.var[k], prior=prior, mask=mask)


def _squeezed(site: Site) -> Site:
    return replace(site, mean=site.mean.reshape(()), var=site.var.reshape(()))


def fit_at_once(
    data: list[bmr.Data], priors: list[str], route: str, seed: int, settings: Settings | None = None
) -> list[bmr.Posterior]:
    """The posterior of each regression at the end of the fit; `priors`: of each. Fitted ones have
    the same prior.
    """
    settings = settings or Settings()
    x = torch.stack([one.x_train.flatten(1) for one in data], 1)
    y = torch.stack([one.y_train.flatten() for one in data], 1)
    fitted, schedule = priors[0], None
    if route == "reduced":
        fitted, interval = "gaussian:layer", settings.reduce_every
        schedule = _EveryRow(interval, start=settings.start, stop=settings.stop, priors=(*priors,))
    # as in a fit of a small table, every step counts for the curvature
    with warnings.catch_warnings(), patch.object(flat_vectors, "_LARGE", x.numel()):
        warnings.simplefilter("ignore")
        fit = bmr.fit(
            _program(fitted, *x.shape[1:]),
            (x, y),
            epochs=length_of(settings.epochs, len(x), settings.batch_size),
            batch_size=settings.batch_size,
            optimizer=optimizer_named(settings.optimizer, settings.learning_rate)[0](),
            seed=seed,
            reduce=schedule,
            progress=False,
        )
    return rows_of(fit.posterior, fitted)


def kept_of(row: bmr.Posterior, prior: str, route: str, window: bool = True) -> list[int]:
    """The columns that are kept after the reduction at the end of a fit."""
    to = None if route == "fitted" else target_of(prior)
    mask = quiet_reduction(row, to, window=window).masks["w"]
    return mask.nonzero()[:, 0].tolist()
