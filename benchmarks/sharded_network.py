"""Time of a step of a sharded fit on a slow network, and what of its messages is hidden: a table of
docs/several_processes.md. For root on Linux, with `ip` and `tc`.

    python benchmarks/sharded_network.py --rate 200mbit --rows 4096

Each process has a network namespace of its own, joined by a bridge in another one; `tc` limits what
each sends and receives. Eight layers of 1000 x 1000, the natural gradient, gloo, one thread a
process; `--rows` of all processes together. The steps of one fit gather layers ahead or not, in
pairs whose order alternates, so that other work on the machine falls on both. Printed are medians
over the pairs, of their differences with quartiles, and of how long a step waited for the weights
of its layers. Bytes are those that the interface of process 0 has sent. One run at a time: what a
killed one has left is removed at the start.
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
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

import pyro_bmr as bmr
from pyro_bmr.sharding import layers as sharded_layers
from pyro_bmr.sharding import sharded_fit

LAYERS, WIDTH = 8, 1000
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


def is_ahead(step: int) -> bool:
    """Whether a step gathers its layers ahead: one of the steps 2 and 3, one of 4 and 5, ..."""
    return (step // 2 + step) % 2 == 0


def gather_ahead(units: Sequence[FSDPModule], ahead: bool) -> None:
    for unit in units:
        unit._set_unshard_async_op(ahead)
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following] if ahead else [])
        following.set_modules_to_backward_prefetch([unit] if ahead else [])


def note_waits() -> list[float]:
    """The seconds that this process waits for weights, one number that grows."""
    waited = [0.0]
    for name in ("unshard", "wait_for_unshard"):

        def timed(*words: Any, call: Any = getattr(FSDPParamGroup, name), **named: Any) -> None:
            start = time.perf_counter()
            call(*words, **named)
            waited[0] += time.perf_counter() - start

        setattr(FSDPParamGroup, name, timed)
    return waited


def steps(rows: int, count: int) -> list[list[float]]:
    """Seconds, those of waiting for weights and bytes that were sent, of the steps from the second
    of a fit of `count` steps on.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows * 2, WIDTH, generator=generator)
    y = torch.randint(10, (len(x),), generator=generator)
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    program = bmr.BayesianNetwork(net, bmr.Gaussian(scale=0.1), bmr.Categorical())
    waited, units, seen = note_waits(), list[FSDPModule](), list[list[float]]()
    sharded_layers._overlap = lambda found: units.extend(found)

    def schedule(made: torch.optim.Optimizer, count: int) -> Any:
        def rate(step: int) -> float:
            seen.append([time.perf_counter(), waited[0], sent()])
            gather_ahead(units, is_ahead(step + 1))
            return 1.0

        return torch.optim.lr_scheduler.LambdaLR(made, rate)

    step = bmr.natural_gradient()
    rest = {"batch_size": rows, "optimizer": step, "scheduler": schedule, "progress": False}
    sharded_fit(program, (x, y), epochs=count // 2, **rest)
    after = seen[-count:]  # the first is made with the schedule, or is the end of step 1
    return [[b - a for a, b in zip(*two, strict=True)] for two in pairwise(after)]


def one(rows: int, pairs: int) -> None:
    """What each process does; the first one prints what it finds."""
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    warnings.filterwarnings("ignore", "the fit has not converged")
    found = steps(rows, 2 * pairs + 2)[: 2 * pairs]
    ahead = [each for number, each in enumerate(found, 2) if is_ahead(number)]
    after = [each for number, each in enumerate(found, 2) if not is_ahead(number)]
    if dist.get_rank() == 0:
        columns = [*zip(*ahead, strict=True)], [*zip(*after, strict=True)]
        differences = [b[0] - a[0] for a, b in zip(ahead, after, strict=True)]
        medians = [[statistics.median(column) for column in each] for each in columns]
        quartiles = statistics.quantiles(differences, n=4)
        print(json.dumps([*medians, quartiles]), flush=True)
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


def measured(ranks: int, rate: str, rows: int, pairs: int) -> list[list[float]]:
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
            words += ["--rows", str(rows), "--pairs", str(pairs)]
            started.append(
                subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
            )
        found = [process.communicate()[0] for process in started]
    return list(json.loads(found[0]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        one(given.rows, given.pairs)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that namespaces are removed
    print("| processes | MB sent a step | ahead | not ahead | hidden | waits ahead | not | load |")
    print("|---|---|---|---|---|---|---|---|")
    for ranks in given.ranks:
        ahead, after, hidden = measured(ranks, given.rate, given.rows, given.pairs)
        print(
            f"| {ranks} | {ahead[2] / 1e6:.1f} | {ahead[0]:.2f} s | {after[0]:.2f} s"
            f" | {hidden[1]:.2f} s ({hidden[0]:.2f} to {hidden[2]:.2f}) | {ahead[1]:.2f} s"
            f" | {after[1]:.2f} s | {os.getloadavg()[1]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
