"""How the sites of a fit lie on the processes of a mesh: of each weight a stretch of rows in each
process, as torch's `Shard(0)` has it, and the scales that a weight shares in all of them.

Owns `Layout`. torch's `DTensor` does the gathering. Next: `layers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Layout:
    """The last axis of `mesh` shares out the rows of each weight; along an axis before it the
    processes have copies. `shapes`: site → its whole shape, of those that are shared out. Every
    process has all of any other site.
    """

    mesh: DeviceMesh
    shapes: Mapping[str, torch.Size]

    @property
    def parts(self) -> int:
        """The number of processes that share a weight."""
        return int(self.mesh.size(self.mesh.ndim - 1))

    @property
    def part(self) -> int:
        """The number of this process among them."""
        return int(self.mesh.get_local_rank(self.mesh.ndim - 1))

    @property
    def device(self) -> torch.device:
        """The device of this process's parts."""
        kind = self.mesh.device_type
        return (
            torch.device(kind, torch.cuda.current_device())
            if kind == "cuda"
            else torch.device(kind)
        )

    def own(self, whole: Tensor) -> Tensor:
        """This process's rows of a weight; a view."""
        rows = -(-len(whole) // self.parts)
        return whole[self.part * rows : (self.part + 1) * rows]

    def dtensor(self, name: str, own: Tensor) -> DTensor:
        """The site `name` as a distributed tensor, of this process's part of it."""
        shape = self.shapes[name]
        placements = [Replicate()] * (self.mesh.ndim - 1) + [Shard(0)]
        stride = tuple(prod(shape[k + 1 :]) for k in range(len(shape)))
        own = own.contiguous()
        return DTensor.from_local(
            own, self.mesh, placements, run_check=False, shape=shape, stride=stride
        )

    def whole(self, name: str, own: Tensor) -> Tensor:
        """The site `name` in every process, gathered from the parts; a call of all processes."""
        if name not in self.shapes:
            return own
        numbers = own.to(torch.uint8) if own.dtype == torch.bool else own
        found: Tensor = self.dtensor(name, numbers).full_tensor()
        return found.to(own.dtype)

    def sum(self, own: Tensor) -> Tensor:
        """Σ over the parts, in place, equal to the bit in all processes; a call of all of them."""
        dist.all_reduce(own, group=self.mesh.get_group(self.mesh.ndim - 1))
        return own

    def copy_from_first(self, own: Tensor) -> None:
        """Gives a contiguous tensor, in place, the values of the first part; a call of all
        processes.
        """
        dist.broadcast(own, group=self.mesh.get_group(self.mesh.ndim - 1), group_src=0)

    def of_each(self, own: Tensor) -> Tensor:
        """The tensors of all parts, stacked in their order; a call of all processes."""
        found = [torch.empty_like(own) for _ in range(self.parts)]
        dist.all_gather(found, own, group=self.mesh.get_group(self.mesh.ndim - 1))
        return torch.stack(found)
