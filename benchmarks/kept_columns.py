"""How often a fit keeps exactly the columns that matter: `python benchmarks/kept_columns.py --out
results/kept_columns` prints a table, and fits only what is missing.

y = 3x₀ − 2x₁ + x₂ + noise of standard deviation ½, x standard normal with p columns, n rows, of
which a fifth is the test split, as in a table that is read from a file. The model is
`linear_regression`. A seed draws the data as well. A count is that of the seeds in which columns 0,
1 and 2 are kept and no other.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from parts.trials.cell import Candidate, fitted, reduced_posterior
from parts.trials.problems import Problem

import pyro_bmr as bmr
from pyro_bmr.data.data_set import split


def table(n: int, p: int, seed: int) -> bmr.Data:
    rng = np.random.default_rng([n, p, seed])
    x = rng.standard_normal((n, p))
    return split("sparse", x, x[:, :3] @ [3.0, -2.0, 1.0] + 0.5 * rng.standard_normal(n))


def columns(candidate: Candidate, n: int, p: int, seed: int) -> dict[str, object]:
    """The columns that are kept, the log score on test rows, and the seconds of the processor."""
    data = table(n, p, seed)
    problem = Problem("sparse", lambda folder: (), "linear_regression", True, real=True)
    clock = time.process_time()
    fit = fitted(problem, candidate, data, seed)
    posterior = reduced_posterior(fit, candidate)
    seconds = time.process_time() - clock
    prediction = bmr.predict(fit.program, posterior, data.x_test, draws=32, seed=seed)
    return {
        "kept": posterior["w"].kept.nonzero()[:, 0].tolist(),
        "log_score": float(prediction.log_prob(data.y_test).mean()),
        "rmse": bmr.metrics.rmse(prediction.mean, data.y_test),
        "steps": int(fit.history["step"].iloc[-1]),
        "seconds": seconds,
    }


_ROUTES = (
    Candidate("gaussian:layer"),
    Candidate("gaussian"),
    Candidate("horseshoe", "fitted"),
    Candidate("spike-and-slab", "fitted"),
    Candidate("spike-and-slab:0.1", "fitted"),
    Candidate("horseshoe", "reduced", declared="gaussian:layer"),
    Candidate("spike-and-slab", "reduced", declared="gaussian:layer"),
)


def candidates(optimizer: str, rate: float | None, steps: int, batch: int) -> list[Candidate]:
    given = {"optimizer": optimizer, "rate": rate, "steps": steps, "batch": batch}
    return [replace(route, temperature=1.0, **given) for route in _ROUTES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/kept_columns"))
    parser.add_argument("--sizes", nargs="+", default=["200x10", "200x100"], metavar="NxP")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--optimizer", default="natural-gradient")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--only", help="part of a name")
    parser.add_argument("--batch", type=int, default=128)
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for size in a.sizes:
        n, p = map(int, size.split("x"))
        for candidate in candidates(a.optimizer, a.rate, a.steps, a.batch):
            if a.only and a.only not in candidate.name:
                continue
            found = []
            for seed in range(a.seeds):
                file = a.out / size / candidate.name / f"{seed}.json"
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(columns(candidate, n, p, seed)))
                found.append(json.loads(file.read_text()))
            exact = sum(cell["kept"] == [0, 1, 2] for cell in found)
            true = sum(set(cell["kept"]) >= {0, 1, 2} for cell in found)
            size_of = np.mean([len(cell["kept"]) for cell in found])
            score = np.mean([cell["log_score"] for cell in found])
            seconds = np.mean([cell["seconds"] for cell in found])
            print(
                f"{size} {candidate.name}: exact {exact}, all three {true}, of {a.seeds}; kept"
                f" {size_of:.1f}, log score {score:.3f}, {seconds:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
