"""Sites of a posterior from what was found elsewhere: given means and variances, or a trained value
and a curvature.

Owns both readers and the checks of what is given; `Posterior.from_moments` and `from_curvature` say
what each takes. Next: `from_draws.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ModelError, described, holds
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.guides.latent_sites import SUPPORTS
from pyro_bmr.posteriors.curvature import Curvature, evidence_scale, laplace_moments
from pyro_bmr.posteriors.site import Site
from pyro_bmr.priors import Gaussian, Prior


def sites_of_moments(
    mean: Mapping[str, Tensor],
    var: Mapping[str, Tensor],
    prior: Any,
    supports: Mapping[str, str] | None,
) -> dict[str, Site]:
    """Site name → `Site` with independent entries."""
    sites = {}
    mean, var = checked_tensors("mean", mean), checked_tensors("var", var)
    if alone := [name for name in var if name not in mean]:
        raise ModelError(
            f"site '{alone[0]}': it has a variance and no mean; give mean['{alone[0]}'], or leave"
            " it out of var"
        )
    for name, value in mean.items():
        if name not in var:
            raise ModelError(
                f"site '{name}': it has a mean and no variance; give var['{name}'] (0 for a point"
                " estimate)"
            )
        spread = var[name].to(value)
        if not bool(
            value.isfinite().all() & spread.isfinite().all() & (spread >= 0).all()
        ) or not _fits(spread.shape, value.shape):
            raise ModelError(
                f"site '{name}': expected finite means and variances >= 0, of one shape, on the"
                f" unconstrained scale; got shapes {tuple(value.shape)}, {tuple(spread.shape)} with"
                f" {int((~value.isfinite()).sum())} means and {int((~spread.isfinite()).sum())}"
                " variances infinite or NaN"
            )
        check_normal(name, "the variance", var[name], value.dtype)
        support = checked_support(name, supports)
        sites[name] = Site(
            value.clone(),
            spread.expand_as(value).clone(),
            *_given_prior(name, prior, value),
            support=support,
        )
    check_patterns(prior, supports, mean)
    return sites


def sites_of_curvature(
    mean: Mapping[str, Tensor],
    curvature: Mapping[str, Curvature],
    prior: Any,
    penalised: bool,
    temperature: float,
) -> dict[str, Site]:
    """Site name → `Site` with the moments of its Laplace approximation."""
    if not holds(lambda x: 0 < x < math.inf, temperature):
        raise ModelError(
            f"temperature: expected a finite number > 0 (1 is Bayes), got {described(temperature)}"
        )
    sites = {}
    mean = checked_tensors("mean", mean)
    for name, value in mean.items():
        if name not in curvature:
            raise ModelError(
                f"site '{name}': it has no curvature; leave it out of mean, or give"
                f" curvature['{name}']"
            )
        if not bool(value.isfinite().all()):
            raise ModelError(
                f"site '{name}': expected finite means, got {int((~value.isfinite()).sum())} that"
                " are infinite or NaN"
            )
        parts = [part.to(value.device) for part in _curvature_parts(name, curvature[name])]
        own = _named_prior(name, prior)
        if isinstance(own, Gaussian) and own.scale == "empirical":
            own = _of_most_evidence(name, own, value, parts, temperature)
        moments_, declared = _given_prior(name, own, value)
        if moments_ is None:
            raise ModelError(
                f"site '{name}': a Laplace posterior needs a Gaussian prior; give prior={{'{name}':"
                " Gaussian(1.0), ...}"
            )
        location, var, joint = laplace_moments(name, value, parts, moments_, penalised, temperature)
        sites[name] = Site(location, var, moments_, declared, joint=joint)
    check_patterns(prior, None, mean)
    return sites


def _of_most_evidence(
    name: str,
    prior: Gaussian,
    value: Tensor,
    parts: list[Tensor],
    temperature: float,
) -> Gaussian:
    """The prior with the scale that has the most evidence."""
    if prior.per != "layer" or isinstance(prior.mean, str):
        raise ModelError(
            f"site '{name}': an empirical scale is found for all weights of a site, with a mean"
            f" that is given; got per='{prior.per}' and mean={described(prior.mean)}"
        )
    scale = evidence_scale(name, value, parts, prior.mean, temperature)
    return replace(prior, scale=scale)


def _curvature_parts(name: str, curvature: Any) -> list[Tensor]:
    """The one tensor, or the pair of Kronecker factors; no part of a graph."""
    parts = list(curvature) if isinstance(curvature, (tuple, list)) else [curvature]
    if len(parts) > 2 or not parts:
        raise ModelError(
            f"site '{name}': expected a curvature that is a tensor, or a pair of Kronecker factors,"
            f" got {len(parts)} parts"
        )
    return [checked_tensors("curvature", {name: part})[name] for part in parts]


def checked_tensors(role: str, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, out of any graph, in float32 at least."""
    if not isinstance(values, Mapping) or not values:
        why = "got none" if isinstance(values, Mapping) else f"got {type(values).__name__}"
        raise ModelError(f"{role}: expected site name → tensor, {why}")
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(
                f"site '{name}': expected a tensor of floating-point numbers as {role}, got {got}"
            )
    found = {name: value.detach() for name, value in values.items()}
    single = torch.float32, torch.float64
    return {
        name: value if value.dtype in single else value.float() for name, value in found.items()
    }


def check_normal(name: str, what: str, var: Any, dtype: torch.dtype) -> None:
    """Raises a ModelError for variances > 0 that `dtype` holds with fewer digits than others, or as
    0.
    """
    given = var if isinstance(var, Tensor) else torch.as_tensor(var, dtype=torch.float64)
    if bad := int(((given > 0) & (given < torch.finfo(dtype).tiny)).sum()):
        raise ModelError(
            f"site '{name}': {what} is below the range of {dtype} for {bad} of {given.numel()}"
            " entries, where digits are lost; give moments of torch.float64, or weights in larger"
            " units"
        )


def checked_support(name: str, supports: Mapping[str, str] | None) -> str:
    """The site's entry in `supports`, or a ModelError with the ones there are."""
    if supports is not None and not isinstance(supports, Mapping):
        raise ModelError(f"supports: expected site name → support, got {described(supports)}")
    support = (supports or {}).get(name, "real")
    if not isinstance(support, str) or support not in SUPPORTS:
        raise ModelError(
            f"site '{name}': expected a support of {', '.join(map(repr, SUPPORTS))}, got"
            f" {described(support)}"
        )
    return support


def check_patterns(
    prior: Any, supports: Mapping[str, str] | None, sites: Mapping[str, Any]
) -> None:
    """Raises a ModelError for a pattern of a prior, or a site of `supports`, that is none of the
    sites.
    """
    for role, names in (
        ("prior", prior if isinstance(prior, Mapping) else {}),
        ("supports", supports or {}),
    ):
        for name in names:
            if not any(
                name == site or (role == "prior" and fnmatchcase(site, name)) for site in sites
            ):
                raise ModelError(
                    f"{role}: '{name}' names none of the sites ({', '.join(sites)}); leave it out,"
                    " or correct it"
                )


def _fits(shape: torch.Size, expected: torch.Size) -> bool:
    """Whether `shape` broadcasts to `expected`."""
    return len(shape) <= len(expected) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(expected), strict=False)
    )


def _named_prior(name: str, prior: Any) -> Any:
    """The prior of a site, of one for all or of one for each pattern of names."""
    if not isinstance(prior, Mapping):
        return prior
    named = (key for key in (name, *prior) if key in prior and fnmatchcase(name, key))
    return prior.get(next(named, None))


def _given_prior(name: str, prior: Any, like: Tensor) -> tuple[Diagonal | None, Prior | None]:
    """The moments of the prior that the user names for a site, and the prior itself if it is one of
    the library's.
    """
    prior = _named_prior(name, prior)
    if prior is None:
        return None, None
    if (
        isinstance(prior, type)
        or not (hasattr(prior, "mean") and hasattr(prior, "var"))
        or isinstance(prior.mean, str)
        or callable(prior.mean)
    ):
        raise ModelError(
            f"site '{name}': {described(prior)} has no mean and variance of its own; give the prior"
            " of the fit as Gaussian(<number>) or Diagonal(mean, var)"
        )
    mean, var = (
        torch.as_tensor(part, dtype=like.dtype, device=like.device).detach()
        for part in (prior.mean, prior.var)
    )
    if not bool((var > 0).all() & var.isfinite().all() & mean.isfinite().all()) or not (
        _fits(mean.shape, like.shape) and _fits(var.shape, like.shape)
    ):
        raise ModelError(
            f"site '{name}': expected a prior with a variance > 0 and finite moments, of a shape"
            f" that fits {tuple(like.shape)}, got {type(prior).__name__} with a mean of shape"
            f" {tuple(mean.shape)} and a variance of shape {tuple(var.shape)}; a prior without a"
            " variance, such as a half-Cauchy, is no Gaussian: give None for its site"
        )
    check_normal(name, "the prior's variance", prior.var, like.dtype)
    return Diagonal(mean.clone(), var.clone()), prior if isinstance(prior, Gaussian) else None
