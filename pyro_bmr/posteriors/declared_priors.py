"""The priors that a program declares for the sites of a posterior, from one run of it.

Owns `with_priors`. Next: `from_param_store.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.data.inputs import Inputs, has_rows, rows_in
from pyro_bmr.errors import ModelError, described
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.guides.latent_sites import base_distribution, support_name
from pyro_bmr.posteriors.from_guides import check_masks
from pyro_bmr.posteriors.from_numbers import check_normal
from pyro_bmr.posteriors.site import Site, rows_digest
from pyro_bmr.tracing import Values, collapsed


@torch.enable_grad()
def with_priors(
    read: Mapping[str, Site],
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    masks: Mapping[str, Tensor],
) -> dict[str, Site]:
    """The sites with `masks` in force and the priors of one run of the program at their point."""
    check_masks(masks, {name: site.mean.shape for name, site in read.items()})
    bare = {
        name: site.masked(masks[name]) if name in masks and site.mask is None else site
        for name, site in read.items()
    }
    values = {name: site.value(site.mean).detach().requires_grad_() for name, site in bare.items()}
    with Values(values) as run:
        program(*args, **kwargs)
    if lacking := [name for name, msg in run.observed.items() if not msg["is_observed"]]:
        raise ModelError(
            f"site '{lacking[0]}' of the program is not in the guide, whose sites are:"
            f" {', '.join(read)}; make the guide from this program, and give the program its"
            " targets too, as in from_guide(guide, program, x, y)"
        )
    x = next((value for value in args if has_rows(value)), None)
    sites = {name: _with_prior(bare[name], name, run, x, values) for name in run.latent}
    missing = set(bare) - set(sites)
    if missing:
        raise ModelError(
            f"the guide has sites that the program has not: {', '.join(sorted(missing))}; use the"
            " program that the guide was fitted to"
        )
    return sites


def _with_prior(
    site: Site, name: str, run: Values, x: Inputs | None, values: Mapping[str, Tensor]
) -> Site:
    """One site with its prior in the `run`, and whether it has an entry for each row of `x`."""
    msg = run.latent[name]
    base = base_distribution(msg["fn"])
    if hasattr(base, "kept"):  # a program under `pruning.Masked`
        site, base = site.masked(site.kept & base.kept), base.base_dist
    _check_not_off(name, msg)
    prior, given = _prior(name, site, base, values)
    plate = None if x is None else _plate_of_rows(run, rows_in(x))
    per_row = plate is not None and any(frame.name == plate for frame in msg["cond_indep_stack"])
    of_rows = None
    if x is not None and per_row:
        of_rows = rows_digest(x)
    return replace(
        site, prior=prior, declared=msg["infer"].get("prior"), given=given, of_rows=of_rows
    )


def _plate_of_rows(run: Values, rows: int) -> str | None:
    """The name of the plate of the data, if there is no doubt."""
    plates = {
        frame.name
        for msg in run.observed.values()
        for frame in msg["cond_indep_stack"]
        if frame.vectorized and frame.size == rows
    }
    return plates.pop() if len(plates) == 1 else None


def _check_not_off(name: str, msg: Any) -> None:
    """Raises a ModelError where `poutine.mask` takes the density of a latent site out of the model;
    what Pyro masks itself, for `obs_mask`, has no data.
    """
    mask = msg["mask"]
    if (
        mask is not None
        and not bool(torch.as_tensor(mask).all())
        and not name.endswith("_unobserved")
    ):
        raise ModelError(
            f"site '{name}': poutine.mask takes its prior out of the model, in part or whole, so"
            " that it is not the one declared; mask the distribution itself,"
            " Normal(...).mask(...), or declare a wide Gaussian"
        )


def _prior(
    name: str, site: Site, base: Any, values: Mapping[str, Tensor]
) -> tuple[Diagonal | None, tuple[str, ...]]:
    """The moments of a Gaussian prior, and the sites that they follow."""
    if (declared := support_name(name, base.support)) != site.support:
        raise ModelError(
            f"site '{name}': expected one support in program and guide, got {described(declared)}"
            f" and {site.support!r}"
        )
    if not isinstance(base, torch.distributions.Normal):
        return None, ()
    loc, scale = collapsed(base.loc), collapsed(base.scale)
    if not bool(loc.isfinite().all() & scale.isfinite().all() & (scale > 0).all()):
        raise ModelError(
            f"site '{name}': its prior has a mean or scale that is infinite, NaN or 0 where the"
            " sites it follows stand at their posterior point; reparametrise the program, or bound"
            " the scale"
        )
    check_normal(name, "the prior's variance", scale.detach().double().square(), scale.dtype)
    return Diagonal(loc.detach(), scale.detach().square()), _dependencies(loc, scale, values, name)


def _dependencies(
    loc: Tensor, scale: Tensor, values: Mapping[str, Tensor], own: str
) -> tuple[str, ...]:
    # none of thousands, if none
    others = (
        {name: value for name, value in values.items() if name != own}
        if loc.requires_grad or scale.requires_grad
        else {}
    )
    if not others:
        return ()
    grads = torch.autograd.grad(
        loc.sum() + scale.sum(), list(others.values()), allow_unused=True, retain_graph=True
    )
    return tuple(name for name, grad in zip(others, grads, strict=True) if grad is not None)
