"""Memory and time of a sharded fit beside a fit in one process: the tables of
docs/several_processes.md.

    python benchmarks/sharded.py memory
    python benchmarks/sharded.py time
    python benchmarks/sharded.py checkpoints
    python benchmarks/sharded.py plan 64 16 1000

`memory`: the highest resident memory of a process during a fit of four steps, minus that before
the network was made; sixteen layers of 1000 x 1000, 8 rows a step. The network of the sharded fit
is on "meta". `plan`: the same of one process among 64 in a group of torch's backend "fake", whose
messages do nothing, beside the plan of docs/several_processes.md. `time`: seconds of a processor
and of the clock a step, 784-1000-1000-10, 256 rows a step in all. gloo, one thread a process.
`checkpoints`: two processes, the network of `memory`, 16 rows a step, a checkpoint every two
steps, written in the background and waited for, in turns: how long a checkpoint holds up the fit,
and the time of its two steps with it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.sharding import fit as module
from pyro_bmr.sharding import sharded_fit
from pyro_bmr.sharding.sharded_checkpoints import ShardedWriter

LAYERS, WIDTH = 16, 1000
WIDE = (784, 1000, 1000, 10)
STEPS = 40
SAVED = 2  # steps between checkpoints


def network(sizes: tuple[int, ...], device: str) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, device=device), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def resident(peak: bool) -> int:
    """The resident bytes of this process, now or at most since `forget_peak`."""
    key = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def forget_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def fitted(
    sizes: tuple[int, ...], rows: int, batch: int, kind: str, timed: list[Any], **more: Any
) -> None:
    """One fit, sharded in a group; the moments after each step go to `timed`."""
    optimizer = bmr.natural_gradient() if kind == "natural" else bmr.adam()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, sizes[0], generator=generator)
    y = torch.randint(sizes[-1], (rows,), generator=generator)
    grouped = dist.is_initialized()
    net = network(sizes, "meta" if grouped else "cpu")
    program = bmr.BayesianNetwork(net, bmr.Gaussian(scale=0.1), bmr.Categorical())
    del net

    def schedule(made: torch.optim.Optimizer, steps: int) -> Any:
        def rate(step: int) -> float:
            timed.append((time.perf_counter(), time.process_time()))
            return 1.0

        return torch.optim.lr_scheduler.LambdaLR(made, rate)

    fit: Any = sharded_fit if grouped else bmr.fit
    fit(program, (x, y), epochs=2, batch_size=batch, optimizer=optimizer, scheduler=schedule,
        progress=False, **more)  # fmt: skip


class Timed(ShardedWriter):
    """Notes the seconds that each `save` holds up the fit; with `waits` until all is written."""

    waits, seconds = False, list[float]()

    def save(self, step: int, state: Any) -> None:
        start = time.perf_counter()
        super().save(step, state)
        if Timed.waits:
            self.wait()
        Timed.seconds.append(time.perf_counter() - start)


def checkpoints() -> dict[str, list[tuple[float, float]]]:
    """Seconds of a checkpoint, and of its steps with it, in the background and waited for."""
    found: dict[str, list[tuple[float, float]]] = {"in the background": [], "waited for": []}
    module.ShardedWriter = Timed  # type: ignore[misc]
    for _ in range(2):
        for name, each in found.items():
            Timed.waits, timed = name == "waited for", list[Any]()
            Timed.seconds.clear()
            rows = 16 * SAVED * 3
            with tempfile.TemporaryDirectory() as folder:
                shared = [folder]
                dist.broadcast_object_list(shared)
                rule = bmr.Checkpoints(shared[0], every_steps=SAVED, every_seconds=1e9)
                fitted((WIDTH,) * (LAYERS + 1), rows, 16, "natural", timed, checkpoint=rule)
                dist.barrier()
            ends = [clock for clock, _ in timed][-6 * SAVED :]
            cycles = [b - a for a, b in pairwise(ends[SAVED - 1 :: SAVED])]
            # not the first checkpoint, of step 1, nor the last, which are always waited for
            each += zip(Timed.seconds[1:-1], cycles, strict=True)
    return found


def return_freed_memory() -> None:
    """Has glibc give back what is freed, also in pieces of a layer. It would keep them, and count
    what was there before and not what is needed now.
    """
    threshold = -3  # M_MMAP_THRESHOLD
    ctypes.CDLL("libc.so.6").mallopt(threshold, 1 << 16)


def one_of(rank: int, size: int, port: int, case: str, kind: str, answers: Any) -> None:
    torch.set_num_threads(1)
    return_freed_memory()
    if size:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=size)
    fitted((20, 20, 10), 64, 32, kind, [])  # imports what torch leaves for later
    timed: list[Any] = []
    if case == "memory":
        forget_peak()
        before = resident(peak=False)
        fitted((WIDTH,) * (LAYERS + 1), 16, 8, kind, timed)
        answers.put((rank, resident(peak=True) - before, 0.0))
    elif case == "checkpoints":
        answers.put((rank, checkpoints()))
    else:
        fitted(WIDE, 256 * STEPS, 256, kind, timed)
        (clock, cpu), (clock_end, cpu_end) = timed[-1 - STEPS], timed[-1]
        answers.put((rank, (clock_end - clock) / STEPS, (cpu_end - cpu) / STEPS))
    if size:
        dist.destroy_process_group()


def measured(size: int, case: str, kind: str) -> list[Any]:
    """What each of `size` processes says, 0 for a fit outside any group."""
    context = get_context("fork")
    answers, port = context.Queue(), 20_000 + os.getpid() % 20_000 + size
    started = [
        context.Process(target=one_of, args=(rank, size, port, case, kind, answers))
        for rank in range(max(size, 1))
    ]
    for process in started:
        process.start()
    found = sorted(answers.get(timeout=900) for _ in started)
    for process in started:
        process.join()
    return found


def plan(processes: int, layers: int, width: int) -> None:
    """Prints the planned and the measured memory of one process among many."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    return_freed_memory()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    fitted((20, 20, 10), 4 * processes, 2 * processes, "natural", [])
    forget_peak()
    before = resident(peak=False)
    fitted((width,) * (layers + 1), 2 * processes, processes, "natural", [])
    weights, layer = layers * width * (width + 1), width * width
    planned = 32 * weights / processes + 5 * 4 * layer
    most = resident(peak=True) - before
    print(f"{weights:.3g} weights, process 0 of {processes}: planned {planned / 1e6:.0f} MB,")
    print(f"measured {most / 1e6:.0f} MB, {most / planned:.3f} of the plan")


def main() -> None:
    case = sys.argv[1]
    if case == "plan":
        plan(*map(int, sys.argv[2:5]))
        return
    if case == "checkpoints":
        for name, each in measured(2, case, "natural")[0][1].items():
            held, cycle = (statistics.quantiles(column, n=4) for column in zip(*each, strict=True))
            said = f"{held[1]:.2f} s ({held[0]:.2f} to {held[2]:.2f}) a checkpoint"
            print(f"{name}: {said}, {cycle[1]:.2f} s ({cycle[0]:.2f} to {cycle[2]:.2f}) with steps")
        return
    for kind in ("natural", "adam"):
        alone = None
        for size in (0, 1, 2, 4):
            found = measured(size, case, kind)
            most, cpu = max(f[1] for f in found), max(f[2] for f in found)
            alone = alone or most
            name = "fit" if size == 0 else f"sharded_fit, {size}"
            if case == "memory":
                said = f"{most / 1e6:.0f} MB a process, {most / alone:.3f}"
            else:
                said = f"{1e3 * most:.0f} ms a step, {1e3 * cpu:.0f} of a processor"
            print(f"{kind}, {name}: {said}", flush=True)


if __name__ == "__main__":
    main()
