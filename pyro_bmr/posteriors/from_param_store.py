"""Sites of a posterior out of Pyro's param store, as AutoNormal and scripts of one's own leave it.

Owns `sites_of_param_store`; `Posterior.from_param_store` says what is read. Next: `products.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro.params.param_store import ParamStoreDict
from torch import Tensor
from torch.distributions import constraints

from pyro_bmr.errors import ModelError, warn
from pyro_bmr.guides.gaussian_draws import check_plates
from pyro_bmr.guides.latent_sites import base_distribution, support_name
from pyro_bmr.posteriors.from_guides import check_shape, declared_sites
from pyro_bmr.posteriors.site import Site

# what guides keep of a site that have more than a location and a scale
_OTHERS = ("weights", "scale_trils", "deps", "conds", "white_vecs", "prec_sqrts")


def sites_of_param_store(
    store: Any,
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: Mapping[str, tuple[str, str]] | None,
) -> dict[str, Site]:
    """Site name → `Site` without a prior."""
    store = _opened(store)
    nodes = declared_sites(program, args, kwargs)
    if names is not None and (unknown := set(names) - set(nodes)):
        raise ModelError(
            f"names: the program has no site {', '.join(map(repr, sorted(unknown)))}; its sites"
            f" are: {', '.join(nodes)}"
        )
    sites = {}
    for name, node in nodes.items():
        pair = _found(name, store) if names is None else names.get(name)
        if (
            not isinstance(pair, (tuple, list))
            or len(pair) != 2
            or pair[0] not in store
            or pair[1] not in store
        ):
            raise ModelError(
                f"site '{name}': no location and scale in the param store"
                f" ({', '.join(store.keys()) or 'it is empty'}); pass names={{'{name}': ('<loc>',"
                " '<scale>'), ...}"
            )
        check_plates(name, node["cond_indep_stack"])
        _check_origin(name, pair, store, named=names is not None)
        sites[name] = _site(name, node, pair, store[pair[0]], store[pair[1]])
    return sites


def _opened(store: Any) -> Any:
    """A param store, or a mapping whose values are taken as they stand; the state of a store
    becomes a store, which applies the constraints.
    """
    if isinstance(store, ParamStoreDict):
        return store
    if not isinstance(store, Mapping):
        raise ModelError(
            "store: expected pyro.get_param_store(), its get_state() or a mapping from names to"
            f" tensors, got {type(store).__name__}"
        )
    if set(store) != {"params", "constraints"} or not all(
        isinstance(part, Mapping) for part in store.values()
    ):
        return store
    if set(store["params"]) != set(store["constraints"]):
        raise ModelError(
            "store: the state of a param store has a constraint for each of its params, this one"
            " has not; save it with the store's save()"
        )
    opened = ParamStoreDict()
    opened.set_state({"params": store["params"], "constraints": store["constraints"]})
    return opened


def _found(name: str, store: Any) -> tuple[str, str] | None:
    """The names that AutoNormal gives a site's location and scale, under one prefix; None if there
    are none.
    """
    if raw := [
        key
        for key in store
        if key.endswith((f"locs.{name}_unconstrained", f"scales.{name}_unconstrained"))
    ]:
        raise ModelError(
            f"site '{name}': '{raw[0]}' is an unconstrained parameter of a guide, and its"
            " constraint is not in this mapping; load it into the guide (load_state_dict) and read"
            " that with Posterior.from_guide"
        )
    prefixes = [
        key.removesuffix(f"locs.{name}")
        for key in store
        if key == f"locs.{name}" or key.endswith(f".locs.{name}")
    ]
    both = [prefix for prefix in prefixes if f"{prefix}scales.{name}" in store]
    if len(both) > 1:
        raise ModelError(
            f"site '{name}': the param store has several locations and scales for it,"
            f" {', '.join(f'{prefix}locs.{name}' for prefix in both)}; pass names={{'{name}':"
            " ('<loc>', '<scale>'), ...}, or clear the store before a fit"
        )
    return (f"{both[0]}locs.{name}", f"{both[0]}scales.{name}") if both else None


def _check_origin(name: str, pair: tuple[str, str], store: Any, named: bool) -> None:
    """Raises a ModelError where the two numbers are not known to be the location and the scale of
    an independent Gaussian.
    """
    loc, scale = pair
    if loc.endswith(f"locs.{name}"):
        _check_whole(name, pair, store, named)
    if isinstance(store, ParamStoreDict):
        if named and isinstance(store._constraints[scale], type(constraints.real)):
            warn(
                f"site '{name}': the store has no positive constraint for '{scale}', which is read"
                " as a standard deviation; if the guide takes it for a logarithm, read the guide"
                " with Posterior.from_guide"
            )
    elif not hasattr(store[scale], "unconstrained"):  # an item of a live store has this
        free = (
            isinstance(store[scale], Tensor) and store[scale].requires_grad and store[scale].is_leaf
        )
        if (
            scale.endswith("_unconstrained")
            or free
            or not named
            or scale.endswith(f"scales.{name}")
        ):
            raise ModelError(
                f"site '{name}': whether '{scale}' is a scale or Pyro's unconstrained parameter for"
                f" it cannot be seen in a {type(store).__name__}; pass pyro.get_param_store(),"
                " after its load() if it comes from a file, or its get_state(); or say what it is"
                " with Posterior.from_moments"
            )


def _check_whole(name: str, pair: tuple[str, str], store: Any, named: bool) -> None:
    """Raises a ModelError where the guide that wrote the pair may have more of the site."""
    prefix = pair[0].removesuffix(f"locs.{name}")
    more = [
        key
        for key in store
        if any(
            key == f"{prefix}{kind}.{name}" or key.startswith(f"{prefix}{kind}.{name}.")
            for kind in _OTHERS
        )
    ]
    # AutoNormalMessenger and AutoRegressiveMessenger write the same names, without a prefix or in a
    # list below _guide, and mean different things
    if more or (not named and (not prefix or prefix.endswith("_guide."))):
        mend = (
            f" (it also keeps {more[0]})"
            if more
            else f", or say names={{{name!r}: {pair}}} if they are all of it"
        )
        raise ModelError(
            f"site '{name}': '{pair[0]}' and '{pair[1]}' may be only part of its posterior in the"
            f" guide that wrote them; read that guide with Posterior.from_guide{mend}"
        )


def _site(name: str, node: Any, pair: tuple[str, str], loc: Any, scale: Any) -> Site:
    for key, value in zip(pair, (loc, scale), strict=True):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(
                f"site '{name}': expected a tensor of floating-point numbers as '{key}', got {got}"
            )
        if not bool(value.isfinite().all()):
            raise ModelError(
                f"site '{name}': '{key}' is infinite or NaN; the fit has diverged there"
            )
    if not bool((scale > 0).all()):
        raise ModelError(
            f"site '{name}': expected scales > 0 as '{pair[1]}', got {int((scale <= 0).sum())} of"
            f" {scale.numel()} that are not; an unconstrained parameter or a logarithm is no scale:"
            " pass pyro.get_param_store() itself, or read the guide with Posterior.from_guide"
        )
    check_shape(name, f"'{pair[0]}'", loc, node["value"].shape)
    if scale.shape != loc.shape and scale.ndim:
        raise ModelError(
            f"site '{name}': expected '{pair[1]}' as one number or of shape {tuple(loc.shape)}, got"
            f" {tuple(scale.shape)}"
        )
    loc, scale = loc.detach().clone(), scale.detach().to(loc)
    return Site(
        loc,
        scale.square().expand(loc.shape).clone(),
        support=support_name(name, base_distribution(node["fn"]).support),
    )
