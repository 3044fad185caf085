"""The temperature that trials choose, judged by the cells of two temperatures.

A trial is a cell of 1,000 steps, and its validation rows choose between the cells of 3,000 steps,
whose test rows report. All are fitted to the same rows; `compare` gives the last fit those of
validation as well. Next: `../../defaults.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from parts.pages import table
from parts.trials.cell import Candidate
from parts.trials.cells_file import Line, Scores
from parts.trials.problems import Problem

from pyro_bmr.experiments.temperature_trials import TEMPERATURES

_BASE = Candidate(reductions=10)
CANDIDATES = tuple(
    replace(_BASE, route=route, temperature=temperature, steps=steps)
    for route in ("reduced", "fitted")
    for steps in (3000, 1000)
    for temperature in TEMPERATURES
)
COLUMNS = (
    *("problem", "route", "chosen", "at the chosen one"),
    *(f"T = {temperature:g}" for temperature in TEMPERATURES),
    *("regret, nats", "accuracy lost, points"),
)


@dataclass(frozen=True)
class Choice:
    """What a problem, a route and a seed have: the chosen temperature, and temperature → test
    scores of its fit.
    """

    problem: str
    route: str
    chosen: float
    fits: dict[float, Scores]

    def lost(self, score: str) -> float:
        """By how much the chosen fit is below the better one."""
        return max(fit[score] for fit in self.fits.values()) - self.fits[self.chosen][score]


def choices(problems: Sequence[Problem], cells: Sequence[Line]) -> Iterator[Choice]:
    """The choices of all cells that there are."""
    by_key = {(c.problem, c.candidate, c.seed): c for c in cells if c.widening == 1}
    for problem in problems:
        for route in ("reduced", "fitted"):
            for seed in sorted({c.seed for c in cells if c.problem == problem.name}):
                found = {
                    (steps, temperature): by_key.get((problem.name, candidate, seed))
                    for candidate in CANDIDATES
                    if candidate.route == route
                    for steps, temperature in [(candidate.steps, candidate.temperature)]
                }
                if None in found.values():
                    continue
                trial = {t: found[1000, t].scores["validation"] for t in TEMPERATURES}
                chosen = max(TEMPERATURES, key=lambda t: trial[t]["log_score"])
                fits = {t: found[3000, t].scores["test"] for t in TEMPERATURES}
                yield Choice(problem.name, route, chosen, fits)


def choice_table(problems: Sequence[Problem], cells: Sequence[Line]) -> list[str]:
    """A line per problem, route and seed, and the means of each route."""
    found = list(choices(problems, cells))
    lines = [_line(choice) for choice in found]
    for route in ("reduced", "fitted"):
        lines += _mean_line(route, [choice for choice in found if choice.route == route])
    return table(COLUMNS, lines)


def _line(choice: Choice) -> list[str]:
    return [
        choice.problem,
        choice.route,
        f"{choice.chosen:g}",
        _figures(choice.fits[choice.chosen]),
        *(_figures(choice.fits[t]) for t in TEMPERATURES),
        f"{choice.lost('log_score'):.3f}",
        f"{100 * choice.lost('accuracy'):.1f}",
    ]


def _mean_line(route: str, found: Sequence[Choice]) -> list[list[str]]:
    if not found:
        return []

    def mean(fits: Sequence[Scores]) -> str:
        return _figures(
            {k: statistics.mean(fit[k] for fit in fits) for k in ("accuracy", "log_score")}
        )

    return [
        [
            f"mean of {len(found)}",
            route,
            "",
            mean([choice.fits[choice.chosen] for choice in found]),
            *(mean([choice.fits[t] for choice in found]) for t in TEMPERATURES),
            *(
                f"{scale * statistics.mean(c.lost(score) for c in found):.{digits}f}"
                f" (largest {scale * max(c.lost(score) for c in found):.{digits}f})"
                for score, scale, digits in (("log_score", 1, 3), ("accuracy", 100, 1))
            ),
        ]
    ]


def _figures(scores: Scores) -> str:
    return f"{scores['accuracy']:.3f} / {scores['log_score']:.3f}"
