"""The batches with which a trained network is run, its mode in the run, and the tensor in what it
returns.

Owns `batches`, `own_rows`, `evaluation` and `output_of`. Next: `passes.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmr.curvatures.ranks import Ranks, RowCheck
from pyro_bmr.data.batch import BatchChecks
from pyro_bmr.data.given import source_of
from pyro_bmr.data.inputs import Inputs, of_each, pieces, rows_in
from pyro_bmr.data.row_sources import Held, Source, chunks
from pyro_bmr.errors import DataError, described
from pyro_bmr.isolation import drawing_alike

_CHUNK = 10_000  # rows that are read at once


def output_of(returned: Any) -> Tensor:
    """The tensor in what a network returns: of the named outputs of a Hugging Face model it is the
    `logits`; in float32 at least.
    """
    if isinstance(returned, Mapping) and hasattr(returned, "logits"):
        returned = returned.logits
    if not isinstance(returned, Tensor) or not returned.is_floating_point():
        raise DataError(
            f"curvature: expected one tensor of real numbers from the network, got"
            f" {described(returned)}; give a module that returns its outputs alone"
        )
    return returned.to(torch.promote_types(returned.dtype, torch.float32))


def batches(
    net: nn.Module, data: Any, targets: bool, rows: int, size: int | None = None
) -> Iterator[tuple[Inputs, Tensor | None]]:
    """x and y of some rows at a time, on the device and in the dtype of the network. `size`: N, for
    a list of batches.
    """
    like = next(p for p in net.parameters() if p.is_floating_point())

    def placed(part: Tensor) -> Tensor:
        return part.to(like.device, like.dtype if part.is_floating_point() else part.dtype)

    source = _source(data, targets, size if isinstance(data, list) else None)
    for x, y in chunks(source, _CHUNK, BatchChecks(missing=True), targets):
        if isinstance(x, (Tensor, Mapping, tuple)) and not rows_in(x):
            raise DataError("data: expected at least one row, got none")
        first = 0
        for part in pieces(x, rows):
            count = rows_in(part)
            own = None if y is None else y[first : first + count]
            first += count
            yield of_each(placed, part), None if own is None else placed(own)


def own_rows(
    every: Iterator[tuple[Inputs, Tensor | None]], ranks: Ranks, seed: int, caller: str
) -> Iterator[tuple[int, Inputs, Tensor | None]]:
    """How many rows each batch has, and x and y of those that this process takes, perhaps none. A
    loader shuffles by `seed`, alike in all of the processes.

    Raises:
        DataError: a process has other rows in a batch than the first process; of the first batch at
            once, of the others at the end.
    """
    alike = drawing_alike(every, seed) if ranks.size > 1 else every
    check = RowCheck(ranks)
    for number, (x, y) in enumerate(alike):
        check.add(x, y)
        if number == 0:
            check.compare(caller)
        yield rows_in(x), of_each(ranks.part, x), None if y is None else ranks.part(y)
    check.compare(caller)


def _source(data: Any, targets: bool, size: int | None) -> Source:
    """Rows with targets where the data have them."""
    try:
        source = source_of(data, targets=True, size=size)
    except DataError:
        if targets:
            raise
        source = source_of(data, targets=False, size=size)
    if isinstance(source, Held) and source.y is None and targets:
        raise DataError(
            "data: fisher='empirical' needs targets, got inputs alone; give pairs (x, y), or take"
            " fisher='true'"
        )
    return source


@contextmanager
def evaluation(net: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, without torch's fast path, which hides its weights. With
    recurrent layers it is without cuDNN, which refuses their backward pass in this mode.
    """
    modes = [(module, module.training) for module in net.modules()]
    fast, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    if any(isinstance(module, nn.RNNBase) for module, _ in modes):
        torch.backends.cudnn.enabled = False
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.cudnn.enabled = cudnn
