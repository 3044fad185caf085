"""The rows on which a trained network is measured while it is pruned.

Owns `Calibration` and `calibration_rows`. Next: `layer.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmr.curvatures.network_batches import batches, own_rows
from pyro_bmr.curvatures.ranks import Ranks, add_rows
from pyro_bmr.data.batch import rows_at
from pyro_bmr.data.given import source_of
from pyro_bmr.data.inputs import Inputs, of_each, rows_in
from pyro_bmr.data.row_sources import Held
from pyro_bmr.errors import DataError


@dataclass(frozen=True)
class Calibration:
    """Batches of `rows` rows in all, of data of `size` rows; y is None where there are no
    targets. In a group of processes the batches are the parts of this one, perhaps of no rows, and
    `rows` is that of all.
    """

    batches: tuple[tuple[Inputs, Tensor | None], ...]
    rows: int
    size: int

    def some(self) -> Iterator[tuple[Inputs, Tensor | None]]:
        """The batches that have rows."""
        return ((x, y) for x, y in self.batches if rows_in(x))

    def digest(self) -> str:
        """Of the rows, SHA-256."""
        check = hashlib.sha256()
        for x, y in self.batches:
            add_rows(check, x, y)
        return check.hexdigest()


def calibration_rows(
    net: nn.Module,
    data: Any,
    rows: int,
    targets: bool,
    batch_size: int,
    seed: int,
    size: int | None,
    ranks: Ranks,
) -> Calibration:
    """At most `rows` rows of the data, read once: of tensors a random part, of a loader or a data
    set the first. A call of all processes.

    Raises:
        DataError: a process reads other rows than the first.
    """
    known = size
    found = None if isinstance(data, list) else _held(data, targets)
    if found is not None:
        count = rows_in(found.x)
        known = count if size is None else size
        if count > rows:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(count, generator=generator, device="cpu")
            chosen = order[:rows].sort().values
            if found.y is None:
                data = of_each(lambda part: part[chosen], found.x)
            else:
                data = rows_at((found.x, found.y), chosen)
    seen = 0

    def first() -> Iterator[tuple[Inputs, Tensor | None]]:
        nonlocal seen
        for x, y in batches(net, data, targets, batch_size, size):
            if seen < rows:
                yield x, y
            seen += rows_in(x)
            if seen >= rows and known is not None:
                return

    kept, taken = [], 0
    for count, x, y in own_rows(first(), ranks, seed, "prune"):
        taken += count
        kept.append((x, y))
    return Calibration(tuple(kept), taken, seen if known is None else known)


def _held(data: Any, targets: bool) -> Held | None:
    """The data, if they are in memory."""
    for with_targets in (True, False):
        try:
            source = source_of(data, targets=with_targets)
        except DataError:
            if targets:
                raise
            continue
        return source if isinstance(source, Held) else None
    return None
