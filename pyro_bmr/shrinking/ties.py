"""Which channels of a network are kept or pruned together, and which layer reads which.

Owns `Read` and `Ties`. Its entries are made in `layers.py` and `functions.py`. Next: `reshapes.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, fx

from pyro_bmr.shrinking.states import FIXED, State


@dataclass(frozen=True)
class Read:
    """A layer that weights its inputs. `nonzero` (outputs, inputs): which weights are not 0.

    `foldable` (inputs): where the input is a constant that the bias can take up; `level` (inputs):
    that constant.
    """

    node: fx.Node
    inputs: np.ndarray
    outputs: np.ndarray
    nonzero: np.ndarray
    foldable: np.ndarray
    level: Tensor


class Ties:
    """Channels by number. Tied channels are kept or pruned together; `FIXED` is always kept.

    `reads`: every layer that weights channels. `reasons`: layer → why channels of it are kept that
    could otherwise be pruned.
    """

    def __init__(self) -> None:
        self._parent = [FIXED]
        self.reads: list[Read] = []
        self.reasons: dict[str, str] = {}
        self._first_use: dict[str, np.ndarray] = {}

    def new(self, count: int) -> np.ndarray:
        """`count` new channels, tied to nothing."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def _root(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def roots(self, ids: np.ndarray) -> np.ndarray:
        """For each channel the one that represents all channels tied to it."""
        return np.array([self._root(int(i)) for i in ids], dtype=np.int64)

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Ties the channels of `a` to those of `b`, one to one."""
        for i, j in {(int(i), int(j)) for i, j in zip(a, b, strict=True)}:
            low, high = sorted((self._root(i), self._root(j)))
            self._parent[high] = low  # FIXED is the lowest number, so it represents its ties

    def fix(self, ids: np.ndarray) -> None:
        """Ties the channels to `FIXED`: they are kept, whether or not anything reads them."""
        self.tie(ids, np.full_like(ids, FIXED))

    def shared(self, name: str, ids: np.ndarray) -> np.ndarray:
        """`ids`, tied to those of the first use of `name`.

        A layer or tensor that is used more than once is cut the same way in all its uses.
        """
        self.tie(self._first_use.setdefault(name, ids), ids)
        return ids

    def tie_all(self, ids: np.ndarray) -> None:
        """Ties the channels to each other."""
        self.tie(ids[1:], ids[:-1])

    def prunable(self, ids: np.ndarray) -> bool:
        """Whether any of the channels can be pruned."""
        return bool((self.roots(ids) != FIXED).any())

    def fix_all(self, x: State) -> None:
        """Fixes the channels of every axis."""
        for axis in x.axes:
            self.fix(axis)

    def couple(self, node: fx.Node, ids: np.ndarray) -> None:
        """Ties all channels of a layer that mixes them, such as a LayerNorm, and enters the
        reason.
        """
        if self.prunable(ids):
            self.reasons[str(node.target)] = (
                "each of its outputs reads all of its channels; they are kept together"
            )
        self.tie_all(ids)

    def read(
        self, node: fx.Node, x: State, axis: int, outputs: np.ndarray, nonzero: Tensor, padded: bool
    ) -> None:
        """Enters a layer that weights the channels of `axis`.

        If it pads with zeros (`padded`), only the constant 0 can be folded into its bias.
        """
        self.shared(f"{node.target} in", x.axes[axis])
        value, unknown = (t.movedim(axis, 0).flatten(1) for t in (x.value, x.unknown))
        level = value[:, 0]
        constant = ~unknown.any(1) & (value == value[:, :1]).all(1)
        foldable = constant & (level == 0) if padded else constant
        broken = constant & ~foldable & nonzero.any(0)
        if bool(broken.any()):
            self.reasons[str(node.target)] = (
                f"reads the constant input channels {broken.nonzero().flatten().tolist()} through"
                " zero padding, where a constant is not a bias; they are kept"
            )
        arrays = (nonzero.cpu().numpy(), foldable.cpu().numpy())
        self.reads.append(Read(node, x.axes[axis], outputs, *arrays, level.clone()))

    def agree(self) -> None:
        """Leaves a constant foldable only if it is the same in every use of a layer.

        A layer that is used more than once has only one bias.
        """
        uses: dict[Any, list[int]] = {}
        for k, read in enumerate(self.reads):
            uses.setdefault(read.node.target, []).append(k)
        for same in (ks for ks in uses.values() if len(ks) > 1):
            foldable = _foldable_in_all([self.reads[k] for k in same])
            for k in same:
                self.reads[k] = replace(self.reads[k], foldable=foldable)

    def kept(self) -> np.ndarray:
        """Whether each channel is kept: `FIXED`, and whatever a kept output reads."""
        kept = np.zeros(len(self._parent), dtype=bool)
        kept[FIXED] = True
        reads = [(self.roots(r.inputs), self.roots(r.outputs), r) for r in reversed(self.reads)]
        before = -1
        while before != (before := int(kept.sum())):
            for inputs, outputs, read in reads:
                needed = read.nonzero[kept[outputs]].any(0) & ~read.foldable
                kept[inputs[needed]] = True
        return kept


def _foldable_in_all(reads: Sequence[Read]) -> np.ndarray:
    level = reads[0].level
    same = [read.foldable & (read.level == level).cpu().numpy() for read in reads]
    return np.logical_and.reduce(same)
