"""Which positions of which axes are kept or removed together.

Every position of every axis of every tensor has a number, its channel. Tied channels are removed
together. A position may also stand for several channels at once: unit 5 of a layer whose outputs
are split into heads is dimension 1 of head 1. It is kept if all of its parts are. Owns
`ChannelIds`. Next: `states.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
FIXED = 0  # the channel of rows, pixels and outputs, which are always kept


class ChannelIds:
    """Channels by number, their ties, and the parts of those that stand for several."""

    def __init__(self) -> None:
        self._parent = [FIXED]
        self._parts: dict[int, tuple[int, ...]] = {}
        self._fixed: dict[int, str] = {FIXED: ""}
        self._joined: dict[tuple[int, ...], int] = {}
        self._alike: list[list[Ids]] = []

    def new(self, count: int) -> Ids:
        """`count` new channels, tied to nothing."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, i: int) -> int:
        """The channel that represents all channels tied to `i`."""
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def roots(self, ids: Ids) -> Ids:
        """`root` of each."""
        return np.array([self.root(int(i)) for i in ids], dtype=np.int64)

    def tie(self, a: Ids, b: Ids) -> None:
        """Ties the channels of `a` to those of `b`, one to one."""
        for i, j in dict.fromkeys(zip(a.tolist(), b.tolist(), strict=True)):
            self._tie(i, j)

    def tie_all(self, ids: Ids) -> None:
        """Ties the channels to each other."""
        self.tie(ids[1:], ids[:-1])

    def fix(self, ids: Ids, why: str) -> None:
        """Keeps the channels, whether or not anything reads them."""
        for i in dict.fromkeys(ids.tolist()):
            self._fixed.setdefault(self.root(i), why)

    def keep_as_many(self, axes: list[Ids]) -> None:
        """Lets all of these axes keep the same number of channels; the first of each are kept
        first.
        """
        self._alike.append(axes)

    def prunable(self, ids: Ids) -> bool:
        """Whether any of the channels may be removed."""
        return any(self.root(i) not in self._fixed for i in dict.fromkeys(ids.tolist()))

    def free(self, ids: Ids) -> Ids:
        """`roots` where the channel may be removed by itself; −1 elsewhere."""
        bound = self._fixed.keys() | self._parts.keys()
        return np.array([-1 if r in bound else r for r in self.roots(ids).tolist()], dtype=np.int64)

    def joined(self, parts: Iterable[int]) -> int:
        """The channel that is kept if all of `parts` are."""
        roots = tuple(dict.fromkeys(r for r in map(self.root, parts) if r != FIXED))
        if len(roots) < 2:
            return roots[0] if roots else FIXED
        if roots not in self._joined:
            (one,) = self.new(1).tolist()
            self._parts[one] = roots
            self._joined[roots] = one
        return self._joined[roots]

    def _tie(self, i: int, j: int) -> None:
        waiting = [(i, j)]
        while waiting:
            low, high = sorted(map(self.root, waiting.pop()))
            if low == high:
                continue
            self._parent[high] = low
            if high in self._fixed:
                self._fixed.setdefault(low, self._fixed[high])
            one, other = self._parts.pop(low, ()), self._parts.pop(high, ())
            if low == FIXED:
                waiting += [(part, FIXED) for part in (*one, *other)]
                continue
            if one or other:
                self._parts[low] = one or other
            if one and other:
                pairs = zip(one, other, strict=False)
                if len(one) != len(other):  # another split: all of its parts are kept together
                    pairs = zip((one + other)[1:], one + other, strict=False)
                waiting += pairs

    def resolved(self) -> Resolved:
        """The ties, now that all are known."""
        while (circle := self._circle()) is not None:
            self._parts.pop(circle[0], None)
            self.tie_all(np.array(circle))
        count = len(self._parent)
        roots = np.array([self.root(i) for i in range(count)], dtype=np.int64)
        parts = {r: self._bases(r) for r in self._parts}
        fixed = {r: why for r, why in self._fixed.items() if self.root(r) == r}
        return Resolved(roots, parts, fixed, self._alike)

    def _bases(self, i: int) -> tuple[int, ...]:
        i = self.root(i)
        if i not in self._parts:
            return (i,)
        return tuple(dict.fromkeys(b for part in self._parts[i] for b in self._bases(part)))

    def _circle(self) -> list[int] | None:
        """Channels of which each is a part of the next, and the last of the first."""
        done: set[int] = set()
        for start in list(self._parts):
            path: list[int] = []
            if (found := self._walk(self.root(start), path, done)) is not None:
                return found
        return None

    def _walk(self, i: int, path: list[int], done: set[int]) -> list[int] | None:
        if i in path:
            return path[path.index(i) :]
        if i in done or i not in self._parts:
            return None
        path.append(i)
        for part in self._parts[i]:
            if (found := self._walk(self.root(part), path, done)) is not None:
                # a single channel that is a part of itself is tied to its other parts
                return [*found, *map(self.root, self._parts[i])] if len(found) == 1 else found
        path.pop()
        done.add(i)
        return None


class Resolved:
    """All ties of a network. `kept(ids)` says which channels are kept so far, `keep` marks more."""

    def __init__(
        self,
        roots: Ids,
        parts: dict[int, tuple[int, ...]],
        fixed: dict[int, str],
        alike: list[list[Ids]],
    ) -> None:
        self.roots, self._parts, self._alike = roots, parts, alike
        self._kept = np.zeros(len(roots), dtype=bool)
        self.why: dict[int, str] = {}
        for root, reason in fixed.items():
            self.keep(np.array([root]), reason)
        self._joined = np.array(sorted(parts), dtype=np.int64)
        flat = [base for root in self._joined.tolist() for base in parts[root]]
        self._flat = np.array(flat, dtype=np.int64)
        sizes = [len(parts[root]) for root in self._joined.tolist()]
        self._starts = np.cumsum([0, *sizes[:-1]]) if sizes else np.zeros(0, dtype=np.int64)

    def kept(self, ids: Ids) -> NDArray[np.bool_]:
        """For each of these channels, whether it is kept."""
        if len(self._joined):
            kept = np.logical_and.reduceat(self._kept[self._flat], self._starts)
            self._kept[self._joined] = kept
        return self._kept[self.roots[ids]]

    def keep(self, ids: Ids, why: str) -> bool:
        """Marks channels, and their parts, as kept; whether any was not."""
        changed = False
        for root in dict.fromkeys(self.roots[ids].tolist()):
            for base in self._parts.get(root, (root,)):
                if not self._kept[base]:
                    self._kept[base] = changed = True
                    self.why[base] = why
        return changed

    def levelled(self) -> bool:
        """Marks the first channels of axes that keep fewer than others, where all keep as many;
        whether any was marked.
        """
        changed = False
        for axes in self._alike:
            most = max(int(self.kept(axis).sum()) for axis in axes)
            for axis in axes:
                left = ~self.kept(axis)
                more = axis[left][: most - int((~left).sum())]
                changed |= self.keep(more, "all of its layers and directions have as many units")
        return changed

    def reason(self, ids: Ids) -> str:
        """Why the first of these channels that has a reason is kept."""
        for root in self.roots[ids].tolist():
            for base in self._parts.get(root, (root,)):
                if self.why.get(base):
                    return self.why[base]
        return ""
