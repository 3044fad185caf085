"""Layers that a reduction empties: a network that goes through such a layer is a constant function,
however many weights are kept elsewhere.

Owns `collapse`, which says so in a sentence, from masks alone, and `collapse_of`, which reads them
off a network. Imports torch only. Next: `multiplied.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

_FEW, _MOST = 0.1, 0.5  # of a layer's units; of those of the median of the other layers
_FUSED = ("qkv", "Wqkv", "qkv_proj", "in_proj")
_NAMED = 5  # layers that a message names


class _Layer(NamedTuple):
    kept: int
    units: int


def collapse(after: Mapping[str, Tensor], before: Mapping[str, Tensor] | None = None) -> str | None:
    """What to say of the layers that have lost their units, or None.

    A layer is a site of two or more dimensions, or the gain of a norm (a vector called
    ``<path>.weight``), but not a token (1, 1, d) or positions (1, n, d); its units are its first
    axis, and one is kept while an entry of it is. A fused projection of query, key and value is
    three layers. The sentence is due if

    - a layer has no kept unit and had one before, and there are other layers, and not every entry
      of all sites is pruned (the empty model, which needs no warning); or
    - a layer has less than a tenth of its units and had that tenth before, while the median of the
      other layers has more than half of theirs.

    Args:
        after, before: site → bool tensor, True where a weight is kept. Without `before`, every unit
            was kept and only empty layers count.
    """
    if not any(_is_layer(name, mask) for name, mask in after.items()):
        return None
    layers = _layers(after)
    start = (
        _layers(before)
        if before is not None
        else {name: _Layer(layer.units, layer.units) for name, layer in layers.items()}
    )
    if len(layers) < 2 or not any(bool(mask.any()) for mask in after.values()):
        return None
    empty = [
        name
        for name, layer in layers.items()
        if layer.kept == 0 and (start[name].kept > 0 or before is None)
    ]
    narrow = [
        name
        for name, layer in layers.items()
        if before is not None and name not in empty and _narrow(name, layers, start)
    ]
    return _sentence(empty, narrow, layers) if empty or narrow else None


def _sentence(empty: list[str], narrow: list[str], layers: Mapping[str, _Layer]) -> str:
    """What to say of the layers that are empty and narrow, and what can be done."""
    parts = []
    if empty:
        which = _listed(empty, layers)
        parts.append(
            f"no unit is kept in {which}: unless a skip connection goes around it, the"
            " network is a constant function of its input"
        )
    if narrow:
        parts.append(
            f"less than a tenth of the units is kept in {_listed(narrow, layers)}, while the median"
            " of the other layers keeps more than half"
        )
    site = (empty or narrow)[0].partition(" ")[0]
    others = [layer for name, layer in layers.items() if name not in empty + narrow]
    rest = (
        f"; the other layers keep {sum(o.kept for o in others):,} of"
        f" {sum(o.units for o in others):,}"
        if others
        else ""
    )
    return (
        f"layer collapse: {'; '.join(parts)}{rest}. Give the layer a target of its own, as in"
        f" kept={{'{site}': 0.5}}, leave it out with to={{'{site}': None, '*': ...}}, prune less,"
        " or in rounds during a fit (Every)"
    )


def collapse_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """The same of the tensors of a plain network, in which pruned weights are zeros: of its empty
    layers, for a report.
    """
    read = {k: t for k, t in tensors.items() if t.is_floating_point() and t.layout == torch.strided}
    sentence = collapse({name: tensor != 0 for name, tensor in read.items()})
    return [sentence] if sentence else []


def _layers(masks: Mapping[str, Tensor]) -> dict[str, _Layer]:
    layers = {}
    for name, mask in masks.items():
        if not _is_layer(name, mask):
            continue
        rows = mask.reshape(len(mask), -1 if mask.numel() else 0).any(1)
        fused = _is_fused(name, mask)
        parts = zip(_PARTS, rows.chunk(3), strict=True) if fused else [("", rows)]
        for part, own in parts:
            layers[f"{name}{part}"] = _Layer(int(own.sum()), len(own))
    return layers


def _is_layer(name: str, mask: Tensor) -> bool:
    if mask.ndim < 2:
        return mask.ndim == 1 and name.endswith(".weight")
    # (1, n, d) is a token or the positions, which are added and may be 0
    return mask.ndim == 2 or len(mask) > 1 or "weight" in name.rpartition(".")[2]


_PARTS = (" (query)", " (key)", " (value)")


def _is_fused(name: str, mask: Tensor) -> bool:
    path, _, leaf = name.rpartition(".")
    called = leaf == "in_proj_weight" or (leaf == "weight" and path.rpartition(".")[2] in _FUSED)
    return called and mask.ndim == 2 and mask.shape[0] == 3 * mask.shape[1] > 0


def _narrow(name: str, layers: Mapping[str, _Layer], start: Mapping[str, _Layer]) -> bool:
    layer = layers[name]
    others = [
        other.kept / other.units for key, other in layers.items() if key != name and other.units
    ]
    return (
        layer.kept < _FEW * layer.units <= start[name].kept
        and bool(others)
        and median(others) > _MOST
    )


def _listed(names: list[str], layers: Mapping[str, _Layer]) -> str:
    shown = ", ".join(
        f"'{name}' ({layers[name].kept} of {layers[name].units})" for name in names[:_NAMED]
    )
    return f"layer {shown}" + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
