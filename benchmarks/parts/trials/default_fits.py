"""Fits by the defaults of `compare`, with their trials on a sixth of the training rows, and their
scores with the class probabilities as they come and at the temperature that the trials found.

Owns `default_fit` and `default_table`. Next: `../../defaults.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from parts.pages import table
from parts.trials.cell import kept, scored
from parts.trials.cells_file import Line
from parts.trials.problems import PROBLEMS, Problem

import pyro_bmr as bmr
from pyro_bmr.experiments.recipe import fit_by_route
from pyro_bmr.experiments.settings import Settings
from pyro_bmr.experiments.temperature_trials import at_scale

ROUTES = ("reduced", "fitted")
KEYS = ["problem", "route", "seed"]


def default_fit(problem: Problem, route: str, seed: int, folder: Path) -> dict[str, Any]:
    """A row of the file: the temperature of the fit, `scale`, that of the class probabilities, and
    the scores on validation rows of a problem that chooses, on test rows of one that reports.
    `as_fitted`: the log score and the ECE at a scale of 1.
    """
    data = problem.data(folder, seed)
    x, y = (data.x_val, data.y_val) if problem.chooses else (data.x_test, data.y_test)
    data = replace(data, x_test=x, y_test=y, x_val=None, y_val=None)
    settings, prior = Settings(), bmr.Gaussian("layer")
    found = fit_by_route(problem.build, data, prior, route, seed, settings, False)
    program, posterior = found.fit.program, found.posterior
    prediction = bmr.predict(program, posterior, x, draws=settings.draws, seed=seed)
    as_fitted, scores = scored(prediction, y), scored(at_scale(prediction, found.scale), y)
    return {
        **dict(zip(KEYS, (problem.name, route, seed), strict=True)),
        "temperature": found.fit.temperature,
        "scale": found.scale,
        **scores,
        **{f"as_fitted_{name}": as_fitted[name] for name in ("log_score", "ece")},
        "kept": kept(found.fit, posterior),
    }


def default_table(side: str, fits: pd.DataFrame, cells: Sequence[Line]) -> list[str]:
    """A line per problem of that side and route, means over its seeds, and a line of their means.
    Regret is to the best of these fits and of all `cells` with the problem and the seed. The file
    also has the fits of earlier defaults, under other routes: they have no line and count as known.
    """
    chooses = side == "choosing"
    fits = fits[[PROBLEMS[name].chooses == chooses for name in fits["problem"]]]
    rows = "validation" if chooses else "test"
    known = [(c.problem, c.seed, c.scores[rows]["log_score"]) for c in cells]
    known += [(f.problem, f.seed, f.log_score) for f in fits.itertuples()]
    known += [(f.problem, f.seed, f.as_fitted_log_score) for f in fits.itertuples()]
    best = pd.DataFrame(known, columns=["problem", "seed", "best"])
    best = best.groupby(["problem", "seed"], as_index=False).max()
    fits = fits.merge(best, on=["problem", "seed"])
    fits["regret_as_fitted"] = fits["best"] - fits["as_fitted_log_score"]
    fits["regret"] = fits["best"] - fits["log_score"]
    lines = []
    for route in ROUTES:
        of_route = fits[fits["route"] == route]
        if of_route.empty:
            continue
        groups = of_route.groupby("problem", sort=False)
        means = groups.mean(numeric_only=True)
        seeds = groups["seed"].nunique()
        scales = groups["scale"].agg(lambda scale: ", ".join(f"{x:.2f}" for x in scale))
        lines += [
            [name, route, str(seeds[name]), scales[name], *_figures(mean)]
            for name, mean in means.iterrows()
        ]
        worst = means["regret"].max()
        end = [f"largest regret {worst:.3f}", *_figures(means.mean())]
        lines.append([f"mean of {len(means)}", route, "", *end])
    columns = ("problem", "route", "seeds", "τ by seed", "accuracy", "log score, τ = 1")
    more = ("log score", "regret, τ = 1", "regret", "ECE, τ = 1", "ECE", "kept")
    return table((*columns, *more), lines)


def _figures(mean: Any) -> list[str]:
    names = ("accuracy", "as_fitted_log_score", "log_score", "regret_as_fitted", "regret")
    figures = [f"{mean[name]:.3f}" for name in (*names, "as_fitted_ece", "ece")]
    return [*figures, f"{100 * mean['kept']:.1f} %"]
