"""Sites of a posterior out of a guide, on the unconstrained scale.

Owns `sites_of_guide` and what reading a guide or a param store shares; `Posterior.from_guide` says
what is read. Next: `declared_priors.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.util import prune_subsample_sites
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyro_bmr.errors import ModelError, described
from pyro_bmr.formulas.message import Message
from pyro_bmr.guides.autoguides import autoguide_moments
from pyro_bmr.guides.gaussian_draws import check_plates
from pyro_bmr.guides.latent_sites import SUPPORTS, Latent, base_distribution, support_name
from pyro_bmr.guides.mean_field import MeanField
from pyro_bmr.guides.scale_coupled import CoupledSite
from pyro_bmr.guides.site_wise import SiteWise
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.posteriors.site import Site


def masks_in_force(
    program: Callable[..., Any], masks: Mapping[str, Tensor], device: torch.device | None = None
) -> dict[str, Tensor]:
    """`masks` and those of a `BayesianNetwork` of its own: what `torch.nn.utils.prune` has pruned
    is still pruned.
    """
    own: dict[str, Tensor] = {}
    if isinstance(program, BayesianNetwork):
        own = {name: mask.to(device) for name, mask in program.masks.items()}
    return own | {
        name: mask & own[name].to(mask.device) if name in own else mask
        for name, mask in masks.items()
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
        check_masks(masks, {latent.name: latent.shape for latent in guide.latents})
        return _site_wise(guide, masks)
    if isinstance(guide, MeanField):
        check_masks(masks, {latent.name: latent.shape for latent in guide.latents})
        return dict(mean_field_sites(guide, masks))
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


def check_masks(masks: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
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


@torch.no_grad()
def mean_field_sites(guide: MeanField, masks: Mapping[str, Tensor]) -> Iterator[tuple[str, Site]]:
    """The sites of the guide one after the other, with `masks` in force: each in memory of its own,
    no larger than itself.
    """
    locs, log_scales = guide.views(guide.loc.detach()), guide.views(guide.log_scale.detach())
    for latent in guide.latents:
        name, mask = latent.name, masks.get(latent.name)
        mean, var = locs[name].clone(), log_scales[name].exp().square_()
        if mask is not None:
            for moment in (mean, var):
                moment.masked_fill_(~mask, 0)
        yield name, Site(mean, var, support=_support(latent), mask=mask)


def _support(latent: Latent) -> str:
    return next(key for key, transform in SUPPORTS.items() if transform is latent.transform)


@torch.no_grad()
def _site_wise(guide: SiteWise, masks: Mapping[str, Tensor]) -> dict[str, Site]:
    sites = {}
    for latent, part, q in zip(
        guide.latents, guide.parts.values(), guide.at_point(masks).values(), strict=True
    ):
        message = None
        if isinstance(part, CoupledSite):
            message = Message(*(t.clone() for t in part.message()))
        mean, var, support = q.mean.clone(), q.var.clone(), _support(latent)
        sites[latent.name] = Site(mean, var, support=support, joint=q.joint(), message=message)
    return sites
