"""Which parameters a parametrization makes unfit for a prior and a mask, because their zero is not
a zero of the tensor; found by trying.

Owns `constraints_of`. Next: `lifting.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import _Orthogonal
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pyro_bmr.isolation import normal_numbers
from pyro_bmr.networks.folding import parametrized
from pyro_bmr.networks.plain_module import module_copy


class Constraint(NamedTuple):
    """Why a parameter is no site unless it is named (`why`), and whether it can `never` be one."""

    why: str
    never: bool


@torch.no_grad()
def constraints_of(net: nn.Module) -> dict[str, Constraint]:
    """Parameter → its constraint, for the parameters that a tensor of `net` is computed from and
    whose zeros are not zeros of that tensor.

    A parameter has a constraint if the tensor is not finite when one slice of it is zero (0/0), if
    its scale does not matter (spectral norm: c·v gives the same as v, and the data do not determine
    c), or if its zero does not give zero (an orthogonal map, a softplus). Skew and symmetric
    matrices and low-rank updates have none of these, so they are sites. Old `spectral_norm` and a
    half-frozen weight norm are hooks, known by their class.
    """
    found: dict[int, Constraint] = {}
    for module in net.modules():
        for tensor, parts in parametrized(module).items():
            found |= _tried(tensor, parts)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (SpectralNorm, WeightNorm)):
                end = "_orig" if isinstance(hook, SpectralNorm) else "_v"
                why = _word(
                    hook.name, type(hook).__name__, "its scale does not matter, and zero is 0/0"
                )
                found[id(getattr(module, f"{hook.name}{end}"))] = Constraint(why, True)
    return {name: found[id(p)] for name, p in net.named_parameters() if id(p) in found}


def _word(tensor: str, kind: str, why: str) -> str:
    return f"'{tensor}' is computed from it by {kind}: {why}"


def _tried(tensor: str, parts: nn.Module) -> dict[int, Constraint]:
    copied = module_copy(parts).eval()
    kind = ", ".join(type(part).__name__.lstrip("_") for part in parts.children())
    own, orthogonal = (
        dict(parts.named_parameters(recurse=False)),
        any(isinstance(part, _Orthogonal) for part in parts.children()),
    )
    found = {}
    for name, parameter in parts.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue

        def tensor_of(value: Tensor, name: str = name) -> Tensor:
            try:
                return functional_call(copied, {name: value}, ())
            except RuntimeError:  # such as the inverse of a singular matrix
                return torch.full_like(value, torch.nan)

        verdict = _verdict(tensor_of, parameter.detach())
        if (
            verdict is None
            and name in own
            and (orthogonal or bool(tensor_of(torch.zeros_like(parameter)).any()))
        ):
            verdict = "its zero is not a zero there", False
        if verdict is not None:
            found[id(parameter)] = Constraint(_word(tensor, kind, verdict[0]), verdict[1])
    return found


def _verdict(tensor_of: Callable[[Tensor], Tensor], value: Tensor) -> tuple[str, bool] | None:
    """Why `value` can never be a site, or None: found by setting all of it, or one slice of it, to
    zero and to twice itself.
    """
    generic = normal_numbers(value.shape, 0).to(value)
    at = tensor_of(generic)

    def same(other: Tensor) -> bool:
        return torch.allclose(other, at, rtol=1e-3, atol=1e-5 * float(at.abs().max()))

    for dim in range(-1, generic.ndim):
        none, twice = torch.zeros_like(generic), 2 * generic
        if dim >= 0:
            none, twice = (generic.clone() for _ in range(2))
            none.select(dim, 0).zero_()
            twice.select(dim, 0).mul_(2)
        zeroed = tensor_of(none)
        if not bool(zeroed.isfinite().all()):
            return "zero is 0/0", True
        if same(tensor_of(twice)) and not same(zeroed):
            return "its scale does not matter", True
    return None
