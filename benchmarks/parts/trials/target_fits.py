"""Fits of networks to real targets by the defaults of `compare`, whose trials choose a temperature
and a noise, beside the same fits at temperature 1 and plain networks.

Owns `target_fit` and `target_table`. Next: `../../defaults.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from parts.pages import table
from parts.trials.cell import PLAIN, kept, scored
from parts.trials.plain import plain_prediction
from parts.trials.problems import PROBLEMS, Problem

import pyro_bmr as bmr
from pyro_bmr.experiments.recipe import fit_by_route
from pyro_bmr.experiments.settings import AUTO, Settings

ROWS = ("plain", "reduced", "reduced, T = 1", "fitted", "fitted, T = 1")
KEYS = ["problem", "row", "seed"]


def target_fit(problem: Problem, row: str, seed: int, folder: Path) -> dict[str, Any]:
    """A row of the file: the temperature and the noise of the fit, and the scores on validation
    rows of a problem that chooses, on test rows of one that reports.
    """
    data = problem.data(folder, seed)
    x, y = (data.x_val, data.y_val) if problem.chooses else (data.x_test, data.y_test)
    data = replace(data, x_test=x, y_test=y, x_val=None, y_val=None)
    keys = dict(zip(KEYS, (problem.name, row, seed), strict=True))
    if row == "plain":
        predict = plain_prediction(problem, data, seed, float(PLAIN.steps or 0), PLAIN.batch)
        found = predict(x)
        score = float(found.log_prob(y).double().mean())
        rmse = bmr.metrics.rmse(found.mean, y)
        return {**keys, "temperature": None, "noise": None, "log_score": score, "rmse": rmse,
                "kept": 1.0}  # fmt: skip
    route, _, fixed = row.partition(", ")
    settings = Settings(temperature=1.0 if fixed else AUTO)
    fitted = fit_by_route(problem.build, data, bmr.Gaussian("layer"), route, seed, settings, False)
    posterior = fitted.posterior
    prediction = bmr.predict(fitted.fit.program, posterior, x, draws=settings.draws, seed=seed)
    return {
        **keys,
        "temperature": fitted.fit.temperature,
        "noise": None if fitted.trials is None else fitted.trials.noise,
        **scored(prediction, y),
        "kept": kept(fitted.fit, posterior),
    }


def target_table(fits: pd.DataFrame) -> list[str]:
    """A line per problem and row, means over its seeds."""
    lines = []
    for problem in dict.fromkeys(fits["problem"]):
        for row in ROWS:
            of = fits[(fits["problem"] == problem) & (fits["row"] == row)]
            if of.empty:
                continue
            chosen = ", ".join(f"{t:.2g}" for t in of["temperature"].dropna())
            noise = ", ".join(f"{s:.2f}" for s in of["noise"].dropna())
            figures = [_spread(of["log_score"]), _spread(of["rmse"])]
            side = "chooses" if PROBLEMS[problem].chooses else "reports"
            lines.append(
                [problem, side, row, str(len(of)), chosen, noise, *figures,
                 f"{100 * of['kept'].mean():.1f} %"]
            )  # fmt: skip
    columns = ("problem", "side", "row", "seeds", "T by seed", "σ by seed", "log score")
    return table((*columns, "RMSE", "kept"), lines)


def _spread(values: pd.Series) -> str:
    mean = f"{values.mean():.3f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std():.3f}"
