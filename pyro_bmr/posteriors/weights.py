r"""Weights from a posterior over standardised weights and their scales.

Many priors declare w = γ w̄ with a site for w̄ and sites for the scales in γ. Owns
`declared_weights`, which turns values of the sites into weights, and `weight_moments`. Next:
`posterior.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyro_bmr.errors import ModelError, described
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.posteriors.site import Site
from pyro_bmr.tracing import Values

Draw = Callable[[], dict[str, Tensor]]


def declared_weights(sites: Mapping[str, Site], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name → weight at the `values` of all sites: w in place of a standardised w̄, without the
    scales of priors that declared a site.
    """
    weights, scales = dict(values), set[str]()
    for name, site in sites.items():
        if site.declared is not None:
            weights[name], used = _weight(name, site, values)
            scales |= used
    return {name: value for name, value in weights.items() if name not in scales}


def weight_moments(
    sites: Mapping[str, Site], name: str, draw_of: Callable[[Mapping[str, Site]], Draw], count: int
) -> Diagonal:
    r"""Mean and variance of the weight w = γ w̄ of site `name`, entry by entry.

    .. math:: E[w] = \mu\, E[\gamma], \qquad
        \mathrm{Var}[w] = \sigma^2 E[\gamma^2] + \mu^2\, \mathrm{Var}[\gamma]

    where w̄ ~ N(μ, σ²) and γ are independent. The expectations over γ are means of `count` draws
    of the scales; the formula is exact if there are no scales. Where w is not a multiple of w̄, or w̄
    depends on the scales, they are means of draws of w. `draw_of` makes the function that draws
    some sites.

    Raises:
        ModelError: the site is not real, or the posterior lacks a scale of its prior.
    """
    site = sites[name]
    if site.support != "real":
        raise ModelError(f"site '{name}' is {site.support}: expected the site of a real weight")
    if site.declared is None:
        return Diagonal(site.mean, site.var)
    parts = _parts(sites, name)
    ones, zeros = torch.ones_like(site.mean), torch.zeros_like(site.mean)
    if len(parts) == 1:
        count = 1
    draw = draw_of(parts)
    values = draw()
    is_multiple = site.message is None and not bool(
        _weight(name, site, {**values, name: zeros})[0].any()
    )
    first, second = (torch.zeros_like(site.mean, dtype=torch.float64) for _ in range(2))
    for k in range(count):
        values = draw() if k else values
        at = {**values, name: ones} if is_multiple else values
        drawn = _weight(name, site, at)[0].double()
        first += drawn
        second += drawn.square()
    first, second = first / count, second / count
    spread = (second - first.square()).clamp_min(0)
    if not is_multiple:
        return Diagonal(first.to(site.mean), spread.to(site.mean))
    mean, var = site.mean.double(), site.var.double()
    return Diagonal(
        (mean * first).to(site.mean), (var * second + mean.square() * spread).to(site.mean)
    )


def _weight(name: str, site: Site, values: Mapping[str, Tensor]) -> tuple[Tensor, set[str]]:
    """The weight that the prior of a site makes of the `values`, and the names of its scales."""
    assert site.declared is not None
    with torch.no_grad(), Values(values) as run:
        weight = site.declared.sample(name, tuple(site.mean.shape), site.mean)
    weight = weight.expand(site.mean.shape)
    return (weight if site.mask is None else weight.where(site.mask, 0)), run.latent.keys() - {name}


def _parts(sites: Mapping[str, Site], name: str) -> dict[str, Site]:
    """The sites that the prior of `name` declares."""
    site = sites[name]
    assert site.declared is not None
    with torch.no_grad(), Values({}) as run:
        site.declared.sample(name, tuple(site.mean.shape), site.mean)
    needed = run.latent_shapes()
    if missing := [part for part in needed if part not in sites]:
        raise ModelError(
            f"site '{name}': its prior {described(site.declared)} has the scale"
            f" '{missing[0]}', which is not in the posterior; make the posterior from all sites of"
            " the program"
        )
    return {part: sites[part] for part in sites if part in needed}
