"""What checkpoints cost: the size of one, the time to write and to read it, and its part of a fit that writes one a minute.

python benchmarks/checkpoints.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr import checkpoints


def main() -> None:
    torch.set_num_threads(1)
    y = torch.arange(2000) % 10
    x = torch.randn(2000, 784, generator=torch.Generator().manual_seed(0))
    print(f"{'weights':>10} {'MB':>8} {'write, s':>9} {'read, s':>8} {'processor, s':>13} {'part of a minute':>17}")
    for units in (100, 300, 1000, 3000):
        torch.manual_seed(0)
        program = bmr.BayesianNetwork(nn.Sequential(nn.Linear(784, units), nn.ReLU(), nn.Linear(units, 10)), bmr.Gaussian(), bmr.Categorical())
        times: list[tuple[float, float]] = []
        save = checkpoints.Journal.save

        def timed(self, step, state, save=save, times=times):  # type: ignore[no-untyped-def]
            began = time.perf_counter(), time.process_time()
            save(self, step, state)
            times.append((time.perf_counter() - began[0], time.process_time() - began[1]))

        with tempfile.TemporaryDirectory() as name:
            checkpoints.Journal.save = timed  # type: ignore[method-assign]
            bmr.fit(program, (x, y), epochs=1, batch_size=200, checkpoint=bmr.Checkpoints(name, every_steps=1), progress=False)
            checkpoints.Journal.save = save  # type: ignore[method-assign]
            path = max(Path(name).iterdir())
            began = time.perf_counter()
            checkpoints.read(path)
            read, size = time.perf_counter() - began, path.stat().st_size
        wall, processor = (sorted(t[k] for t in times)[len(times) // 2] for k in (0, 1))
        weights = sum(p.numel() for p in program.parameters())
        print(f"{weights:10,} {size / 1e6:8.1f} {wall:9.3f} {read:8.3f} {processor:13.3f} {wall / 60:17.2%}")


if __name__ == "__main__":
    main()
