"""Memory, messages and time of a sharded fit of 1e8 to 1e10 weights on 1 to 1,024 GPUs, by
calculation, and a check of the first two without allocating any weight: the tables of
docs/several_processes.md.

    python benchmarks/sharded_plan.py table
    python benchmarks/sharded_plan.py check 64 4000 64 natural
    python benchmarks/sharded_plan.py check 160 7900 256 adam

`check LAYERS WIDTH PROCESSES OPTIMISER` runs two steps of process 0 in FakeTensorMode of torch, in
which tensors have shapes and no values, and in a group of its backend "fake", whose messages do
nothing. torch's MemTracker counts the bytes, and a dispatch mode those of the messages. One row of
data a process.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import log2
from typing import Any

import pyro
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_bmr as bmr
from pyro_bmr.fitting.arguments import Arguments
from pyro_bmr.fitting.descent import read_terms, take_step
from pyro_bmr.fitting.rows import rows_of
from pyro_bmr.sharding.layers import ShardedLayers
from pyro_bmr.sharding.sharded_run import ShardedRun

BYTES = {"natural": 32, "adam": 44}  # for each weight of a process's part
SCRATCH = 4  # more on a GPU, where one chunk is all of the part
COPIES = 5  # of the largest layer, while it runs
# of a GPU: FLOPs per second, bytes of memory per second, bytes of messages per second inside a node
# of eight and between nodes, and the latency of a message
FLOPS, TRAFFIC, INSIDE, BETWEEN, LATENCY, NODE = 1e14, 1.5e12, 2e11, 2.5e10, 1e-5, 8
ROWS = 4096  # of a step in each process, each of which uses each weight once


@dataclass(frozen=True)
class Plan:
    """Of one process: bytes of memory without activations, and of the messages of a step that it
    sends, which are as many as it receives; seconds of the work of a step and of its messages.
    """

    memory: float
    messages: float
    work: float
    waiting: float


def planned(weights: float, processes: int, layers: int, optimizer: str, gpu: bool) -> Plan:
    """Of a network of equal layers."""
    part, layer = weights / processes, weights / layers
    memory = (BYTES[optimizer] + SCRATCH * gpu) * part + COPIES * 4 * layer
    # each layer is gathered twice and its gradient summed once, 4 bytes a weight each time
    messages = 12 * weights * (processes - 1) / processes
    work = 6 * weights * ROWS / FLOPS + 100 * part / TRAFFIC
    bandwidth = INSIDE if processes <= NODE else BETWEEN
    waiting = messages / bandwidth + 3 * layers * LATENCY * log2(processes) if messages else 0.0
    return Plan(memory, messages, work, waiting)


def table() -> None:
    print("| weights | GPUs | GB each | with Adam | GB sent a step | work | messages | hidden |")
    print("|---|---|---|---|---|---|---|---|")
    for weights, layers in ((1e8, 25), (1e9, 64), (1e10, 160)):
        for processes in (1, 8, 64, 256, 1024):
            plan, adam = (planned(weights, processes, layers, o, True) for o in BYTES)
            name = f"10{'⁸⁹'[int(weights == 1e9)] if weights < 1e10 else '¹⁰'}"
            total = max(plan.work, plan.waiting)
            print(
                f"| {name} | {processes:,} | {plan.memory / 1e9:.2f} | {adam.memory / 1e9:.2f}"
                f" | {plan.messages / 1e9:.1f} | {1e3 * plan.work:.0f} ms"
                f" | {1e3 * plan.waiting:.0f} ms | {1e3 * total:.0f} ms |"
            )


class Observed(TorchDispatchMode):
    """Counts the bytes that messages bring and take, and gives a number where values are asked
    for, which nothing has: no fault, no loss, all entries kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.summed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].numel() * args[0].element_size()
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            self.summed += args[1].numel() * args[1].element_size()
        return func(*args, **(kwargs or {}))


def tracked(layers: int, width: int, processes: int, kind: str) -> tuple[int, float, float]:
    """Weights, the highest number of bytes that are alive in two steps of process 0, and the bytes
    of the messages of one step.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        small = nn.Linear(width, width)
    program, like = (
        bmr.BayesianNetwork(n, bmr.Gaussian(scale=0.1), bmr.Categorical())
        for n in (net, small.to_empty(device="cpu"))
    )
    optimizer = bmr.natural_gradient() if kind == "natural" else bmr.adam()
    rest = bmr.MeanField, 1, processes, optimizer, None, 0, 1.0, None, None, 0, True
    data = torch.zeros(processes, width), torch.zeros(processes, dtype=torch.long)
    rows = rows_of(Arguments(like, *rest), data, None, None)
    tracker, seen = MemTracker(), Observed()
    quiet = pyro.settings.context(module_local_params=True), pyro.validation_enabled(False)
    with FakeTensorMode(allow_non_fake_inputs=True), tracker, seen, quiet[0], quiet[1]:
        sharded = ShardedLayers(program, mesh, 0)
        run = ShardedRun(sharded, rows, Arguments(sharded.network, *rest), "weight")
        batch = torch.zeros(1, width), torch.zeros(1, dtype=torch.long)
        for number in (1, 2):
            tracker.reset_mod_stats()
            seen.gathered = seen.summed = 0
            take_step(run, batch, 1 / processes, number)
            read_terms(run)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    messages = (seen.gathered + seen.summed) * (processes - 1) / processes
    return sum(p.numel() for p in net.parameters()), peak, messages


def check(layers: int, width: int, processes: int, kind: str) -> None:
    weights, memory, messages = tracked(layers, width, processes, kind)
    plan = planned(weights, processes, layers, kind, gpu=False)
    print(f"{weights:.3g} weights in {layers} layers, process 0 of {processes}, {kind}:")
    for name, expected, found in (
        ("memory", plan.memory, memory),
        ("messages of a step", plan.messages, messages),
    ):
        if expected:
            print(
                f"{name}: planned {expected / 1e9:.4g} GB, tracked {found / 1e9:.4g} GB,"
                f" {found / expected - 1:+.1%}"
            )


def main() -> None:
    if sys.argv[1] == "table":
        table()
    else:
        check(*map(int, sys.argv[2:5]), sys.argv[5])  # type: ignore[call-arg]


if __name__ == "__main__":
    main()
