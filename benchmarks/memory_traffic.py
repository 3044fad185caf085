"""How much of a latency the memory explains, before and after half of the units are removed.

`python benchmarks/memory_traffic.py` fills a table of docs/results/real_networks.md. The networks
and their masks are those of `real_networks.py`; timm has to be installed. For each operation of a
forward pass, the bytes of the tensors that it reads and writes are added up: parameters, and all
others. Views count nothing. Their time is that of a copy: of 256 MB to another place, which reads
and writes each byte once, the fastest of thirty. Latencies are medians of processor time on one
thread, in turns. Copies and calls alternate, network by network.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_bmr as bmr

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.call_times import call_times
from benchmarks.parts.outside_networks import NETWORKS
from benchmarks.parts.pages import fill, table
from benchmarks.real_networks import PAGE, masks_of
from pyro_bmr.data.inputs import called, of_each

NAMES = ("torch 784-1024-1024-10", "timm resnet18", "timm vit_tiny_patch16_224, heads too")
COLUMNS = [
    "network", "rows", "weights, MB", "other tensors, MB", "ms of a copy", "ms measured", "share",
]  # fmt: skip
MB, COPIED = 1e6, 256_000_000


class Traffic(TorchDispatchMode):
    """Counts the bytes that the operations in its context read and write: `weights` of the
    parameters of a network, `others`.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self._held = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
        self.weights, self.others = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        read, made = (
            [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
            for tree in ((args, kwargs), result)
        )
        places = {t.untyped_storage().data_ptr() for t in read}
        moved = any(t.untyped_storage().data_ptr() in places for t in made)
        if not moved or func._schema.is_mutable:
            for t in (*read, *made):
                size = t.numel() * t.element_size()
                if t.untyped_storage().data_ptr() in self._held:
                    self.weights += size
                else:
                    self.others += size
        return result


def bytes_a_second() -> float:
    """What a copy reads and writes in a second of the processor, on one thread."""
    source = torch.ones(COPIED // 4)
    target, least = torch.empty_like(source), float("inf")
    for _ in range(30):
        start = time.process_time()
        target.copy_(source)
        least = min(least, time.process_time() - start)
    return 2 * COPIED / least


@torch.no_grad()
def rows_of(name: str) -> list[list[str]]:
    torch.manual_seed(0)
    outside = NETWORKS[name](Path())
    net = bmr.shrinking.fold_batch_norms(outside.net.eval(), outside.rows)
    with torch.enable_grad():
        masks = masks_of(outside, net, 0.5)
    networks = {"dense": net, "half": bmr.shrink(net, masks, outside.rows)}
    rows = []
    for batch in (1, 32):
        some = of_each(lambda t: t[:batch], outside.rows)  # noqa: B023
        rate = bytes_a_second()
        times = call_times(networks, outside.rows, batch, 1.0)
        for form, one in networks.items():
            with Traffic(one) as seen:
                called(one, some)
            copied = 1e3 * (seen.weights + seen.others) / rate
            rows.append([
                f"{name}, {form}", str(batch), f"{seen.weights / MB:.3g}",
                f"{seen.others / MB:.3g}", f"{copied:.3g}", f"{times[form]:.3g}",
                f"{copied / times[form]:.2f}",
            ])  # fmt: skip
        print(f"{name}: {rate / 1e9:.3g} GB/s", rows[-2:], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    fill(PAGE, table(COLUMNS, [row for name in NAMES for row in rows_of(name)]), "memory")


if __name__ == "__main__":
    main()
