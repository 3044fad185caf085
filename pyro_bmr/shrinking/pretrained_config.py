"""The configuration of a Hugging Face model after its tensors are cut, so that `save_pretrained`
writes what `from_pretrained` reads.

Owns `fitting_config`. Next: `layer_table.py`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_TRIES = 300


@torch.no_grad()
def fitting_config(
    small: nn.Module, net: nn.Module, same: Callable[[nn.Module], bool]
) -> dict[str, int] | None:
    """The entries of `small.config` that make a model of its tensors, with their new values.

    `net`: the same before it was cut. `same`: whether a model gives the outputs that it should. The
    result is empty if there is nothing to change, or no configuration. It is None if none fits: a
    configuration has one number for all layers, and they may have kept different numbers of units.
    """
    config: Any = getattr(small, "config", None)
    if config is None or not hasattr(small, "save_pretrained"):
        return {}
    tensors = small.state_dict()
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    for entries in _candidates(config, small, net):
        if _shapes(type(small), config, entries) == shapes:
            model = type(small)(_changed(config, entries)).eval()
            model.load_state_dict(tensors)
            if same(model):
                return entries
    return None


def _candidates(config: Any, small: nn.Module, net: nn.Module) -> Iterator[dict[str, int]]:
    """Changes of numbers in a configuration, the fewest first."""
    before = dict(net.named_parameters())
    sizes = {
        (old, new)
        for name, parameter in small.named_parameters()
        for old, new in zip(before[name].shape, parameter.shape, strict=True)
        if old != new
    }
    options: dict[str, list[int]] = {}
    for key, value in vars(config).items():
        if type(value) is not int or value < 2 or key.startswith("_"):
            continue
        # a size itself, or a number of parts of one, such as heads
        found = {new for old, new in sizes if old == value}
        found |= {
            new * value // old for old, new in sizes if old % value == 0 and new * value % old == 0
        }
        if found := {n for n in found if 0 < n < value}:
            options[key] = sorted(found)
    tries = (
        dict(zip(keys, values, strict=True))
        for count in range(len(options) + 1)
        for keys in itertools.combinations(options, count)
        for values in itertools.product(*(options[key] for key in keys))
    )
    return itertools.islice(tries, _TRIES)


def _shapes(kind: Any, config: Any, entries: dict[str, int]) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the tensors of a model with these entries; None if there is no such model."""
    try:
        with torch.device("meta"):
            model = kind(_changed(config, entries))
    # A model may refuse numbers in its own way, such as heads that do not divide a width.
    except Exception:
        return None
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def _changed(config: Any, entries: dict[str, int]) -> Any:
    changed = copy.deepcopy(config)
    for key, value in entries.items():
        setattr(changed, key, value)
    return changed
