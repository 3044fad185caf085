"""The batches with which a trained network is run, its mode in the run, and the tensor in what it
returns.

Owns `batches`, `own_rows`, `evaluation` and `output_of`. Next: `passes.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyro_bmr.data.batch import BatchChecks
from pyro_bmr.data.given import source_of
from pyro_bmr.data.inputs import Inputs, of_each, parts_of, pieces, rows_in
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
    every: Iterator[tuple[Inputs, Tensor | None]], rank: int, processes: int, seed: int
) -> Iterator[tuple[int, Inputs, Tensor | None]]:
    """How many rows each batch has, and x and y of those that the process `rank` takes, perhaps
    none. A loader shuffles by `seed`, alike in all of the processes.

    Raises:
        DataError: the first batch of a process has other rows than that of the first process.
    """

    def part(tensor: Tensor) -> Tensor:
        return tensor.tensor_split(processes)[rank]

    alike = drawing_alike(every, seed) if processes > 1 else every
    for number, (x, y) in enumerate(alike):
        if number == 0 and processes > 1:
            _check_same_rows(x, y)
        yield rows_in(x), of_each(part, x), None if y is None else part(y)


def _check_same_rows(x: Inputs, y: Tensor | None) -> None:
    """Raises if one process of the group has other rows than the first, in all of them."""
    digest = hashlib.sha256()
    for name, part in {**parts_of(x), **({} if y is None else {"y": y})}.items():
        plain = part.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    every: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(every, digest.hexdigest())
    other = next((rank for rank, rows in enumerate(every) if rows != every[0]), None)
    if other is not None:
        raise DataError(
            f"curvature: process {other} reads other rows than process 0; give the loader no"
            " generator of its own, or a Dataset or tensors"
        )


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
    """The network in evaluation mode, without torch's fast path, which hides its weights."""
    modes = [(module, module.training) for module in net.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        torch.backends.mha.set_fastpath_enabled(fast)
