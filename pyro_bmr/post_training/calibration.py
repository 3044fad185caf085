"""The rows on which a trained network is measured while it is pruned.

Owns `Calibration` and `calibration_rows`. Next: `layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmr.curvatures.network_batches import batches
from pyro_bmr.data.batch import rows_at
from pyro_bmr.data.given import source_of
from pyro_bmr.data.inputs import Inputs, of_each, rows_in
from pyro_bmr.data.row_sources import Held
from pyro_bmr.errors import DataError


@dataclass(frozen=True)
class Calibration:
    """Batches of `rows` rows in all, of data of `size` rows; y is None where there are no
    targets.
    """

    batches: tuple[tuple[Inputs, Tensor | None], ...]
    rows: int
    size: int


def calibration_rows(
    net: nn.Module,
    data: Any,
    rows: int,
    targets: bool,
    batch_size: int,
    seed: int,
    size: int | None,
) -> Calibration:
    """At most `rows` rows of the data, read once: of tensors a random part, of a loader or a data
    set the first.
    """
    known = size
    found = None if isinstance(data, list) else _held(data, targets)
    if found is not None:
        count = rows_in(found.x)
        known = count if size is None else size
        if count > rows:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(count, generator=generator)[:rows].sort().values
            if found.y is None:
                data = of_each(lambda part: part[chosen], found.x)
            else:
                data = rows_at((found.x, found.y), chosen)
    kept, seen = [], 0
    for x, y in batches(net, data, targets, batch_size, size):
        if seen < rows:
            kept.append((x, y))
        seen += rows_in(x)
        if seen >= rows and (known is not None or found is not None):
            break
    taken = sum(rows_in(x) for x, _ in kept)
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
