"""What a step of a fit costs when its batches come from a loader with two workers, beside the same
fit on tensors, and beside plain training on both.

    python benchmarks/loaders.py

LeNet-5 on random images, or with `--mlp` 784-300-100-10, batch 128, one thread, fused Adam. The
loaders are over images that are read one by one, and over a `TensorDataset`, whose tensors `fit`
reads itself. The contenders take turns. A step is
the time between two steps of the optimiser: seconds of the processor in this process, which the
workers are not part of, and seconds of the clock. Medians over all steps of a turn; then medians of
the ratios over turns. Workers need cores of their own: on two cores, of which one trains, they take
turns with it and with whatever else runs, and the clock shows that.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_bmr as bmr
from pyro_bmr.models.lenet import network

sys.path.insert(0, str(Path(__file__).parents[1]))
BATCH = 128


class Images(Dataset):
    """Images that are read one by one, as those of a folder would be."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(rows, 1, 28, 28, generator=generator)
        self.y = torch.randint(10, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.x[number], self.y[number]


class Timed(torch.optim.Adam):
    """Adam that notes when it takes a step."""

    times: list[tuple[float, float]]

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1e-3, fused=True)
        self.times = []

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.times.append((time.process_time(), time.perf_counter()))


def lenet() -> nn.Module:
    torch.manual_seed(0)
    return network((1, 28, 28), (6, 16, 120, 84), 10)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    sizes = (784, 300, 100, 10)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def fitted(net: nn.Module, data: Any, epochs: int) -> Timed:
    made: list[Timed] = []

    def optimizer(parameters: Any) -> Timed:
        made.append(Timed(parameters))
        return made[0]

    model = bmr.BayesianNetwork(net, bmr.Gaussian(), bmr.Categorical())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bmr.fit(model, data, epochs=epochs, optimizer=optimizer, progress=False)
    return made[0]


def plain(net: nn.Module, batches: Callable[[], Any], epochs: int) -> Timed:
    optimizer = Timed(net.parameters())
    for _ in range(epochs):
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return optimizer


def medians(optimizer: Timed) -> tuple[float, float]:
    """Milliseconds of a step, of the processor and of the clock."""
    steps = [
        [1e3 * (after - before) for before, after in zip(a, b, strict=True)]
        for a, b in zip(optimizer.times, optimizer.times[1:], strict=False)
    ]
    cpu, clock = (statistics.median(column) for column in zip(*steps, strict=True))
    return cpu, clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=60 * BATCH)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mlp", action="store_true", help="784-300-100-10 in place of LeNet-5")
    options = parser.parse_args()
    torch.set_num_threads(1)
    net = mlp if options.mlp else lenet
    rows = Images(options.rows)
    loader, of_tensors = (
        DataLoader(
            data,
            BATCH,
            shuffle=True,
            num_workers=options.workers,
            persistent_workers=options.workers > 0,
        )
        for data in (rows, TensorDataset(rows.x, rows.y))
    )

    def in_memory() -> Any:
        for index in torch.randperm(len(rows)).split(BATCH):
            yield rows.x[index], rows.y[index]

    contenders: dict[str, Callable[[], Timed]] = {
        "plain, tensors": lambda: plain(net(), in_memory, options.epochs),
        "plain, loader": lambda: plain(net(), lambda: loader, options.epochs),
        "fit, tensors": lambda: fitted(net(), (rows.x, rows.y), options.epochs),
        "fit, loader": lambda: fitted(net(), loader, options.epochs),
        "fit, TensorDataset": lambda: fitted(net(), of_tensors, options.epochs),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(options.turns):
        for name in contenders if turn % 2 else reversed(contenders):
            found[name].append(medians(contenders[name]()))
    for name, values in found.items():
        cpu, clock = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name:18} {cpu:7.2f} ms of the processor, {clock:7.2f} ms of the clock")
    for a, b in (
        ("plain, loader", "plain, tensors"),
        ("fit, loader", "fit, tensors"),
        ("fit, TensorDataset", "fit, tensors"),
    ):
        pairs = zip(found[a], found[b], strict=True)
        ratios = list(zip(*([c / d for c, d in zip(*p, strict=True)] for p in pairs), strict=True))
        cpu, clock = (statistics.median(column) for column in ratios)
        spread = [f"{min(column):.3f}–{max(column):.3f}" for column in ratios]
        print(
            f"{a} over {b}: {cpu:.3f} ({spread[0]}) of the processor,"
            f" {clock:.3f} ({spread[1]}) of the clock"
        )


if __name__ == "__main__":
    main()
