"""The processes of one fit under torch.distributed: which rows each takes, what they sum, what one
decides for all, and where they must agree.

Owns `Processes`, and the group of a command that torchrun has started. A fit outside any process
group is one process; every method then returns what it was given. Next: `faults.py`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from pyro_bmr.errors import FitError, PyroBMRError
from pyro_bmr.fitting.checkpoint_file import digest
from pyro_bmr.isolation import seed_of

_WAIT = timedelta(minutes=10)  # for another process, which may be at a reduction


class Processes:
    """The processes of the default group of torch.distributed, if there is one. `rank` is the
    number of this process, `size` the number of processes.
    """

    def __init__(self) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)

    def seed(self, seed: int) -> int:
        """The seed of what each process draws for itself; the first takes the seed of the fit."""
        return seed_of(seed, self.rank)

    def check_rows(self, rows: int, batch_size: int) -> None:
        """Raises FitError if some process would have no row of a batch."""
        if min(rows, batch_size) < self.size:
            raise FitError(
                f"batch_size={batch_size} of {rows} rows: {self.size} processes need at least one"
                " row each; make it larger, or start fewer processes"
            )

    def rows(self, index: Tensor) -> tuple[Tensor, float]:
        """This process's part of the rows of a batch, and what fraction of them it is."""
        if self.size == 1:
            return index, 1.0
        part = index.tensor_split(self.size)[self.rank]
        return part, len(part) / len(index)

    def sum(self, tensors: Sequence[Tensor], share: float) -> list[Tensor]:
        """Σ over the processes of share · tensor, equal to the bit in all of them. One message
        holds them all.

        Raises:
            FitError: another process does not answer.
        """
        if self.size == 1:
            return list(tensors)
        message = torch.cat([t.reshape(-1) for t in tensors]).mul_(share)
        self._send(dist.all_reduce, message)
        parts = message.split([t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Gives each tensor, in place, the values that it has in the first process."""
        if self.size > 1:
            for tensor in tensors:
                self._send(dist.broadcast, values := tensor.detach().contiguous(), src=0)
                tensor.detach().copy_(values)

    def decided_by_first(
        self, decide: Callable[[], tuple[Mapping[str, Tensor], float]], device: torch.device
    ) -> tuple[dict[str, Tensor], float]:
        """The masks and the number that `decide` gives in the first process, in all of them; its
        error as well.
        """
        if self.size == 1:
            masks, number = decide()
            return dict(masks), number
        found: tuple[Mapping[str, Tensor], float] = ({}, math.nan)
        said: dict[str, Any] = {}
        if self.rank == 0:
            try:
                found = decide()
                said = {
                    "shapes": {name: list(mask.shape) for name, mask in found[0].items()},
                    "number": found[1],
                }
            except PyroBMRError as error:
                said = {"error": str(error)}
        said = self._said_by_first(said, device)
        if "error" in said:
            raise FitError(said["error"])
        sizes = [math.prod(shape) for shape in said["shapes"].values()]
        flat = (
            torch.cat([m.reshape(-1).to(torch.uint8) for m in found[0].values()])
            if found[0]
            else torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        )
        self._send(dist.broadcast, flat, src=0)
        masks = {
            name: part.view(shape).bool()
            for (name, shape), part in zip(said["shapes"].items(), flat.split(sizes), strict=True)
        }
        return masks, float(said["number"])

    def check_arguments(
        self,
        settings: Mapping[str, Any],
        differences: Callable[[Any, Any], list[str]],
        device: torch.device,
    ) -> None:
        """Raises FitError in every process unless `settings` are the same in all, with
        `differences(first's, this one's)` where they are not.
        """
        if self.size > 1:
            mine = differences(self._said_by_first(dict(settings), device), settings)
            other = self._ranks_where(bool(mine), device)
            if other:
                what = f" ({'; '.join(mine[:5])})" if mine else ""
                raise FitError(
                    f"process {_listed(other)} calls fit otherwise than process 0{what}; give all"
                    " of them the same arguments"
                )

    def check_equal(
        self, tensors: Mapping[str, Tensor], device: torch.device, otherwise: str
    ) -> None:
        """Raises FitError in every process unless all have the same tensors, to the bit; it says
        which have not, and `otherwise`.
        """
        if self.size > 1:
            own = torch.tensor(
                list(bytes.fromhex(digest(tensors))), dtype=torch.uint8, device=device
            )
            self._send(dist.broadcast, first := own.clone(), src=0)
            other = self._ranks_where(not torch.equal(own, first), device)
            if other:
                raise FitError(f"process {_listed(other)} {otherwise}")

    def _ranks_where(self, wrong: bool, device: torch.device) -> list[int]:
        flags = torch.zeros(self.size, device=device)
        flags[self.rank] = float(wrong)
        self._send(dist.all_reduce, flags)
        return flags.nonzero()[:, 0].tolist()

    def _said_by_first(self, value: dict[str, Any], device: torch.device) -> dict[str, Any]:
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
        length = torch.tensor([len(text)], device=device)
        self._send(dist.broadcast, length, src=0)
        message = (
            text if self.rank == 0 else torch.zeros(int(length), dtype=torch.uint8, device=device)
        )
        self._send(dist.broadcast, message, src=0)
        return dict(json.loads(bytes(message.tolist())))

    def _send(self, collective: Callable[..., Any], tensor: Tensor, **arguments: Any) -> None:
        try:
            collective(tensor, **arguments)
        except RuntimeError as error:
            raise FitError(
                f"process {self.rank} of {self.size} waits for others in vain"
                f" ({' '.join(str(error).split())[:120]})"
            ) from None


@contextmanager
def process_group(alone: bool = False) -> Iterator[int]:
    """The process group that the environment says (torchrun sets it), if there is one; gives the
    number of this process in it. `alone`: one process makes a group too.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo", timeout=_WAIT, **_meeting())
    elif alone:
        alone_store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=alone_store, rank=0, world_size=1)
    else:
        yield 0
        return
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _meeting() -> dict[str, Any]:
    """Where the processes find each other, if torchrun has started them again on one node. There
    the store of torchrun still has the addresses of those that were killed
    (findings/elastic_restart_addresses.sh), so each start has names of its own in it. The nodes of
    several do not count their starts alike.
    """
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if start == 0 or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, rank, size = next(rendezvous("env://", timeout=_WAIT))  # type: ignore[no-untyped-call]
    return {"store": PrefixStore(f"start {start}", store), "rank": rank, "world_size": size}


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
