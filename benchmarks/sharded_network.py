"""Time of a step of a sharded fit on a slow network, and what of its messages is hidden: a table of
docs/several_processes.md. For root on Linux, with `ip` and `tc`.

    python benchmarks/sharded_network.py --rate 1gbit

Each process has a network namespace of its own, joined by a bridge in another one; `tc` limits what
each sends and receives. Eight layers of 1000 x 1000, 64 rows in all, the natural gradient, gloo,
one thread a process. Fits with and without overlap take turns, three each of ten steps in one group
of processes; the first step of each is left out, and the median is printed. Bytes are those that
the interface of process 0 has sent, a step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.sharding import layers as sharded_layers
from pyro_bmr.sharding import sharded_fit

LAYERS, WIDTH, ROWS, STEPS, TURNS = 8, 1000, 1024, 8, 3
_OVERLAP = sharded_layers._overlap
HUB, PREFIX = "bmr-hub", "bmr-rank"


def ip(*words: object, where: str | None = None) -> None:
    inside = ["ip", "netns", "exec", where] if where else []
    subprocess.run([*inside, *map(str, words)], check=True)


@contextlib.contextmanager
def network(ranks: int, rate: str) -> Iterator[None]:
    """A namespace for each process, with an address on one bridge."""
    spaces = [f"{PREFIX}{rank}" for rank in range(ranks)]
    try:
        for space in (HUB, *spaces):
            ip("ip", "netns", "add", space)
        ip("ip", "link", "add", "name", "bridge0", "type", "bridge", where=HUB)
        ip("ip", "link", "set", "bridge0", "up", where=HUB)
        for rank, space in enumerate(spaces):
            end = f"hub{rank}"
            words = "link", "add", end, "netns", HUB, "type", "veth", "peer", "name", "net0"
            ip("ip", *words, "netns", space)
            ip("ip", "link", "set", end, "master", "bridge0", "up", where=HUB)
            ip("ip", "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "net0", where=space)
            for name in ("net0", "lo"):
                ip("ip", "link", "set", name, "up", where=space)
            for name, where in ((end, HUB), ("net0", space)):
                bucket = "rate", rate, "burst", "256kb", "latency", "50ms"
                ip("tc", "qdisc", "add", "dev", name, "root", "tbf", *bucket, where=where)
        yield
    finally:
        for space in (HUB, *spaces):
            subprocess.run(["ip", "netns", "del", space], check=False, stderr=subprocess.DEVNULL)


def sent() -> int:
    return int(Path("/sys/class/net/net0/statistics/tx_bytes").read_text())


def steps(overlap: bool) -> tuple[list[float], int]:
    """Seconds of each step but the first, and the bytes that process 0 has sent in them."""
    sharded_layers._overlap = _OVERLAP if overlap else lambda units: None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS * STEPS, WIDTH, generator=generator)
    y = torch.randint(10, (len(x),), generator=generator)
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    program = bmr.BayesianNetwork(net, bmr.Gaussian(scale=0.1), bmr.Categorical())
    seen: list[tuple[float, int]] = []

    def schedule(made: torch.optim.Optimizer, count: int) -> Any:
        def rate(step: int) -> float:
            seen.append((time.perf_counter(), sent()))
            return 1.0

        return torch.optim.lr_scheduler.LambdaLR(made, rate)

    step = bmr.natural_gradient()
    rest = {"batch_size": ROWS, "optimizer": step, "scheduler": schedule, "progress": False}
    sharded_fit(program, (x, y), epochs=1, **rest)
    after = seen[-STEPS:]  # the first is made with the schedule, or is the end of step 1
    times = [b[0] - a[0] for a, b in pairwise(after)]
    return times, (after[-1][1] - after[0][1]) // len(times)


def one() -> None:
    """What each process does; the first one prints what it finds."""
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    steps(True)
    found: dict[str, list[float]] = {"with": [], "without": []}
    bytes_a_step = 0
    for _ in range(TURNS):
        for name in found:
            times, bytes_a_step = steps(name == "with")
            found[name] += times
    if dist.get_rank() == 0:
        medians = {name: statistics.median(times) for name, times in found.items()}
        print(json.dumps({**medians, "bytes": bytes_a_step}), flush=True)
    dist.destroy_process_group()


def measured(ranks: int, rate: str) -> dict[str, float]:
    with network(ranks, rate):
        started = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                "MASTER_ADDR": "10.77.0.1",
                "MASTER_PORT": "29500",
                "WORLD_SIZE": str(ranks),
                "RANK": str(rank),
                "GLOO_SOCKET_IFNAME": "net0",
                "OMP_NUM_THREADS": "1",
            }
            words = ["ip", "netns", "exec", f"{PREFIX}{rank}", sys.executable, __file__, "--rank"]
            started.append(
                subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
            )
        found = [process.communicate()[0] for process in started]
    return dict(json.loads(found[0]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        one()
        return
    print("| processes | MB sent a step | ms a step | without overlap | hidden |")
    print("|---|---|---|---|---|")
    for ranks in given.ranks:
        found = measured(ranks, given.rate)
        quick, slow = 1e3 * found["with"], 1e3 * found["without"]
        print(
            f"| {ranks} | {found['bytes'] / 1e6:.1f} | {quick:.0f} | {slow:.0f}"
            f" | {slow - quick:.0f} ms, {1 - quick / slow:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
