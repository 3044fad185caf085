"""Shrinkage priors fitted on Fashion-MNIST, 784-300-100-10, beside the Gaussian: `python
benchmarks/fitted_priors.py` fills docs/results/fitted_priors.md.

Mean field, natural gradient, temperature 1. Each finished cell is a line of
results/fitted-priors/cells.jsonl and is not run again; with `--validation`, a sixth of the training
images is scored instead of the test images, and the cells go to validation.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import pyro_bmr as bmr
from pyro_bmr.experiments.models import load_model

FOLDER, PAGE = Path("results/fitted-priors"), Path("docs/results/fitted_priors.md")
PRIORS: dict[str, bmr.priors.Prior] = {
    'Gaussian("layer")': bmr.Gaussian("layer"),
    "Horseshoe()": bmr.Horseshoe(),
    "SpikeAndSlab()": bmr.SpikeAndSlab(),
}
MEASURES = {"accuracy": 3, "nll": 3, "ece": 3}
COLUMNS = {
    **MEASURES,
    "kept": 4,
    **{f"{name}, reduced": digits for name, digits in MEASURES.items()},
    "ms a step": 1,
    "seconds": 0,
}


def run(name: str, seed: int, epochs: int, rate: float, data: bmr.Data) -> dict[str, Any]:
    torch.manual_seed(seed)
    program = load_model("mlp")(data, PRIORS[name])
    began = time.process_time()
    fit = bmr.fit(
        program,
        data,
        epochs=epochs,
        optimizer=bmr.natural_gradient(rate),
        seed=seed,
        progress=False,
    )
    spent = time.process_time() - began
    finite = all(
        math.isfinite(float(value))
        for value in fit.history[["expected_log_likelihood", "kl"]].to_numpy().ravel()
    )
    cell: dict[str, Any] = {
        "prior": name,
        "seed": seed,
        "epochs": epochs,
        "rate": rate,
        "finite": finite,
        **scores(fit, fit.posterior, data),
    }
    reduction = bmr.reduce(
        fit.posterior, to=None if PRIORS[name].shrinkage else bmr.Gaussian(scale=0.0)
    )
    reduced = scores(fit, reduction.posterior, data)
    cell |= {"kept": reduction.kept, **{f"{key}, reduced": value for key, value in reduced.items()}}
    return cell | {
        "ms a step": 1e3 * spent / int(fit.history["step"].iloc[-1]),
        "seconds": fit.seconds,
    }


def scores(fit: bmr.Fit, posterior: bmr.Posterior, data: bmr.Data) -> dict[str, float]:
    prediction = bmr.predict(fit.program, posterior, data.x_test)
    probs: Tensor = prediction.probs
    return {
        "accuracy": bmr.metrics.accuracy(probs, data.y_test),
        "nll": -float(prediction.log_prob(data.y_test).double().mean()),
        "ece": bmr.metrics.ece(probs, data.y_test),
    }


def write_page(cells: pd.DataFrame) -> None:
    plain = cells[cells["prior"] == next(iter(PRIORS))]["ms a step"].mean()
    lines = [
        "| prior | seeds | " + " | ".join(COLUMNS) + " | over Gaussian |",
        "|" + "---|" * (len(COLUMNS) + 3),
    ]
    for name, group in cells.groupby("prior", sort=False):
        values = [f"{group[c].mean():.{d}f} ± {group[c].std():.{d}f}" for c, d in COLUMNS.items()]
        lines.append(
            f"| `{name}` | {len(group)} | "
            + " | ".join(values)
            + f" | {group['ms a step'].mean() / plain:.2f} |"
        )
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split("<!-- table -->")[0], page.split("<!-- end of table -->")[1]
    PAGE.write_text(
        before + "\n".join(["<!-- table -->", *lines, "<!-- end of table -->"]) + after,
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--priors", nargs="+", choices=list(PRIORS), default=list(PRIORS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--rate", type=float, default=0.1, help="learning rate of the natural gradient"
    )
    parser.add_argument("--validation", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = bmr.load("fashion-mnist")
    if arguments.validation:
        held, rest = torch.randperm(
            len(data.x_train), generator=torch.Generator().manual_seed(0)
        ).split([10_000, 50_000])
        x, y = data.x_train, data.y_train
        data = replace(data, x_train=x[rest], y_train=y[rest], x_test=x[held], y_test=y[held])
    path = FOLDER / ("validation.jsonl" if arguments.validation else "cells.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in range(arguments.seeds):
        for name in arguments.priors:
            key = (name, seed, arguments.epochs, arguments.rate)
            if not any((c["prior"], c["seed"], c["epochs"], c["rate"]) == key for c in cells):
                cells.append(run(*key, data))
                with path.open("a") as lines:
                    lines.write(json.dumps(cells[-1]) + "\n")
                print(
                    {k: round(v, 4) if isinstance(v, float) else v for k, v in cells[-1].items()},
                    flush=True,
                )
    if not arguments.validation:
        write_page(
            pd.DataFrame(
                [
                    c
                    for c in cells
                    if c["epochs"] == arguments.epochs and c["rate"] == arguments.rate
                ]
            )
        )


if __name__ == "__main__":
    main()
