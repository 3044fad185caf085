"""The rows of a table of means: their figures over seeds, the error of their log score, and whether
they are better than a prediction that ignores the inputs.

Owns `Line`, `lines_of`, `no_better` and `marks_of`. The error of a mean is that of the seeds and of
the scored rows together. Next: `conclusions.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyro_bmr.experiments.baseline_cells import IN_COMPARISONS
from pyro_bmr.experiments.pictures import KEYS
from pyro_bmr.experiments.settings import ROUTES

if TYPE_CHECKING:
    import pandas as pd

MARK = " *"
"""Behind a figure that is no better than that of the base rates."""
SIGNS = {"accuracy": 1, "rmse": -1, "nll": -1}
"""Figure that has a base rate → 1 if more is better, −1 if less is."""
_FIGURES = (
    *("accuracy", "rmse", "nll", "nll_error", "ece", "kept", "kept_parameters", "converged"),
    *("base_accuracy", "base_rmse", "base_nll"),
)
_ROUNDING = 1e-6  # of a figure in float32


@dataclass(frozen=True)
class Line:
    """A row of the table of means: its name in a sentence, what it is, and figure → its value for
    each seed, NaN where it has none.
    """

    name: str
    about: Mapping[str, Any]
    figures: Mapping[str, Mapping[int, float]]

    @property
    def seeds(self) -> int:
        return len(self.figures["nll"])

    def finite(self, figure: str) -> bool:
        """Whether every seed has the figure, and a finite one."""
        return not any(math.isnan(v) for v in self.figures[figure].values())

    def mean(self, figure: str) -> float:
        """Over the seeds that have it."""
        values = [v for v in self.figures.get(figure, {}).values() if not math.isnan(v)]
        return sum(values) / len(values) if values else math.nan

    def over(self, seeds: Iterable[int]) -> Line:
        """The same row over some of its seeds."""
        wanted = set(seeds)
        figures = {
            name: {seed: value for seed, value in values.items() if seed in wanted}
            for name, values in self.figures.items()
        }
        return Line(self.name, self.about, figures)

    def error(self) -> float:
        """The standard error of the mean NLL, √(s²/S + e²): s the standard deviation over S seeds,
        e the error of the scored rows, which are the same for all seeds. NaN if nothing is known.
        """
        values, mean = list(self.figures["nll"].values()), self.mean("nll")
        parts = [self.mean("nll_error") ** 2]
        if len(values) > 1:
            spread = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
            parts.append(spread / len(values))
        known = [part for part in parts if not math.isnan(part)]
        return math.sqrt(sum(known)) if known else math.nan


def lines_of(table: pd.DataFrame) -> list[Line]:
    """The rows of the table of means, in its order."""
    keys = [key for key in KEYS if key in table]
    found = []
    for _, rows in table.groupby(keys, sort=False, dropna=False):
        about = {key: rows[key].iloc[0] for key in keys}
        figures = {
            name: dict(zip(rows["seed"], rows[name].astype(float), strict=True))
            for name in _FIGURES
            if name in rows
        }
        found.append(Line(_name(about), about, figures))
    return found


def _name(about: Mapping[str, Any]) -> str:
    """The name of a row in a sentence."""
    route = about.get("route")
    if route in ROUTES:
        return f"{about['prior']} {route}"
    if route is not None:
        return IN_COMPARISONS.get(route, route)
    kept = about.get("option_kept", math.nan)
    size = "" if kept is None or math.isnan(kept) else f" at {percent(kept)}"
    return f"{about['method']}{size}"


def marks_of(table: pd.DataFrame) -> dict[str, list[bool]]:
    """Figure → for each row of the table of means, whether it is no better than that of the base
    rates of the training rows. A figure that is not finite is no better.
    """
    lines = lines_of(table)
    return {name: [no_better(line, name) for line in lines] for name in SIGNS if name in table}


def no_better(line: Line, figure: str) -> bool:
    """Whether a figure is no better than that of the base rates; False if that is not known."""
    base = line.mean(f"base_{figure}")
    if math.isnan(base):
        return False
    gain = SIGNS[figure] * (line.mean(figure) - base)
    return not line.finite(figure) or gain <= _ROUNDING * abs(base)


def percent(fraction: float) -> str:
    """`4.52 %`."""
    return f"{100 * fraction:.3g} %"
