"""Sites of a posterior from draws: which dimension is which, whether chains agree, whether the
moments exist.

Owns `sites_of_samples`; `Posterior.from_samples` says what it takes. Next: `from_guides.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ModelError, described, warn
from pyro_bmr.formulas.dense import Dense
from pyro_bmr.guides.latent_sites import SUPPORTS
from pyro_bmr.posteriors.from_numbers import checked_support, checked_tensors, sites_of_moments
from pyro_bmr.posteriors.site import Site

_CHAINS, _DRAWS = 32, 20  # a first dimension this short beside a second this long may be chains
_ALIKE, _SWAPPED = 2.0, 0.1  # `_spread_of_columns` of chains, and of sites whose draws come second
_RHAT = 1.1
_SHARE = 0.25  # of the variance in one draw; 100 normal draws stay below 0.2


def sites_of_samples(
    samples: Mapping[str, Tensor],
    prior: Any,
    supports: Mapping[str, str] | None,
    joint_up_to: int,
    chains: bool | None,
) -> dict[str, Site]:
    """Site name → `Site` with the moments of its draws."""
    given = checked_tensors("samples", samples)
    if not isinstance(joint_up_to, int):
        raise ModelError(f"joint_up_to={joint_up_to!r}: expected a whole number of entries")
    real = {}
    for name, draws in _flat_chains(given, chains).items():
        if draws.ndim == 0 or len(draws) < 2:
            count = len(draws) if draws.ndim else "not one"
            raise ModelError(
                f"site '{name}': {count} draw; a variance needs at least two, in the first"
                " dimension, or with chains=True in the second"
            )
        transform = SUPPORTS[checked_support(name, supports)]
        real[name] = draws if transform is None else transform.inv(draws)
    if len(counts := {len(draws) for draws in real.values()}) > 1:
        each = ", ".join(f"{name} {len(draws)}" for name, draws in real.items())
        raise ModelError(
            "samples: expected one number of draws for all sites, in the first dimension, got"
            f" {sorted(counts)} ({each})"
        )
    var = {
        name: draws.var(0) if draws.numel() else draws.new_zeros(draws.shape[1:])
        for name, draws in real.items()
    }
    sites = sites_of_moments(
        {name: draws.mean(0) for name, draws in real.items()}, var, prior, supports
    )
    for name, draws in real.items():
        size = draws[0].numel()
        if sites[name].support == "real" and 1 < size <= joint_up_to and len(draws) >= 10 * size:
            flat = draws.flatten(1)
            sites[name] = replace(sites[name], joint=Dense(flat.mean(0), torch.cov(flat.mT)))
        sites[name] = _without_constants(name, sites[name], draws)
    return sites


def _flat_chains(samples: Mapping[str, Tensor], chains: bool | None) -> dict[str, Tensor]:
    """The draws of all chains one after the other."""
    if chains is None:
        if _may_be_chains(samples):
            count, length = next(iter(samples.values())).shape[:2]
            raise ModelError(
                f"samples: are they {count} chains of {length} draws, or {count} draws of sites"
                f" with {length} rows? Their shapes begin with ({count}, {length}); say chains=True"
                " or chains=False. The draws come first, or right after the chains"
            )
        return dict(samples)
    if not isinstance(chains, bool):
        raise ModelError(
            f"chains={described(chains)}: expected True for samples of shape (chains, draws, ...),"
            " False for (draws, ...)"
        )
    if not chains:
        return dict(samples)
    shapes = {name: tuple(draws.shape) for name, draws in samples.items()}
    if min(map(len, shapes.values())) < 2 or len({shape[:2] for shape in shapes.values()}) > 1:
        raise ModelError(
            "chains=True: expected samples of shape (chains, draws, ...), the first two the same"
            f" for all sites; got {shapes}"
        )
    for name, draws in samples.items():
        if (worst := _split_rhat(draws)) > _RHAT:
            warn(
                f"site '{name}': its chains disagree, split R-hat is {worst:.2f} (1 is best): a"
                " mean and variance over all of them describe none; run them longer, or give those"
                " that agree"
            )
    return {name: draws.flatten(0, 1) for name, draws in samples.items()}


def _may_be_chains(samples: Mapping[str, Tensor]) -> bool:
    """Whether (chains, draws, ...) is a reading of the shapes: few rows beside many columns, for
    all sites; or columns that draws of entries do not have.
    """
    shapes = {draws.shape[:2] for draws in samples.values()}
    if len(shapes) > 1 or len(shape := next(iter(shapes))) < 2:
        return False
    count, length = shape
    if length < _DRAWS or count < 2:
        return False
    return count <= min(_CHAINS, length - 1) or max(map(_spread_of_columns, samples.values())) < (
        _ALIKE if count < length else _SWAPPED
    )


def _spread_of_columns(draws: Tensor) -> float:
    """How far the means over the first dimension vary along the second, in variances of the mean of
    as many draws: about 1 if the columns are draws of one number, more if they are entries with
    means of their own, much less if the rows are the entries; the largest over further dimensions.
    """
    return float(
        (draws.mean(0).var(0) * len(draws) / draws.var(0).mean(0)).nan_to_num(torch.inf).max()
    )


def _split_rhat(draws: Tensor) -> float:
    """The largest split R-hat, √(((n − 1) W + B) / (n W)) over the halves of the chains (Gelman et
    al. 2013, section 11.4); 0 for too few draws.
    """
    length = draws.shape[1] // 2
    if length < 2:
        return 0.0
    halves = draws[:, : 2 * length].reshape(2 * len(draws), length, -1)
    within, between = halves.var(1).mean(0), length * halves.mean(1).var(0)
    # one chain does not move
    stuck = (halves.amax(1) == halves.amin(1)).any(0) & (within + between > 0)
    ratio = (
        (((length - 1) * within + between) / (length * within)).sqrt().masked_fill(stuck, torch.inf)
    )
    return float(ratio.nan_to_num(0.0, torch.inf).max())  # 0/0: all draws of an entry are equal


def _without_constants(name: str, site: Site, draws: Tensor) -> Site:
    """The site with entries that are 0 in all draws as pruned. Raises for another constant, warns
    of moments that hang on one draw.
    """
    if not draws.numel():
        return site
    low, high = draws.amin(0), draws.amax(0)
    constant = low == high
    pruned = constant & (low == 0) if site.support == "real" else torch.zeros_like(constant)
    if stuck := int((constant & ~pruned).sum()):
        raise ModelError(
            f"site '{name}': {stuck} of {constant.numel()} entries have the same value in all"
            f" {len(draws)} draws; the sampler did not move; give a point estimate to"
            " Posterior.from_moments, with variance 0"
        )
    furthest = torch.maximum(high - site.mean, site.mean - low)
    share = float((furthest.square() / ((len(draws) - 1) * site.var)).nan_to_num(0.0).max())
    if len(draws) >= 100 and share > _SHARE:
        warn(
            f"site '{name}': one draw of {len(draws)} makes up {share:.0%} of a variance, as with"
            " heavy tails (a half-Cauchy), whose mean and variance do not exist; give a positive"
            f" site as such, supports={{'{name}': 'positive'}}, and its logarithm is read, or leave"
            " the site out"
        )
    return site.masked(~pruned) if bool(pruned.any()) else site
