"""Time of a step of a sharded fit on a slow network, and what of its messages is hidden: a table of
docs/several_processes.md. For root on Linux, with `ip` and `tc`.

    python benchmarks/sharded_network.py --rate 200mbit --rows 8192

Each process has a network namespace of its own, joined by a bridge in another one; `tc` limits what
each sends and receives. Eight layers of 1000 x 1000, the natural gradient, gloo, one thread a
process; `--rows` of all processes together. Fits with and without layers gathered ahead take turns
in one group of processes, each with its neighbour's order reversed; the first step of each is left
out. Printed are medians, with quartiles, and how long a step waited for weights, by the ranges that
torch marks in a profile. Bytes are those that the interface of process 0 has sent. One run at a
time: what a killed one has left is removed at the start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

import pyro_bmr as bmr
from pyro_bmr.sharding import layers as sharded_layers
from pyro_bmr.sharding import sharded_fit

LAYERS, WIDTH, STEPS, TURNS = 8, 1000, 4, 6
WAITS = "FSDP::all_gather", "FSDP::all_gather_copy_out"  # which waits for the former if it is ahead
_OVERLAP = sharded_layers._overlap
HUB, PREFIX = "bmr-hub", "bmr-rank"


def ip(*words: object, where: str | None = None) -> None:
    inside = ["ip", "netns", "exec", where] if where else []
    subprocess.run([*inside, *map(str, words)], check=True)


@contextlib.contextmanager
def network(ranks: int, rate: str) -> Iterator[None]:
    """A namespace for each process, with an address on one bridge."""
    spaces = [f"{PREFIX}{rank}" for rank in range(ranks)]
    remove_namespaces()
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
        remove_namespaces()


def remove_namespaces() -> None:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True)
    for space in (line.split()[0] for line in listed.stdout.splitlines()):
        if space == HUB or space.startswith(PREFIX):
            ip("ip", "netns", "del", space)


def sent() -> int:
    return int(Path("/sys/class/net/net0/statistics/tx_bytes").read_text())


def steps(overlap: bool, rows: int) -> tuple[list[float], float, int]:
    """Seconds of each step but the first, those that a step waited for weights, and the bytes that
    this process has sent in a step.
    """
    sharded_layers._overlap = _OVERLAP if overlap else lambda units: None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows * STEPS, WIDTH, generator=generator)
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
    rest = {"batch_size": rows, "optimizer": step, "scheduler": schedule, "progress": False}
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        sharded_fit(program, (x, y), epochs=1, **rest)
    ranges = [r for r in profiled.key_averages() if r.key.split(" ")[0] in WAITS]
    waited = sum(r.cpu_time_total for r in ranges) / 1e6 / STEPS
    after = seen[-STEPS:]  # the first is made with the schedule, or is the end of step 1
    times = [b[0] - a[0] for a, b in pairwise(after)]
    return times, waited, (after[-1][1] - after[0][1]) // len(times)


def one(rows: int) -> None:
    """What each process does; the first one prints what it finds."""
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    warnings.filterwarnings("ignore", "the fit has not converged")
    steps(True, rows)
    found: dict[str, list[float]] = {"with": [], "without": []}
    waits: dict[str, list[float]] = {"with": [], "without": []}
    bytes_a_step = 0
    for turn in range(TURNS):
        for name in sorted(found, reverse=turn % 2 == 1):
            times, waited, bytes_a_step = steps(name == "with", rows)
            found[name] += times
            waits[name].append(waited)
    if dist.get_rank() == 0:
        quartiles = {name: statistics.quantiles(times, n=4) for name, times in found.items()}
        medians = {name: statistics.median(each) for name, each in waits.items()}
        print(json.dumps({**quartiles, "waits": medians, "bytes": bytes_a_step}), flush=True)
    dist.destroy_process_group()


@contextlib.contextmanager
def ended(started: list[subprocess.Popen[str]]) -> Iterator[None]:
    """Ends those processes, however this one leaves."""
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measured(ranks: int, rate: str, rows: int) -> dict[str, Any]:
    started: list[subprocess.Popen[str]] = []
    with network(ranks, rate), ended(started):
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
            words += ["--rows", str(rows)]
            started.append(
                subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
            )
        found = [process.communicate()[0] for process in started]
    return dict(json.loads(found[0]))


def in_seconds(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.2f} s ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        one(given.rows)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that namespaces are removed
    print(
        "| processes | MB sent a step | gathered ahead | not | hidden | waits | not ahead | load |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for ranks in given.ranks:
        found = measured(ranks, given.rate, given.rows)
        hidden, waits = found["without"][1] - found["with"][1], found["waits"]
        part = hidden / found["without"][1]
        print(
            f"| {ranks} | {found['bytes'] / 1e6:.1f} | {in_seconds(found['with'])}"
            f" | {in_seconds(found['without'])} | {hidden:.2f} s, {part:.0%}"
            f" | {waits['with']:.2f} s | {waits['without']:.2f} s | {os.getloadavg()[1]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
