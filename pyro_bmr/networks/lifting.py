"""Which parameters of a network become sites, and why the others do not.

Owns `lifted_parameters`, and the checks of a network and of the patterns of its priors. Parameters
are lifted one by one, whatever the class of their layer. Next: `bayesian_network.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from pyro_bmr.errors import ModelError, described
from pyro_bmr.networks.constraints import Constraint, constraints_of
from pyro_bmr.priors import Prior

_NORM_LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def lifted_parameters(
    net: nn.Module, patterns: Mapping[str, Prior | None]
) -> tuple[dict[str, Prior], dict[str, str]]:
    """Parameter → prior for those that become sites, and parameter → why it is left for the others.

    Raises:
        ModelError: no parameter becomes a site, those that do have different dtypes, or a tensor
            that can never be one is named.
    """
    priors: dict[str, Prior] = {}
    left: dict[str, str] = {}
    norms, constraints = _norm_parameters(net), constraints_of(net)
    parameters = dict(net.named_parameters())
    for name, parameter in parameters.items():
        # an exact name counts first, then the first pattern that matches
        pattern = next(
            (p for p in (name, *patterns) if p in patterns and fnmatchcase(name, p)), None
        )
        chosen = None if pattern is None else patterns[pattern]
        reason = _unsuitable(parameter)
        if reason is None and pattern is None:
            reason = "no pattern names it"
        elif reason is None and chosen is None:
            reason = f"pattern '{pattern}' leaves it"
        elif reason is None and name in norms and pattern != name:
            reason = (
                f"gain or offset of a norm layer ({norms[name]}); give its exact name to lift it"
            )
        elif reason is None and name in constraints:
            reason = _left_for(name, constraints[name], pattern == name)
        if reason is None:
            priors[name] = cast(Prior, chosen)
        else:
            left[name] = reason
    _check_lifted(net, priors, left)
    return priors, left


def _check_lifted(net: nn.Module, priors: Mapping[str, Prior], left: Mapping[str, str]) -> None:
    """Raises ModelError unless a parameter is lifted, and all that are have one dtype."""
    if not priors:
        raise ModelError(
            f"no parameter of {type(net).__name__} is lifted: {left or 'it has none'};"
            " name one in `prior`"
        )
    dtypes = {parameter.dtype for name, parameter in net.named_parameters() if name in priors}
    if len(dtypes) > 1:
        raise ModelError(
            "expected lifted parameters of one dtype, got"
            f" {', '.join(sorted(map(str, dtypes)))}; cast the network, as in net.float()"
        )


def check_patterns(net: nn.Module, patterns: Mapping[str, Any], may_leave: bool) -> None:
    """Raises ModelError unless each pattern matches a parameter of `net` and has a prior, or, if it
    `may_leave` parameters, None.
    """
    names = [name for name, _ in net.named_parameters()]
    for pattern, value in patterns.items():
        if not (value is None and may_leave) and (
            isinstance(value, type) or not isinstance(value, Prior)
        ):
            raise ModelError(
                f"prior for '{pattern}': expected a prior such as Gaussian() or Horseshoe(),"
                f" got {described(value)}"
            )
        if names and not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(
                f"prior pattern '{pattern}' matches no parameter; the parameters are:"
                f" {', '.join(names)}"
            )


def check_network(net: nn.Module) -> None:
    """Raises ModelError unless all parameters of `net` are dense and have a shape, and other values
    can be used in their place.
    """
    for path, module in net.named_modules():
        _check_module(net, path, module)
    for name, parameter in net.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ModelError(
                f"parameter '{name}' has no shape yet; run the network once on a row of data"
            )
        if parameter.layout != torch.strided:
            raise ModelError(
                f"parameter '{name}': expected a dense parameter with values, got one that is of"
                f" layout {parameter.layout}"
            )


def _check_module(net: nn.Module, path: str, module: nn.Module) -> None:
    """Raises ModelError if a module takes no weights from outside, or has none of its own."""
    where = f"'{path}' ({type(module).__name__})" if path else type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"{where}: a scripted module takes no weights from outside; give the"
            " torch.nn.Module that it was made of"
        )
    if "train" in vars(module):  # torch.export puts a refusal there
        raise ModelError(
            f"{where}: an exported program has no training mode; give the torch.nn.Module that"
            " it was made of"
        )
    if ".quantized" in type(module).__module__:
        name = type(net).__name__
        raise ModelError(
            f"no parameter of {name} is lifted: {where} is a quantised layer, which has none;"
            " give the network as it was before"
        )


def _norm_parameters(net: nn.Module) -> dict[str, str]:
    """Parameter of a norm layer → the layer's class."""
    return {
        f"{path}.{name}" if path else name: type(module).__name__
        for path, module in net.named_modules()
        if isinstance(module, _NORM_LAYERS)
        for name, _ in module.named_parameters(recurse=False)
    }


def _unsuitable(parameter: nn.Parameter) -> str | None:
    """Why a parameter can have no prior; None if it can."""
    if parameter.is_complex():
        return (
            f"complex ({parameter.dtype}); priors are over real numbers: keep its parts in a real"
            " parameter, torch.view_as_complex(w) inside the network"
        )
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return f"not a floating-point parameter to compute with ({parameter.dtype})"
    if not parameter.requires_grad:
        return "frozen (requires_grad=False)"
    return None if parameter.numel() else f"it has no entries (shape {tuple(parameter.shape)})"


def _left_for(name: str, constraint: Constraint, by_name: bool) -> str | None:
    """Why a constrained parameter is left; None if it is lifted, because it is given by name.

    Raises:
        ModelError: it is given by name, but can never be a site.
    """
    mend = "torch.nn.utils.parametrize.remove_parametrizations makes it a plain weight"
    if by_name and constraint.never:
        raise ModelError(f"prior for '{name}': {constraint.why}, so it cannot be a site; {mend}")
    return (
        None
        if by_name
        else f"{constraint.why}; {mend if constraint.never else 'give its exact name to lift it'}"
    )
