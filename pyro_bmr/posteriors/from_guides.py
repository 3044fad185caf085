"""Sites of a posterior out of a guide, on the unconstrained scale, and the priors that the program
declares for them.

Owns `sites_of_guide`, `with_priors` and what reading a guide or a param store shares;
`Posterior.from_guide` says what is read. Next: `from_param_store.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.util import prune_subsample_sites
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyro_bmr.errors import ModelError, described
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.message import Message
from pyro_bmr.guides.autoguides import autoguide_moments
from pyro_bmr.guides.gaussian_draws import check_plates
from pyro_bmr.guides.latent_sites import SUPPORTS, Latent, base_distribution, support_name
from pyro_bmr.guides.mean_field import MeanField
from pyro_bmr.guides.scale_coupled import CoupledSite
from pyro_bmr.guides.site_wise import SiteWise
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.posteriors.from_numbers import check_normal
from pyro_bmr.posteriors.site import Site, rows_digest
from pyro_bmr.tracing import Values, collapsed


def masks_in_force(
    program: Callable[..., Any], masks: Mapping[str, Tensor], device: torch.device | None = None
) -> dict[str, Tensor]:
    """`masks` and those of a `BayesianNetwork` of its own: what `torch.nn.utils.prune` has pruned
    is still pruned.
    """
    own = (
        {name: mask.to(device) for name, mask in program.masks.items()}
        if isinstance(program, BayesianNetwork)
        else {}
    )
    return {
        **own,
        **{
            name: mask & own[name].to(mask.device) if name in own else mask
            for name, mask in masks.items()
        },
    }


@contextmanager
def undisturbed(*modules: Any) -> Iterator[None]:
    """The random state, the param store and the buffers of `modules` are afterwards what they were,
    also after an error.
    """
    store, state = pyro.get_param_store(), get_rng_state()
    parts: list[dict[Any, Any]] = [store._params, store._constraints, store._param_to_name]
    before = [dict(part) for part in parts]
    # running means
    buffers = [
        (buffer, buffer.clone())
        for module in modules
        if isinstance(module, torch.nn.Module)
        for buffer in module.buffers()
    ]
    try:
        yield
    finally:
        set_rng_state(state)
        for part, old in zip(parts, before, strict=True):
            part.clear()
            part.update(old)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def sites_of_guide(
    guide: Callable[..., Any],
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    masks: Mapping[str, Tensor],
) -> dict[str, Site]:
    """Site name → `Site` without a prior; a guide with a Gaussian per site is read with `masks` in
    force.
    """
    if not callable(guide):
        raise ModelError(
            f"guide: expected a Pyro guide, something that can be called, got {described(guide)}"
        )
    if isinstance(guide, SiteWise):
        _check_masks(masks, {latent.name: latent.shape for latent in guide.latents})
        return _site_wise(guide, masks)
    if isinstance(guide, MeanField):
        return _mean_field(guide)
    _check_store(guide)
    nodes = declared_sites(program, args, kwargs)

    def support(name: str) -> str:
        return (
            support_name(name, base_distribution(nodes[name]["fn"]).support)
            if name in nodes
            else "real"
        )

    sites = {}
    for name, moments in autoguide_moments(guide, args, kwargs, support).items():
        if name in nodes:
            check_plates(name, nodes[name]["cond_indep_stack"])
            check_shape(name, "the guide's value", moments.mean, nodes[name]["value"].shape)
        if not bool(moments.mean.isfinite().all() & moments.var.isfinite().all()):
            raise ModelError(
                f"site '{name}': its mean or variance in the guide is infinite or NaN, on the"
                " unconstrained scale; the fit has diverged there"
            )
        sites[name] = Site(moments.mean, moments.var, support=moments.support, joint=moments.joint)
    return sites


def _check_store(guide: Any) -> None:
    """Raises a ModelError where the guide has values of its own for names that stand for others in
    Pyro's param store: a call takes those in the store.
    """
    if not isinstance(guide, PyroModule) or pyro.settings.get("module_local_params"):
        return
    store = dict(pyro.get_param_store().named_parameters())
    for own, value in guide.named_parameters(guide._pyro_name):
        stored = store.get(own.removesuffix("_unconstrained"))
        if stored is not None and stored is not value and not torch.equal(stored, value):
            raise ModelError(
                f"'{own}': the guide's own value is not that of Pyro's param store, which an"
                " earlier fit or a loaded file left there and which the guide takes up when it is"
                " called; call pyro.clear_param_store() to read the guide's own, or the guide"
                " once, to read those of the store"
            )


def declared_sites(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Site name → message of each latent site in one run of the program on draws from its
    priors.
    """
    with torch.no_grad(), torch.random.fork_rng(), poutine.block():
        return dict(
            prune_subsample_sites(
                poutine.trace(program).get_trace(*args, **kwargs)
            ).iter_stochastic_nodes()
        )


def check_shape(name: str, what: str, tensor: Tensor, shape: torch.Size) -> None:
    """Raises a ModelError unless `tensor` has the `shape` of the site in the program."""
    if tensor.shape != shape:
        raise ModelError(
            f"site '{name}': {what} has shape {tuple(tensor.shape)}, expected {tuple(shape)} as in"
            " the program; use the program, and as many rows, that it was fitted with"
        )


def _check_masks(masks: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    """Raises a ModelError for a mask of no site, or one that does not fit its site."""
    for name, mask in masks.items():
        if name not in shapes:
            raise ModelError(
                f"masks: the guide has no site '{name}'; its sites are: {', '.join(shapes)}"
            )
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shapes[name]:
            raise ModelError(
                f"mask of site '{name}': expected a bool tensor of shape {tuple(shapes[name])}, got"
                f" {described(mask)}"
            )


@torch.enable_grad()
def with_priors(
    read: Mapping[str, Site],
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    masks: Mapping[str, Tensor],
) -> dict[str, Site]:
    """The sites with `masks` in force and the priors of one run of the program at their point."""
    _check_masks(masks, {name: site.mean.shape for name, site in read.items()})
    bare = {
        name: site.masked(masks[name]) if name in masks else site for name, site in read.items()
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
    x = next((t for t in args if isinstance(t, Tensor) and t.ndim), None)
    plate = None if x is None else _plate_of_rows(run, len(x))
    sites = {}
    for name, msg in run.latent.items():
        per_row = plate is not None and any(
            frame.name == plate for frame in msg["cond_indep_stack"]
        )
        base = base_distribution(msg["fn"])
        site = bare[name]
        if hasattr(base, "kept"):  # a program under `pruning.Masked`
            site, base = site.masked(site.kept & base.kept), base.base_dist
        _check_not_off(name, msg)
        prior, given = _prior(name, site, base, values)
        sites[name] = replace(
            site,
            prior=prior,
            declared=msg["infer"].get("prior"),
            given=given,
            of_rows=rows_digest(x) if x is not None and per_row else None,
        )
    missing = set(bare) - set(sites)
    if missing:
        raise ModelError(
            f"the guide has sites that the program has not: {', '.join(sorted(missing))}; use the"
            " program that the guide was fitted to"
        )
    return sites


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
            f"site '{name}': its support is {described(declared)} in the program and"
            f" {site.support!r} in the guide; they must be the same"
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


@torch.no_grad()
def _mean_field(guide: MeanField) -> dict[str, Site]:
    locs, log_scales = guide.views(guide.loc), guide.views(guide.log_scale)
    return {
        s.name: Site(locs[s.name].clone(), log_scales[s.name].exp().square_(), support=_support(s))
        for s in guide.latents
    }


def _support(latent: Latent) -> str:
    return next(key for key, transform in SUPPORTS.items() if transform is latent.transform)


@torch.no_grad()
def _site_wise(guide: SiteWise, masks: Mapping[str, Tensor]) -> dict[str, Site]:
    sites = {}
    for latent, part, q in zip(
        guide.latents, guide.parts.values(), guide.at_point(masks).values(), strict=True
    ):
        message = (
            Message(*(t.clone() for t in part.message())) if isinstance(part, CoupledSite) else None
        )
        sites[latent.name] = Site(
            q.mean.clone(),
            q.var.clone(),
            support=_support(latent),
            joint=q.joint(),
            message=message,
        )
    return sites


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
