"""What is known of a value of the graph: where it is constant, and which channel each position is.

Owns `State`, `state_of`, `unknown_state`, `states_in` and `fixed`. Next: `ties.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIXED = 0  # the channel that is never pruned
Axes = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class State:
    """What is known of one value: the constant `value`, 0 where it is `unknown`.

    `axes`: for each axis, the channel of every position.
    """

    value: Tensor
    unknown: Tensor
    axes: Axes


def state_of(value: Tensor, unknown: Tensor, axes: Axes) -> State:
    """The state of a value that was computed from constants; entries that are unknown become 0."""
    return State(value.masked_fill(unknown, 0), unknown, axes)


def unknown_state(value: Any) -> Any:
    """The state of a tensor, or the states of a tuple, with nothing constant and nothing to
    prune.
    """
    if isinstance(value, (tuple, list)):
        return tuple(unknown_state(part) for part in value)
    unknown = torch.ones_like(value, dtype=torch.bool)
    return State(torch.zeros_like(value), unknown, fixed(value.shape))


def fixed(shape: Sequence[int]) -> Axes:
    """Axes of this shape with nothing that can be pruned."""
    return tuple(np.full(n, FIXED, dtype=np.int64) for n in shape)


def states_in(tree: Any) -> list[State]:
    """The states among the arguments of an operation, in order."""
    if isinstance(tree, State):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [state for part in tree for state in states_in(part)]
