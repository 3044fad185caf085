"""Greedy search over a correlated posterior against the subset of the best exact evidence: `python
benchmarks/subset_search.py`.

Each problem: y = Xw + noise, d regressors with pairwise correlations of random strength, w ~ N(0,
1) with half of its entries 0. The exact log evidence of all 2^d subsets is computed without the
library, log N(y; 0, X_A X_Aᵀ + noise² I). Compared with its best subset are: the greedy search and
the exhaustive search over the exact posterior, the point-spike rule on its marginals, and on the
mean-field posterior (of all factorised Gaussians the closest in KL: variances 1/P_ii), in one shot
and repeated with the rest refitted after each weight that goes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import pyro_bmr as bmr

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.pages import table


def problem(seed: int, rows: int, d: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(d, 3))
    cov = factors @ factors.T + 0.5 * np.eye(d)
    scale = np.sqrt(np.diag(cov))
    x = rng.normal(size=(rows, d)) @ np.linalg.cholesky(cov / np.outer(scale, scale)).T
    w = rng.normal(size=d) * (rng.random(d) < 0.5)
    return x, x @ w + noise * rng.normal(size=rows)


def exact_log_evidences(
    x: np.ndarray, y: np.ndarray, noise: float
) -> dict[tuple[bool, ...], float]:
    """Every subset → log N(y; 0, X_A X_Aᵀ + noise² I), through the |A|×|A| determinant."""
    gram, moment, n = x.T @ x / noise**2, x.T @ y / noise**2, len(y)
    base = -0.5 * n * np.log(2 * np.pi * noise**2) - 0.5 * y @ y / noise**2
    evidences = {}
    for alive in itertools.product((True, False), repeat=x.shape[1]):
        a = np.array(alive)
        precision = gram[np.ix_(a, a)] + np.eye(a.sum())
        evidences[alive] = (
            base
            - 0.5 * np.linalg.slogdet(precision)[1]
            + 0.5 * moment[a] @ np.linalg.solve(precision, moment[a])
        )
    return evidences


def repeated_mean_field(precision: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """The weight with the largest ΔF > 0 goes, the factorised posterior of the rest is fitted anew,
    until none is left.
    """
    alive = np.ones(len(moment), dtype=bool)
    while alive.any():
        sub = precision[np.ix_(alive, alive)]
        mean, var = np.linalg.solve(sub, moment[alive]), 1 / np.diag(sub)
        gain = -0.5 * np.log(var) - 0.5 * mean**2 / var
        if gain.max() <= 0:
            break
        alive[np.flatnonzero(alive)[gain.argmax()]] = False
    return alive


def answers_to(
    x: np.ndarray,
    y: np.ndarray,
    noise: float,
    exact: dict[tuple[bool, ...], float],
    seconds: dict[str, float],
) -> tuple[dict[str, np.ndarray], float]:
    """Method → which regressors are kept, and the largest difference between a ΔF of the searches
    and the exact one; `seconds` of the searches are added up.
    """
    d = x.shape[1]
    precision, moment = x.T @ x / noise**2 + np.eye(d), x.T @ y / noise**2
    mean, prior = torch.tensor(np.linalg.solve(precision, moment)), bmr.Gaussian(1.0)
    posterior = bmr.formulas.Dense(mean, torch.tensor(np.linalg.inv(precision)))
    answers, error = {}, 0.0
    for name, method in (
        ("greedy, full posterior", bmr.reduction.greedy_search),
        ("exhaustive, full posterior", bmr.reduction.exhaustive_search),
    ):
        start = time.perf_counter()
        search = method(posterior, prior)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        answers[name] = search.mask.numpy()
        for row, gain in zip(search.kept.tolist(), search.delta_f.tolist(), strict=True):
            error = max(error, abs(exact[tuple(row)] - exact[(True,) * d] - gain))
    for name, var in (
        ("one shot, marginals of the full posterior", posterior.cov.diagonal()),
        ("one shot, mean field", 1 / torch.tensor(np.diag(precision))),
    ):
        gain = bmr.delta_f(bmr.formulas.Diagonal(mean, var), prior, bmr.Gaussian(0.0))
        answers[name] = (gain <= 0).numpy()
    name = "one weight at a time, mean field fitted anew"
    answers[name] = repeated_mean_field(precision, moment)
    return answers, error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--d", type=int, default=10)
    parser.add_argument("--noise", type=float, default=1.0)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[bool]] = {}
    lost: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    error = 0.0
    for seed in range(settings.problems):
        x, y = problem(seed, settings.rows, settings.d, settings.noise)
        exact = exact_log_evidences(x, y, settings.noise)
        best = max(exact, key=lambda subset: exact[subset])
        answers, off = answers_to(x, y, settings.noise, exact, seconds)
        error = max(error, off)
        for name, alive in answers.items():
            found.setdefault(name, []).append(tuple(alive.tolist()) == best)
            lost.setdefault(name, []).append(exact[best] - exact[tuple(alive.tolist())])
    rows = [
        (
            name,
            f"{sum(hits)} of {len(hits)}",
            f"{np.mean(lost[name]):.3f}",
            f"{np.max(lost[name]):.2f}",
            f"{1e3 * seconds[name] / len(hits):.1f}" if name in seconds else "",
        )
        for name, hits in found.items()
    ]
    lost_columns = ["evidence lost, mean (nats)", "worst (nats)"]
    columns = ["method", "best subset found", *lost_columns, "ms a problem"]
    print("\n".join(table(columns, rows)))
    print(f"\nlargest difference between a ΔF of the searches and the exact one: {error:.1e} nats")
    print(pd.Series({k: str(v) for k, v in vars(settings).items()}).to_string())


if __name__ == "__main__":
    main()
