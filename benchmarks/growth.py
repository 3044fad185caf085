"""How the time of a step and of a prediction grows with parameters, batch and draws: `python
benchmarks/growth.py`.

Multilayer perceptrons 784-w-w-10 on one thread, random images; contenders take turns, medians of
processor seconds. The exponent k of time ∝ size^k is the slope of the least-squares line through
the logarithms, over the larger half of the sizes. Writes docs/results/growth.json and
docs/results/growth.png.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import torch

import pyro_bmr as bmr

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.step import Step, deterministic, mlp, ours

FOLDER, ROUNDS = Path("docs/results"), 15
WIDTHS, BATCHES, DRAWS = (
    (50, 100, 200, 400, 800, 1600),
    (16, 32, 64, 128, 256, 512, 1024),
    (1, 2, 4, 8, 16, 32, 64),
)


def medians(contenders: dict[str, Step]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS + 2):
        for name, run in contenders.items():
            run()
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)
    return {name: 1e3 * statistics.median(t[2:]) for name, t in times.items()}


def steps(width: int, batch: int) -> dict[str, float]:
    torch.manual_seed(0)
    net, x, y = mlp(784, width, width, 10), torch.rand(batch, 784), torch.randint(10, (batch,))
    return medians(
        {
            "plain": deterministic(net, x, y),
            "fit": ours(net, x, y),
            "fit, natural gradient": ours(net, x, y, make=bmr.natural_gradient()),
        }
    )


def predictions(draws: int) -> dict[str, float]:
    torch.manual_seed(0)
    program, x, y = (
        bmr.BayesianNetwork(mlp(784, 300, 100, 10), bmr.Gaussian(), bmr.Categorical()),
        torch.rand(1000, 784),
        torch.randint(10, (1000,)),
    )
    fit = bmr.fit(program, (x[:128], y[:128]), epochs=1, progress=False)
    net = program.net.eval()

    def plain() -> None:
        with torch.no_grad():
            for _ in range(draws):
                net(x)

    run: dict[str, Callable[[], object]] = {
        "plain passes": plain,
        "predict": lambda: bmr.predict(fit.program, fit.posterior, x, draws=draws),
    }
    return medians(run)


def exponents(sizes: list[int], rows: list[dict[str, float]]) -> dict[str, float]:
    half = len(sizes) // 2
    return {
        name: float(
            np.polyfit(np.log(sizes[half:]), np.log([row[name] for row in rows[half:]]), 1)[0]
        )
        for name in rows[0]
    }


def main() -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        parameters = [sum(p.numel() for p in mlp(784, w, w, 10).parameters()) for w in WIDTHS]
        studies = {
            "parameters": (parameters, [steps(w, 128) for w in WIDTHS]),
            "batch": (list(BATCHES), [steps(300, b) for b in BATCHES]),
            "draws": (list(DRAWS), [predictions(d) for d in DRAWS]),
        }
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    results = {}
    for ax, (label, (sizes, rows)) in zip(axes, studies.items(), strict=True):
        fitted = exponents(sizes, rows)
        results[label] = {
            "sizes": sizes,
            "milliseconds": {name: [row[name] for row in rows] for name in rows[0]},
            "exponents": fitted,
        }
        for name in rows[0]:
            ax.loglog(
                sizes,
                [row[name] for row in rows],
                marker="o",
                label=f"{name}, exponent {fitted[name]:.2f}",
            )
        ax.set(xlabel=label, ylabel="milliseconds")
        ax.grid(True, which="both", alpha=0.3)
        ax.legend()
        print(label, {name: round(k, 2) for name, k in fitted.items()}, flush=True)
    figure.tight_layout()
    figure.savefig(FOLDER / "growth.png", dpi=110)
    (FOLDER / "growth.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
