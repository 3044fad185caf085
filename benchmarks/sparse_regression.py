"""Sparse linear regression, prior × guide, with NUTS as the reference: `python
benchmarks/sparse_regression.py`.

Fills the tables of docs/results/sparse_regression.md. Each finished cell is a line of
results/sparse-regression/cells.jsonl and is not run again; delete the file to start anew.
`--priors` takes any prior of the library by name, with its first argument after a colon: `--priors
Gaussian:layer Horseshoe`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal

import pyro_bmr as bmr
from pyro_bmr.guides.scale_coupled import weight_at

CELLS, PAGE = (
    Path("results/sparse-regression/cells.jsonl"),
    Path("docs/results/sparse_regression.md"),
)
ROWS, ACTIVE, NOISE, CORRELATION = 100, 5, 1.0, 0.5
STEPS, LEARNING_RATE, DRAWS = 3000, 0.05, 400
GUIDES: dict[str, Callable[..., Any]] = {
    "MeanField": bmr.MeanField,
    "LowRankPlusDiagonal": partial(bmr.LowRankPlusDiagonal, rank=8),
    "FullRank": bmr.FullRank,
    "ScaleCoupled": bmr.ScaleCoupled,
    "AutoMultivariateNormal": lambda program, *batch: AutoMultivariateNormal(program),
}
COLUMNS = {
    "false_positives": 1,
    "false_negatives": 1,
    "rmse": 3,
    "coverage": 2,
    "coverage_active": 2,
    "width_active": 2,
    "elbo": 1,
    "seconds": 0,
}


def problem(p: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns of variance 1 with correlation 0.5^|i−j|; five coefficients of size 0.5 … 2 and
    random sign, anywhere.
    """
    rng = np.random.default_rng(1000 * p + seed)
    cov = CORRELATION ** np.abs(np.subtract.outer(np.arange(p), np.arange(p)))
    x = rng.normal(size=(ROWS, p)) @ np.linalg.cholesky(cov).T
    w = np.zeros(p)
    w[rng.choice(p, ACTIVE, replace=False)] = rng.uniform(0.5, 2.0, ACTIVE) * rng.choice(
        [-1, 1], ACTIVE
    )
    return torch.tensor(x), torch.tensor(x @ w + NOISE * rng.normal(size=ROWS)), torch.tensor(w)


def make_program(prior: bmr.priors.Prior) -> Callable[..., Any]:
    def program(x, y=None):
        w = prior.sample("w", (x.shape[1],), torch.zeros(x.shape[1], dtype=x.dtype))
        noise = pyro.sample("noise", dist.HalfNormal(torch.tensor(2.0, dtype=x.dtype)))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    return program


def variational(
    prior: bmr.priors.Prior, guide: Callable[..., Any], x: torch.Tensor, y: torch.Tensor, seed: int
) -> tuple[torch.Tensor, float]:
    """Draws of the coefficients, and the mean of the ELBO over as many draws."""
    torch.manual_seed(seed)
    program = make_program(prior)
    q = guide(program, x, y)
    q(x, y)
    optimizer = torch.optim.Adam(q.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        terms = bmr.fitting.elbo_terms(program, q, x, y)
        optimizer.zero_grad()
        (terms.kl - terms.expected_log_likelihood).backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        elbo = np.mean(
            [
                float(t.expected_log_likelihood - t.kl)
                for t in (bmr.fitting.elbo_terms(program, q, x, y) for _ in range(DRAWS))
            ]
        )
        weights = []
        for _ in range(DRAWS):
            values = q(x, y)
            weights.append(weight_at(prior, "w", values["w"], values))
    return torch.stack(weights), float(elbo)


def nuts(
    prior: bmr.priors.Prior, x: torch.Tensor, y: torch.Tensor, seed: int, samples: int
) -> tuple[torch.Tensor, float]:
    pyro.set_rng_seed(seed)
    mcmc = MCMC(
        NUTS(
            make_program(prior),
            max_tree_depth=7,
            target_accept_prob=0.9,
            jit_compile=True,
            ignore_jit_warnings=True,
        ),
        num_samples=samples,
        warmup_steps=samples,
        disable_progbar=True,
    )
    mcmc.run(x, y)
    values = mcmc.get_samples()
    return torch.stack(
        [
            weight_at(prior, "w", values["w"][k], {name: v[k] for name, v in values.items()})
            for k in range(samples)
        ]
    ), float("nan")


def scores(draws: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """A coefficient is called active when its central 90 % interval leaves out 0."""
    low, high = torch.quantile(draws, torch.tensor([0.05, 0.95], dtype=draws.dtype), 0)
    selected, active = (low > 0) | (high < 0), truth != 0
    covered = (low <= truth) & (truth <= high)
    return {
        "false_positives": float((selected & ~active).sum()),
        "false_negatives": float((~selected & active).sum()),
        "rmse": float((draws.mean(0) - truth).square().mean().sqrt()),
        "coverage": float(covered.double().mean()),
        "coverage_active": float(covered[active].double().mean()),
        "width_active": float((high - low)[active].mean()),
    }


def prior_of(text: str) -> bmr.priors.Prior:
    name, _, argument = text.partition(":")
    return getattr(bmr, name)(*([argument] if argument else []))


def run(p: int, prior: str, guide: str, seed: int, samples: int) -> dict[str, Any]:
    x, y, truth = problem(p, seed)
    start = time.perf_counter()
    with (
        torch.random.fork_rng(),
        pyro.validation_enabled(False),
        pyro.settings.context(module_local_params=True),
    ):
        draws, elbo = (
            nuts(prior_of(prior), x, y, seed, samples)
            if guide == "NUTS"
            else variational(prior_of(prior), GUIDES[guide], x, y, seed)
        )
    seconds = time.perf_counter() - start
    return {
        "p": p,
        "prior": prior,
        "guide": guide,
        "seed": seed,
        **scores(draws, truth),
        "elbo": elbo,
        "seconds": seconds,
    }


def write_page(cells: pd.DataFrame) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for p, group in cells.groupby("p"):
        lines = [
            "| prior | guide | seeds | "
            + " | ".join(name.replace("_", " ") for name in COLUMNS)
            + " |",
            "|" + "---|" * (len(COLUMNS) + 3),
        ]
        for (prior, guide), cell in group.groupby(["prior", "guide"], sort=False):
            values = (
                (
                    f"{cell[c].mean():.{d}f} ± {cell[c].std(ddof=0):.{d}f}"
                    if cell[c].notna().all()
                    else ""
                )
                for c, d in COLUMNS.items()
            )
            lines.append(f"| {prior} | {guide} | {len(cell)} | " + " | ".join(values) + " |")
        before, after = (
            page.split(f"<!-- p = {p} -->")[0],
            page.split(f"<!-- end of p = {p} -->")[1],
        )
        page = before + "\n".join([f"<!-- p = {p} -->", *lines, f"<!-- end of p = {p} -->"]) + after
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--priors", nargs="+", default=["Gaussian:layer", "Horseshoe", "SpikeAndSlab"]
    )
    parser.add_argument("--guides", nargs="+", default=[*GUIDES, "NUTS"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 200])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--nuts-samples", type=int, default=200, help="after as many of warm-up")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    CELLS.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []
    keys = {(c["p"], c["prior"], c["guide"], c["seed"]) for c in done}
    for guide in arguments.guides:
        for p in arguments.sizes:
            for prior in arguments.priors:
                for seed in range(arguments.seeds):
                    if (p, prior, guide, seed) not in keys:
                        cell = run(p, prior, guide, seed, arguments.nuts_samples)
                        print(json.dumps(cell), flush=True)
                        with CELLS.open("a") as file:
                            file.write(json.dumps(cell) + "\n")
                        done.append(cell)
    cells = pd.DataFrame(done)
    order = {name: k for k, name in enumerate([*GUIDES, "NUTS"])}
    write_page(
        cells.assign(order=cells["guide"].map(order)).sort_values(
            ["p", "prior", "order"], kind="stable"
        )
    )


if __name__ == "__main__":
    main()
