"""Which channels of a network are one and the same, and which layer reads which: the book that the
analysis keeps.

Owns `State`, `Read` and `Ties`. The entries are made by `operations.py`. Next: `reshapes.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, fx

FIXED = 0
Axes = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class State:
    """What is known of one value of the graph: the constant `value`, 0 where it is `unknown`, and
    the identities of the positions of its axes.
    """

    value: Tensor
    unknown: Tensor
    axes: Axes


@dataclass(frozen=True)
class Read:
    """A layer that weighs its inputs: `nonzero` (outputs, inputs), `foldable` (inputs), the
    constants in `level` (inputs).
    """

    node: fx.Node
    inputs: np.ndarray
    outputs: np.ndarray
    nonzero: np.ndarray
    foldable: np.ndarray
    level: Tensor


class Ties:
    """Identities of channels: those that are tied live and die together, and `FIXED` never goes.
    `reads`: every layer that weighs channels. `kept`: layer → why channels of it stay that could
    have gone.
    """

    def __init__(self) -> None:
        self._parent = [FIXED]
        self.reads: list[Read] = []
        self.kept: dict[str, str] = {}
        self._first_use: dict[str, np.ndarray] = {}

    def new(self, count: int) -> np.ndarray:
        """As many identities that nothing shares yet."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def _root(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def roots(self, ids: np.ndarray) -> np.ndarray:
        """The identity that stands for each, the same for all that are tied."""
        return np.array([self._root(int(i)) for i in ids], dtype=np.int64)

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Ties the identities of `a` to those of `b`, one to one."""
        for i, j in {(int(i), int(j)) for i, j in zip(a, b, strict=True)}:
            low, high = sorted((self._root(i), self._root(j)))
            self._parent[high] = low  # FIXED is the lowest and wins

    def fix(self, ids: np.ndarray) -> None:
        """They stay, whatever reads them."""
        self.tie(ids, np.zeros_like(ids))

    def shared(self, name: str, ids: np.ndarray) -> np.ndarray:
        """`ids`, tied to those of the first use of `name`: what is used more than once is cut for
        all its uses alike.
        """
        self.tie(self._first_use.setdefault(name, ids), ids)
        return ids

    def tie_all(self, ids: np.ndarray) -> None:
        """Ties them to each other."""
        self.tie(ids[1:], ids[:-1])

    def tracked(self, ids: np.ndarray) -> bool:
        """Whether any of them could go."""
        return bool((self.roots(ids) != FIXED).any())

    def fix_all(self, x: State) -> None:
        """`fix` for every axis."""
        for axis in x.axes:
            self.fix(axis)

    def couple(self, node: fx.Node, ids: np.ndarray) -> None:
        """Ties all channels of a layer that mixes them, such as a LayerNorm, and says so in
        `kept`.
        """
        if self.tracked(ids):
            self.kept[str(node.target)] = (
                "each of its outputs reads all of its channels; they are kept together"
            )
        self.tie_all(ids)

    def read(
        self, node: fx.Node, x: State, axis: int, outputs: np.ndarray, nonzero: Tensor, padded: bool
    ) -> None:
        """Enters a layer that weighs the channels of `axis`; `padded`: it pads with zeros, so that
        only the constant 0 can be folded.
        """
        self.shared(f"{node.target} in", x.axes[axis])
        value, unknown = (t.movedim(axis, 0).flatten(1) for t in (x.value, x.unknown))
        constant = ~unknown.any(1) & (value == value[:, :1]).all(1)
        foldable = constant & (value[:, 0] == 0) if padded else constant
        if bool((constant & ~foldable & nonzero.any(0)).any()):
            where = (constant & ~foldable & nonzero.any(0)).nonzero().flatten().tolist()
            self.kept[str(node.target)] = (
                f"reads the constant input channels {where} through zero padding, where a constant"
                " is not a bias; they are kept"
            )
        self.reads.append(
            Read(
                node,
                x.axes[axis],
                outputs,
                nonzero.cpu().numpy(),
                foldable.cpu().numpy(),
                value[:, 0].clone(),
            )
        )

    def agree(self) -> None:
        """A layer that is used more than once has one bias: only a constant that is the same in
        every use can be folded into it.
        """
        uses: dict[Any, list[int]] = {}
        for k, read in enumerate(self.reads):
            uses.setdefault(read.node.target, []).append(k)
        for same in (ks for ks in uses.values() if len(ks) > 1):
            first = self.reads[same[0]]
            foldable = np.logical_and.reduce(
                [
                    self.reads[k].foldable & (self.reads[k].level == first.level).cpu().numpy()
                    for k in same
                ]
            )
            for k in same:
                self.reads[k] = replace(self.reads[k], foldable=foldable)

    def living(self) -> np.ndarray:
        """The least set of identities that is closed under: what a living output reads, lives."""
        living = np.zeros(len(self._parent), dtype=bool)
        living[FIXED] = True
        reads = [(self.roots(r.inputs), self.roots(r.outputs), r) for r in reversed(self.reads)]
        before = -1
        while before != (before := int(living.sum())):
            for inputs, outputs, read in reads:
                needed = read.nonzero[living[outputs]].any(0) & ~read.foldable
                living[inputs[needed]] = True
        return living


def fixed(shape: Sequence[int]) -> Axes:
    """Axes of this shape of which nothing can go."""
    return tuple(np.zeros(n, dtype=np.int64) for n in shape)
