"""Sites of a posterior from what was found elsewhere: given means and variances, draws, or a trained value and a curvature.

Owns the three readers; `Posterior.from_moments`, `from_samples` and `from_curvature` say what each takes. Next: `guide_moments.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.curvature import Curvature, laplace_moments
from pyro_bmr.errors import ModelError
from pyro_bmr.guides.mean_field import SUPPORTS
from pyro_bmr.priors import Gaussian, Prior
from pyro_bmr.reduction.gaussian import Dense, Diagonal
from pyro_bmr.site import Site


def sites_of_moments(mean: Mapping[str, Tensor], var: Mapping[str, Tensor], prior: Any, supports: Mapping[str, str] | None) -> dict[str, Site]:
    """Site name → `Site` with independent entries."""
    sites = {}
    _check_tensors({"mean": mean, "var": var})
    for name, value in mean.items():
        if name not in var:
            raise ModelError(f"site '{name}': it has a mean and no variance; give var['{name}'] (0 for a point estimate)")
        spread = torch.as_tensor(var[name]).to(value)
        if spread.ndim > value.ndim or not bool(value.isfinite().all() & spread.isfinite().all() & (spread >= 0).all()):
            raise ModelError(f"site '{name}': finite means and variances >= 0 are wanted, of one shape; got shapes {tuple(value.shape)}, {tuple(spread.shape)}")
        support = _support(name, (supports or {}).get(name, "real"))
        sites[name] = Site(value.detach().clone(), spread.detach().expand_as(value).clone(), *_given_prior(name, prior, value), support=support)
    return sites


def sites_of_samples(samples: Mapping[str, Tensor], prior: Any, supports: Mapping[str, str] | None, joint_up_to: int) -> dict[str, Site]:
    """Site name → `Site` with the moments of its draws."""
    real = {}
    _check_tensors({"samples": samples})
    for name, draws in samples.items():
        if draws.ndim == 0 or len(draws) < 2:
            raise ModelError(f"site '{name}': {len(draws) if draws.ndim else 'not one'} draw; a variance needs at least two, in the first dimension")
        transform = SUPPORTS[_support(name, (supports or {}).get(name, "real"))]
        real[name] = draws.detach() if transform is None else transform.inv(draws.detach())
    sites = sites_of_moments({k: v.mean(0) for k, v in real.items()}, {k: v.var(0) for k, v in real.items()}, prior, supports)
    for name, draws in real.items():
        size = draws[0].numel()
        if sites[name].support == "real" and 1 < size <= joint_up_to and len(draws) >= 10 * size:
            flat = draws.flatten(1)
            sites[name] = replace(sites[name], joint=Dense(flat.mean(0), torch.cov(flat.mT)))
    return sites


def sites_of_curvature(mean: Mapping[str, Tensor], curvature: Mapping[str, Curvature], prior: Any, penalised: bool, temperature: float) -> dict[str, Site]:
    """Site name → `Site` with the moments of its Laplace approximation."""
    if not 0 < temperature < math.inf:
        raise ModelError(f"temperature={temperature}: a finite number > 0 is wanted (1 is Bayes)")
    sites = {}
    for name, value in mean.items():
        if name not in curvature:
            raise ModelError(f"site '{name}': it has no curvature; leave it out of mean, or give curvature['{name}']")
        moments_, declared = _given_prior(name, prior, value)
        if moments_ is None:
            raise ModelError(f"site '{name}': a Laplace posterior needs a Gaussian prior; give prior={{'{name}': Gaussian(1.0), ...}}")
        given = curvature[name]
        cooled = (given[0] / temperature, given[1]) if isinstance(given, tuple) else given / temperature
        location, var, joint = laplace_moments(name, value.detach(), cooled, moments_, penalised)
        sites[name] = Site(location, var, moments_, declared, joint=joint)
    return sites


def _check_tensors(given: Mapping[str, Mapping[str, Any]]) -> None:
    for role, values in given.items():
        if not values:
            raise ModelError(f"{role}: it is empty; site name → tensor is wanted")
        for name, value in values.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise ModelError(f"site '{name}': {role} must be a tensor of floating-point numbers, got {got}")


def _support(name: str, support: str) -> str:
    """`support`, or a ModelError with the ones there are."""
    if support not in SUPPORTS:
        raise ModelError(f"site '{name}': support {support!r}; one of {', '.join(map(repr, SUPPORTS))} is wanted")
    return support


def _given_prior(name: str, prior: Any, like: Tensor) -> tuple[Diagonal | None, Prior | None]:
    """The moments of the prior that the user names for a site, and the prior itself if it is one of the library's."""
    if isinstance(prior, Mapping):
        prior = next((prior[pattern] for pattern in (name, *prior) if pattern in prior and fnmatchcase(name, pattern)), None)
    if prior is None:
        return None, None
    if isinstance(prior, type) or not (hasattr(prior, "mean") and hasattr(prior, "var")):
        raise ModelError(f"site '{name}': {prior!r} has no mean and variance; give the prior of the fit as Gaussian(<number>) or Diagonal(mean, var)")
    mean, var = (torch.as_tensor(part, dtype=like.dtype, device=like.device) for part in (prior.mean, prior.var))
    if not bool((var > 0).all()) or torch.broadcast_shapes(mean.shape, var.shape, like.shape) != like.shape:
        raise ModelError(f"site '{name}': the prior's variance must be > 0 and fit the shape {tuple(like.shape)}; got {prior!r}")
    return Diagonal(mean, var), prior if isinstance(prior, Gaussian) else None
