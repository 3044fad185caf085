"""Constant channels that a padded convolution reads, folded into a tensor over the pixels.

Such a channel adds less at the edges of an image than inside it. A bias cannot represent that, but
a number for each pixel can. Owns `with_map`. Next: `rules.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_bmr.shrinking.contractions import Bools, Read, array
from pyro_bmr.shrinking.states import Call, State


def with_map(call: Call, read: Read) -> Read:
    r"""What a convolution reads, if the constants that it reads may go into a map.

    .. math:: m = W_{\cdot C} * x_C

    C are the removed constant channels, and :math:`*` is the convolution with its padding. The map
    has a number for each output channel and pixel, or one for a whole axis along which it does not
    change. The read is returned as it was if the sizes of images are open, if a bias can take the
    constants up, or if the map has more numbers than the weights that would be saved.
    """
    x, weight = call.states[:2]
    channels = x.value.ndim - weight.value.ndim + 1  # axis of the channels: 1, or 0 without rows
    if any(call.dynamic[channels:]):
        return read
    others = [k for k in range(x.value.ndim) if k != channels]
    one = x.value.narrow(0, 0, 1) if channels else x.value
    alike = (x.value == one).all(dim=others)  # in all rows
    foldable = array(alike & ~x.unknown.any(dim=others))
    added = foldable & ~read.foldable
    outputs = call.values().narrow(0, 0, 1) if channels else call.values()
    saved = int(added.sum()) * weight.value.numel() // max(len(added), 1)
    if bool(weight.unknown.any()) or saved <= outputs.numel():
        return read
    shape = [-1 if k == channels else 1 for k in range(x.value.ndim)]

    def effect(removed: Tensor) -> Tensor:
        return _map(call, torch.where(removed.view(shape), one, 0.0))

    return replace(
        read, foldable=foldable, level=None, shared="", effect=effect, broken=_still(read, foldable)
    )


def _still(read: Read, foldable: Bools) -> Bools | None:
    """The constants that are kept nevertheless."""
    return None if read.broken is None else read.broken & ~foldable


def _map(call: Call, removed: Tensor) -> Tensor:
    """What the removed channels add, in float64, with one number for an axis where it is equal."""
    x, weight = call.states[:2]

    def pick(state: State) -> Tensor:
        if state is x:
            return removed.double()
        return (weight.value if state is weight else torch.zeros_like(state.value)).double()

    result: Tensor = call.run(pick)
    for axis in range(result.ndim - weight.value.ndim + 2, result.ndim):
        first = result.narrow(axis, 0, 1)
        if bool((result == first).all()):
            result = first
    return result
