"""The processes of a group that measure a trained network together: what they sum, what one of them
works out for all, and where they must agree.

Owns `Ranks`, `RowCheck` and `add_rows`. A call outside any process group is one process; every
method then returns what it was given. Next: `factors.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_bmr.data.inputs import Inputs, parts_of
from pyro_bmr.errors import DataError, ModelError, PyroBMRError


@dataclass(frozen=True)
class Ranks:
    """The processes of the default group of torch.distributed, if there is one. `rank` is the
    number of this process, `size` the number of processes; messages lie on `device`.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @staticmethod
    def of_group(device: torch.device) -> Ranks:
        """The processes of the group that there is now."""
        if dist.is_available() and dist.is_initialized():
            return Ranks(dist.get_rank(), dist.get_world_size(), device)
        return Ranks(device=device)

    def part(self, rows: Tensor) -> Tensor:
        """The rows that this process takes, perhaps none."""
        return rows.tensor_split(self.size)[self.rank]

    def sum(self, own: Tensor) -> Tensor:
        """Σ over the processes, equal to the bit in all of them; a call of all of them. The tensor
        of this process may be overwritten.
        """
        if self.size == 1:
            return own
        message = own.to(self.device).contiguous()
        dist.all_reduce(message)
        return message

    def total(self, own: float) -> float:
        """As `sum`, of a number."""
        if self.size == 1:
            return own
        return float(self.sum(torch.tensor([own], dtype=torch.float64)))

    def of_each(self, own: Any) -> list[Any]:
        """What each process gives, in their order; a call of all of them."""
        every: list[Any] = [own]
        if self.size > 1:
            every = [None] * self.size
            dist.all_gather_object(every, own)
        return every

    def check_same(self, own: object, otherwise: str) -> None:
        """Raises ModelError in all processes unless they give the same value."""
        every = self.of_each(own)
        other = next((rank for rank, value in enumerate(every) if value != every[0]), None)
        if other is not None:
            raise ModelError(f"process {other} {otherwise}")

    def shared_out(
        self, costs: Mapping[str, float], work: Callable[[str], Sequence[Tensor]]
    ) -> dict[str, list[Tensor]]:
        """Name → the tensors that `work(name)` returns in one of the processes, in all of them; a
        call of all of them. `costs`: name → the relative cost of its work.

        Raises:
            PyroBMRError: in all processes, the error of one.
        """
        if self.size == 1:
            return {name: list(work(name)) for name in costs}
        owners, own = self._owners(costs), {}
        error: PyroBMRError | None = None
        try:
            for name, owner in owners.items():
                if owner == self.rank:
                    own[name] = [t.to(self.device).contiguous() for t in work(name)]
        except PyroBMRError as raised:
            error = raised
        except Exception as raised:  # the others wait for what this process has to say
            error = PyroBMRError(f"process {self.rank}: {type(raised).__name__}: {raised}")
            error.__cause__ = raised
        forms = {name: [(t.shape, t.dtype) for t in tensors] for name, tensors in own.items()}
        every = self.of_each((forms, error))
        first = next((of_one for _, of_one in every if of_one is not None), None)
        if first is not None:
            raise first
        found = {}
        for name, owner in owners.items():
            found[name] = own.get(name) or [
                torch.empty(shape, dtype=dtype, device=self.device)
                for shape, dtype in every[owner][0][name]
            ]
            for tensor in found[name]:
                dist.broadcast(tensor, src=owner)
        return found

    def _owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Name → the process that works it out: the largest first, each to the one with least."""
        loads, owners = [0.0] * self.size, {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += costs[name]
        return owners


def add_rows(digest: Any, x: Inputs, y: Tensor | None) -> None:
    """Brings a hash up to date with the rows of a batch."""
    for name, part in {**parts_of(x), **({} if y is None else {"y": y})}.items():
        plain = part.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)


class RowCheck:
    """That all processes read the same rows: a running SHA-256 of them."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.digest = ranks, hashlib.sha256()

    def add(self, x: Inputs, y: Tensor | None) -> None:
        """Notes a batch."""
        if self.ranks.size == 1:
            return
        add_rows(self.digest, x, y)

    def compare(self, caller: str) -> None:
        """A call of all processes.

        Raises:
            DataError: in all processes, if one has noted other batches than the first.
        """
        every = self.ranks.of_each(self.digest.hexdigest())
        other = next((rank for rank, rows in enumerate(every) if rows != every[0]), None)
        if other is not None:
            raise DataError(
                f"{caller}: process {other} reads other rows than process 0; give the loader no"
                " generator of its own, or a Dataset or tensors"
            )
