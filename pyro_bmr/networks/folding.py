"""Tensors under masks of `torch.nn.utils.prune`, weight norm or other constraints, folded into the
plain parameters they stand for.

Owns `fold_pruned`, `fold_normed` and `fold_constrained`, one for each kind, and `tied_again`. Next:
`plain_module.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pyro_bmr.errors import ModelError


class Folded(NamedTuple):
    """A tensor that was folded: where it is, its module and its name there, its value, the
    parameters that it was computed from, and its mask.
    """

    where: str
    module: nn.Module
    name: str
    value: Tensor
    sources: tuple[nn.Parameter, ...]
    mask: Tensor | None = None


def needs_folding(module: nn.Module, constraints: bool) -> bool:
    """Whether a tensor of `module` is pruned, normed or, with `constraints`, constrained."""
    return (
        any(True for _ in hooks(module, BasePruningMethod))
        or bool(_normed(module))
        or (constraints and _constrained(module))
    )


@torch.no_grad()
def fold_pruned(path: str, module: nn.Module) -> Iterator[Folded]:
    """The tensors of `module` under `torch.nn.utils.prune`, each now the pruned one."""
    for key, hook in hooks(module, BasePruningMethod):
        name = hook._tensor_name
        original, mask = (
            module._parameters.pop(f"{name}_orig"),
            cast(Tensor, module._buffers.pop(f"{name}_mask")),
        )
        assert original is not None
        del module._forward_pre_hooks[key]
        # the product of weight and mask, which is a plain attribute
        vars(module).pop(name, None)
        setattr(
            module,
            name,
            nn.Parameter(original * mask.to(original.dtype), requires_grad=original.requires_grad),
        )
        yield _folded(path, module, name, (original,), mask != 0)


def fold_normed(path: str, module: nn.Module) -> Iterator[Folded]:
    """The tensors of `module` under weight norm, each now the weight g·v/‖v‖."""
    for name in _normed(module):
        old = next((key for key, hook in hooks(module, WeightNorm) if hook.name == name), None)
        owner, ends = (
            (module, (f"{name}_g", f"{name}_v"))
            if old is not None
            else (parametrized(module)[name], ("original0", "original1"))
        )
        sources = tuple(cast(nn.Parameter, getattr(owner, end)) for end in ends)
        if old is None:
            _remove(module, name)
        else:
            remove_weight_norm(module, name)
        getattr(module, name).requires_grad_(sources[0].requires_grad)
        yield _folded(path, module, name, sources)


def fold_constrained(path: str, module: nn.Module) -> Iterator[Folded]:
    """The tensors of `module` under other parametrizations and spectral norm, each now its value in
    evaluation mode.
    """
    # in training mode spectral norm would iterate on
    was, module.training = module.training, False
    for name, parts in parametrized(module).items():
        parts.eval()
        sources = tuple(parts.parameters())
        _remove(module, name)
        yield _folded(path, module, name, sources)
    for _, hook in hooks(module, SpectralNorm):
        name = hook.name
        original = cast(nn.Parameter, getattr(module, f"{name}_orig"))
        remove_spectral_norm(module, name)
        yield _folded(path, module, name, (original,))
    module.training = was


def _remove(module: nn.Module, name: str) -> None:
    """Removes the parametrizations of a tensor in a copy of a module; the tensor stays a parameter.
    `remove_parametrizations` takes a property off the class, so the copy first gets a class of its
    own.
    """
    kind = type(module)
    module.__class__ = type(
        kind.__name__,
        kind.__bases__,
        {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")},
    )
    trained = bool(parametrized(module)[name]._parameters)
    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    if trained and name in module._buffers:  # as torch leaves it where no gradients are recorded
        value = cast(Tensor, module._buffers.pop(name))
        module.register_parameter(name, nn.Parameter(value.detach()))


def uses_of(net: nn.Module) -> dict[int, int]:
    """Id of a parameter → in how many modules of `net` it is; a shared module counts once."""
    uses: dict[int, int] = {}
    for module in net.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return uses


def tied_again(folded: list[Folded], uses: Mapping[int, int]) -> dict[int, Tensor]:
    """Id of a folded parameter → its mask, after the tensors folded from the same parameters are
    one parameter again.

    Raises:
        ModelError: a folded tensor is not finite, or is tied to one that has other values.
    """
    masks: dict[int, Tensor] = {}
    one: dict[tuple[int, ...], nn.Parameter] = {}
    for fold in folded:
        value, key = fold.value, tuple(id(p) for p in fold.sources)
        mask = next(
            (masks[i] for i in key if i in masks and masks[i].shape == value.shape), fold.mask
        )
        if mask is not None:
            masks[id(value)] = mask
        if getattr(fold.module, fold.name, None) is not value or not isinstance(
            value, nn.Parameter
        ):
            # the direction of a weight norm, which is folded later, or a buffer
            continue
        _check_finite(fold.where, value)
        parameters = fold.module._parameters
        # biases come after the weights, as in torch's own layers
        parameters.update({k: parameters.pop(k) for k in list(parameters) if k.startswith("bias")})
        made = sum(tuple(id(p) for p in other.sources) == key for other in folded)
        first = one.setdefault(key, value)
        if any(uses.get(i, 1) != made for i in key) or not torch.equal(first, value):
            raise ModelError(
                f"'{fold.where}': it is tied to another parameter that is not pruned or normed in"
                " the same way, so that they have different values; untie them, or prune both by"
                " one mask"
            )
        if first is not value:
            setattr(fold.module, fold.name, first)
    return masks


def _check_finite(where: str, value: Tensor) -> None:
    """Raises ModelError unless all entries of a folded tensor are finite."""
    if not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise ModelError(
            f"'{where}': {bad} of its {value.numel()} values are not finite (weight norm"
            " of a direction that is 0 is 0/0); set them to finite numbers"
        )


def hooks(module: nn.Module, kind: type) -> Iterator[tuple[int, Any]]:
    """The hooks of `module` that are of this kind, each with its key."""
    return (
        (key, hook)
        for key, hook in list(module._forward_pre_hooks.items())
        if isinstance(hook, kind)
    )


def _normed(module: nn.Module) -> list[str]:
    """The tensors of `module` under weight norm whose gain and direction are both trained, or both
    frozen.
    """
    pairs = {
        hook.name: [getattr(module, f"{hook.name}{end}") for end in ("_g", "_v")]
        for _, hook in hooks(module, WeightNorm)
    }
    for name, parts in parametrized(module).items():
        if len(parts) == 1 and isinstance(parts[0], _WeightNorm):
            pairs[name] = [parts.original0, parts.original1]
    return [name for name, (g, v) in pairs.items() if g.requires_grad == v.requires_grad]


def _constrained(module: nn.Module) -> bool:
    return bool(parametrized(module)) or any(True for _ in hooks(module, SpectralNorm))


def parametrized(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Tensor of `module` under a parametrization → its parametrizations."""
    if not parametrize.is_parametrized(module):
        return {}
    found = cast(nn.ModuleDict, module.parametrizations)
    return {name: cast(parametrize.ParametrizationList, parts) for name, parts in found.items()}


def _folded(
    path: str,
    module: nn.Module,
    name: str,
    sources: tuple[nn.Parameter, ...],
    mask: Tensor | None = None,
) -> Folded:
    return Folded(
        f"{path}.{name}" if path else name, module, name, getattr(module, name), sources, mask
    )
