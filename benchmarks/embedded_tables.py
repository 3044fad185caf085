"""The defaults of `compare` on the four tables that scikit-learn embeds, beside linear models:
`python benchmarks/embedded_tables.py --out results/embedded_tables` fits what is missing and fills
the table of docs/results/embedded_tables.md.

Each split draws another fifth of the rows for the test, which is scored once. The linear models are
scikit-learn's: logistic regression whose penalty is chosen by the log loss of five folds, and ridge
regression whose penalty has the least squared error of five folds, with that error as its variance.
Ours are the reduced route of `compare` with every setting at its default: under `Gaussian("layer")`
for the linear model and the multilayer perceptron, under a horseshoe and a spike and slab for the
linear model. NLL is in nats per row, for standardised targets.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from parts.pages import fill, table
from sklearn import datasets
from sklearn.linear_model import LogisticRegressionCV, Ridge
from sklearn.model_selection import KFold

import pyro_bmr as bmr
from pyro_bmr.data.standardised import split

PAGE = Path(__file__).parents[1] / "docs" / "results" / "embedded_tables.md"
TABLES = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
}
PRIORS = {
    "gaussian:layer": bmr.Gaussian("layer"),
    "horseshoe": bmr.Horseshoe(),
    "spike-and-slab": bmr.SpikeAndSlab(),
}
METHODS = ("tuned linear", *(f"linear, {prior}" for prior in PRIORS), "mlp, gaussian:layer")
_COLUMNS = ("table", "method", "NLL", "kept", "within one deviation", "splits")


def data_of(name: str, seed: int) -> bmr.Data:
    bunch = TABLES[name]()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    return split(name, bunch.data[order].astype(np.float64), bunch.target[order])


def logistic(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> float:
    model = LogisticRegressionCV(
        Cs=np.logspace(-4, 3, 22), cv=5, scoring="neg_log_loss", max_iter=5000,
        use_legacy_attributes=False, l1_ratios=(0.0,),
    ).fit(x, y)  # fmt: skip
    return float(-np.log(model.predict_proba(x_test)[np.arange(len(y_test)), y_test]).mean())


def ridge(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> float:
    folds, found = list(KFold(5, shuffle=True, random_state=0).split(x)), []
    for penalty in np.logspace(-2, 4, 25):
        misses = [y[b] - Ridge(penalty).fit(x[a], y[a]).predict(x[b]) for a, b in folds]
        found.append((float(np.mean(np.concatenate(misses) ** 2)), penalty))
    var, penalty = min(found)
    error = y_test - Ridge(penalty).fit(x, y).predict(x_test)
    return float(0.5 * np.log(2 * np.pi * var) + 0.5 * np.mean(error**2) / var)


def tuned(data: bmr.Data) -> dict[str, Any]:
    x, y, x_test, y_test = (
        t.numpy() for t in (data.x_train, data.y_train, data.x_test, data.y_test)
    )
    score = logistic if data.task == "classification" else ridge
    return {"nll": score(x, y.squeeze(), x_test, y_test.squeeze()), "kept": 1.0}


def ours(data: bmr.Data, method: str) -> dict[str, Any]:
    model, prior = method.split(", ")
    own = "linear_regression" if data.task == "regression" else "logistic_regression"
    row = bmr.compare(
        "mlp:50-50" if model == "mlp" else own,
        data,
        priors={prior: PRIORS[prior]},
        routes=["reduced"],
        baselines=[],
        seeds=1,
        progress=False,
    ).iloc[0]
    scale = math.log(data.target_scale) if data.task == "regression" else 0.0
    return {"nll": float(row["nll"]) - scale, "kept": float(row["kept"])}


def rows_of(out: Path) -> list[list[str]]:
    """A row for each table and method that there is."""
    rows = []
    for name in TABLES:
        found = {
            method: pd.DataFrame(
                json.loads(file.read_text())
                for file in sorted((out / name / method).glob("*.json"))
            )
            for method in METHODS
        }
        best = found["tuned linear"]
        for method, scores in found.items():
            if scores.empty:
                continue
            both = best["nll"].iloc[: len(scores)]
            rise, spread = scores["nll"].mean() - both.mean(), best["nll"].std()
            nll = f"{scores['nll'].mean():.3f} ± {scores['nll'].std():.3f}"
            said = "" if method == "tuned linear" else "yes" if rise <= spread else "no"
            rows.append([name, method, nll, f"{scores['kept'].mean():.0%}", said, str(len(scores))])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/embedded_tables"))
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS)
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for method in a.only:
        for seed in range(a.splits):
            for name in TABLES:
                file = a.out / name / method / f"{seed}.json"
                if not file.exists():
                    data = data_of(name, seed)
                    scores = tuned(data) if method == "tuned linear" else ours(data, method)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(scores))
                    print(name, method, seed, scores, flush=True)
    fill(PAGE, table(_COLUMNS, rows_of(a.out)))


if __name__ == "__main__":
    main()
