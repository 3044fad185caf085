"""What checkpoints cost: the size of one, the time to write and to read it, and its part of a fit
that writes one a minute.

python benchmarks/checkpoints.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.fitting import checkpoint_file as checkpoint_files
from pyro_bmr.fitting import checkpoints
from pyro_bmr.fitting import fit as fitting


class Seconds:
    """The time that each call of a method takes, on the clock and on the processor."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name, self.plain, self.times = (
            owner,
            name,
            getattr(owner, name),
            list[tuple[float, float]](),
        )

        def timed(*arguments: object) -> object:
            began = time.perf_counter(), time.process_time()
            try:
                return self.plain(*arguments)
            finally:
                self.times.append((time.perf_counter() - began[0], time.process_time() - began[1]))

        setattr(owner, name, timed)

    def stop(self, which: int) -> float:
        """The median."""
        setattr(self.owner, self.name, self.plain)
        return sorted(each[which] for each in self.times)[len(self.times) // 2]


def main() -> None:
    torch.set_num_threads(1)
    y = torch.arange(2000) % 10
    x = torch.randn(2000, 784, generator=torch.Generator().manual_seed(0))
    print(
        f"{'weights':>10} {'MB':>8} {'write, s':>9} {'read, s':>8} {'processor, s':>13}"
        f" {'part of a minute':>17}"
    )
    for units in (100, 300, 1000, 3000):
        torch.manual_seed(0)
        program = bmr.BayesianNetwork(
            nn.Sequential(nn.Linear(784, units), nn.ReLU(), nn.Linear(units, 10)),
            bmr.Gaussian(),
            bmr.Categorical(),
        )
        seconds = {
            "state": Seconds(fitting, "snapshot"),
            "save": Seconds(checkpoints.CheckpointWriter, "save"),
        }
        with tempfile.TemporaryDirectory() as name:
            bmr.fit(
                program,
                (x, y),
                epochs=1,
                batch_size=200,
                checkpoint=bmr.Checkpoints(name, every_steps=1),
                progress=False,
            )
            path = max(Path(name).iterdir())
            began = time.perf_counter()
            checkpoint_files.read(path)
            read, size = time.perf_counter() - began, path.stat().st_size
        wall, processor = (sum(each.stop(k) for each in seconds.values()) for k in (0, 1))
        weights = sum(p.numel() for p in program.parameters())
        print(
            f"{weights:10,} {size / 1e6:8.1f} {wall:9.3f} {read:8.3f} {processor:13.3f}"
            f" {wall / 60:17.2%}"
        )


if __name__ == "__main__":
    main()
