"""Time of a step in one process and in two on one machine, and the bytes that a step sends: the
numbers of docs/several_processes.md.

    python benchmarks/processes.py

784-300-100-10 on random images, with batches of 128 a process and of 128 in all.

Each fit is 2 epochs of 120 batches, the second is timed; median of 5 fits. One thread a process.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist

import pyro_bmr as bmr
from pyro_bmr.fitting.processes import process_group
from pyro_bmr.models.mlp import network

STEPS = 120


def seconds_per_step(batch_size: int, optimizer: object) -> float:
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(STEPS * batch_size, 784, generator=generator),
        torch.randint(10, (STEPS * batch_size,), generator=generator),
    )
    torch.manual_seed(0)
    program = bmr.BayesianNetwork(network(784, (300, 100), 10), bmr.Gaussian(), bmr.Categorical())
    times = []

    def timed(
        optimizer_: torch.optim.Optimizer, steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        def rate(step: int) -> float:
            times.append(time.perf_counter())
            return 1.0

        return torch.optim.lr_scheduler.LambdaLR(optimizer_, rate)

    bmr.fit(
        program,
        (x, y),
        epochs=2,
        batch_size=batch_size,
        optimizer=optimizer,
        scheduler=timed,
        progress=False,
    )  # type: ignore[arg-type]
    return (times[-1] - times[-1 - STEPS]) / STEPS


def one_of_several(batch_size: int, kind: str) -> None:
    """Prints the median of five fits in the first of the processes that were started together."""
    torch.set_num_threads(1)
    with process_group() as rank:
        optimizer = bmr.natural_gradient() if kind == "natural" else bmr.adam()
        times = [seconds_per_step(batch_size, optimizer) for _ in range(5)]
        if rank == 0:
            print(statistics.median(times))
        if dist.is_initialized():
            dist.barrier()


def main() -> None:
    if len(sys.argv) > 1:
        one_of_several(int(sys.argv[1]), sys.argv[2])
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for kind in ("adam", "natural"):
        alone = None
        for processes, batch in ((1, 128), (2, 256), (2, 128)):
            shared = {
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "WORLD_SIZE": str(processes),
            }
            command = [sys.executable, __file__, str(batch), kind]
            started = [
                subprocess.Popen(
                    command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
                )
                for rank in range(processes)
            ]
            printed = [process.communicate()[0] for process in started]
            ms = 1000 * float(printed[0])
            alone = alone or ms
            print(
                f"{kind}, {processes} process(es), {batch} rows a step: {ms:.2f} ms,"
                f" {ms / alone:.2f} of one process, {1000 * batch / ms:,.0f} rows/s"
            )
    weights = sum(p.numel() for p in network(784, (300, 100), 10).parameters())
    print(
        f"a step sends one message of {2 * weights * 4 / 1e6:.2f} MB: 8 bytes for each of"
        f" {weights:,} weights"
    )


if __name__ == "__main__":
    main()
