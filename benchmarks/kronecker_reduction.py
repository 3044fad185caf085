"""Time and memory of a Kronecker posterior and its reduction to half of the single weights:
`python benchmarks/kronecker_reduction.py` prints one markdown table, a row per layer.

Each layer is one process of one thread. The factors are those of random inputs and gradients with
a power law of variances; the weights have the prior's scale; T = 0.05. Seconds are of the
processor, since a busy machine stretches the others. Memory is the most that stood above what the
process had before, over the bytes of the two factors in float64. `--library FOLDER` measures
another checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

import pyro_bmr as bmr

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.pages import table
from benchmarks.parts.peak_memory import peak_memory

LAYERS = ["100x300", "300x784", "384x1536", "768x3072", "1024x4096"]


def factor(size: int, rows: int, generator: torch.Generator) -> torch.Tensor:
    """The mean of x xᵀ with standard deviations k^(−½) in a random basis."""
    x = torch.randn(rows, size, generator=generator) * torch.arange(1, size + 1).float().rsqrt()
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    x = x @ basis
    return x.mT @ x / rows


def measured(layer: str, kept: float) -> dict[str, float | str]:
    """One layer: processor seconds of both calls, and their memory."""
    n, m = map(int, layer.split("x"))
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = factor(m, m + 1000, generator), 4000 * factor(n, n + 1000, generator)
    weights = torch.randn(n, m, generator=generator) * m**-0.5

    def both() -> tuple[bmr.Reduction, float]:
        posterior = bmr.Posterior.from_curvature(
            {"w": weights}, {"w": (outputs, inputs)}, bmr.Gaussian(m**-0.5), temperature=0.05
        )
        curved = time.process_time()
        return bmr.reduce(posterior, to=bmr.Gaussian(0.0), kept=kept), curved

    start = time.process_time()
    (reduction, curved), memory = peak_memory(both)
    end = time.process_time()
    result = reduction.sites["w"]
    upper = getattr(result, "upper", None)
    return {
        "layer": layer,
        "from_curvature": curved - start,
        "reduce": end - curved,
        "both": end - start,
        "memory / factors": memory / (8 * (n * n + m * m)),
        "delta_f": result.delta_f,
        "upper": result.delta_f if upper is None else upper,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", default=LAYERS, help="rows x columns")
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--library", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        warnings.simplefilter("ignore", bmr.PyroBMRWarning)
        print(json.dumps(measured(options.one, options.kept)))
        return
    environment = {**os.environ, "PYTHONPATH": str(options.library), "OMP_NUM_THREADS": "1"}
    rows = []
    for layer in options.layers:
        call = [sys.executable, __file__, "--one", layer, "--kept", str(options.kept)]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    columns = list(rows[0])
    lines = [[x if isinstance(x := row[c], str) else f"{x:.4g}" for c in columns] for row in rows]
    print("\n".join(table(columns, lines)))


if __name__ == "__main__":
    main()
