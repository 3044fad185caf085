"""Which prior, optimiser, temperature, length of a fit and schedule of reductions lose least over
problems that lie apart: `python benchmarks/defaults.py --data FOLDER --out results/defaults` fits
what is missing, and writes the table of docs/results/defaults.md.

`parts/trials/problems.py` has the problems, and says where their tables come from. A cell is a
problem, a candidate and a seed, one file in `--out`. Its scores on validation rows choose, on half
of the problems. Its scores on test rows are only reported, on the other half. Regret is the log
score of the best candidate of a problem minus that of the candidate, in nats per row.

`--round NAME` fits the candidates of one round only, `--page` writes the page from what there is.
The round "defaults" has no candidates: its fits are those of `compare` by default
(`parts/trials/default_fits.py`), on the problems of classes whose steps are cheap. Those of the
round "targets" are networks for real targets (`parts/trials/target_fits.py`).
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from parts.pages import fill
from parts.trials.cell import PLAIN, Candidate, cell, on
from parts.trials.cells_file import Line, add_cell, has_cell, read_cells
from parts.trials.choices import CANDIDATES, choice_table
from parts.trials.default_fits import KEYS, ROUTES, default_fit, default_table
from parts.trials.problems import PROBLEMS, Problem
from parts.trials.regret import regret_table
from parts.trials.target_fits import KEYS as TARGET_KEYS
from parts.trials.target_fits import ROWS, target_fit, target_table

import pyro_bmr as bmr
from pyro_bmr.experiments.folder import versions

PAGE = Path(__file__).parents[1] / "docs" / "results" / "defaults.md"
CELLS = PAGE.with_suffix(".csv")
FITS = PAGE.with_name("default_fits.csv")
TARGET_FITS = PAGE.with_name("target_fits.csv")
DEFAULTS, TARGETS = "defaults", "targets"

# rounds

_BASE = Candidate()
ROUNDS: dict[str, tuple[tuple[Candidate, ...], int, str]] = {}
"""Name → candidates, seeds, and problems: choosing, reporting, all, or one by its name."""


def _round(name: str, candidates: list[Candidate], seeds: int, side: str) -> None:
    ROUNDS[name] = tuple(candidates), seeds, side


def _varied(**fields: Any) -> list[Candidate]:
    """The base with each of several values of one field; or of several fields, in turn."""
    (name, values), *others = fields.items()
    return [replace(_BASE, **{name: value}, **dict(others)) for value in values]


_round("trials", list(CANDIDATES), 1, "all")
_BASE_GRID = [
    *_varied(temperature=(0.3, 1.0, 0.1)),
    *_varied(temperature=(0.3, 1.0, 0.1), prior="gaussian"),
]
_SHRINKAGE = [
    replace(_BASE, route="fitted", prior=p, optimizer=o, rate=r, temperature=t)
    for t in (0.3, 0.1)
    for p in ("horseshoe", "spike-and-slab", "spike-and-slab:0.1", "spike-and-slab:0.2")
    for o, r in (("natural-gradient", None),)
]
_SHRUNK = [
    replace(_BASE, prior=p, declared=d, temperature=t)
    for t in (0.3, 0.1)
    for d in ("gaussian:layer", "gaussian")
    for p in ("horseshoe", "spike-and-slab")
]
_FITTED = replace(_BASE, route="fitted")
_round(
    "digits-shrinkage",
    [
        replace(_FITTED, prior=p, temperature=t)
        for p, t in (
            ("spike-and-slab", 0.03),
            ("horseshoe", 0.03),
            ("spike-and-slab:0.2", 0.03),
            ("spike-and-slab:0.1", 0.03),
            ("horseshoe", 0.1),
            ("spike-and-slab:0.2", 0.1),
        )
    ],
    1,
    "digits",
)
_round("digits", [*_BASE_GRID, *_SHRUNK[:4], *_SHRINKAGE], 1, "digits")
_round(
    "digits-schedule",
    [
        replace(_BASE, prior="gaussian", temperature=0.1, reductions=10),
        replace(_BASE, prior="gaussian", temperature=0.1, start=0.5),
        replace(_BASE, prior="gaussian", temperature=0.03),
        replace(_BASE, route="fitted", temperature=0.3),
        replace(_BASE, route="fitted", temperature=0.1),
        replace(_BASE, route="fitted", prior="gaussian", temperature=0.1),
    ],
    1,
    "digits",
)
_round(
    "digits-fitted",
    [
        replace(_BASE, route="fitted", prior=p, temperature=t)
        for p, t in (("gaussian", 0.03), ("gaussian:layer", 0.03), ("gaussian", 0.01))
    ],
    1,
    "digits",
)
_TEN = replace(_BASE, reductions=10, prior="gaussian")
_AUTO = replace(_TEN, steps=None)
_round("auto", [replace(_AUTO, temperature=t) for t in (0.3, 0.1)], 1, "choosing")
_round(
    "auto-layer",
    [replace(_AUTO, prior="gaussian:layer", temperature=t) for t in (0.3, 0.1)],
    1,
    "choosing",
)
_round(
    "fixed-layer",
    [replace(_TEN, prior="gaussian:layer", temperature=t) for t in (0.3, 0.1)],
    1,
    "choosing",
)
_round(
    "report-layer",
    [replace(_TEN, prior="gaussian:layer", temperature=t) for t in (0.3, 0.1)],
    1,
    "reporting",
)
_round("report", [replace(_TEN, temperature=t) for t in (0.3, 0.1)], 1, "reporting")
_round("report-plain", [PLAIN], 1, "reporting")
_round(
    "inclusion",
    [replace(_FITTED, prior="spike-and-slab:0.1", temperature=t) for t in (0.03, 0.1)],
    1,
    "choosing",
)
_round("warmth", [replace(_TEN, prior="gaussian:layer", warm=0.3)], 1, "all")
_round("plain", [PLAIN], 1, "choosing")
_round("ten", [replace(_TEN, temperature=t) for t in (0.1, 0.3)], 1, "choosing")
_round("ten-layer", [replace(_TEN, temperature=0.1, prior="gaussian:layer")], 1, "choosing")
_round("cold", _varied(temperature=(0.3, 0.1), prior="gaussian"), 1, "choosing")
_round("layer", _varied(temperature=(0.3,)), 1, "choosing")
_round("warm", [c for c in _BASE_GRID if c.temperature == 1], 1, "choosing")
_round("schedule", _varied(reductions=(10,), prior="gaussian"), 1, "choosing")
_round("steps", _varied(steps=(1000, 6000), prior="gaussian"), 1, "choosing")
_round("adam", _varied(rate=(None, 1e-2), optimizer="adam", prior="gaussian"), 1, "choosing")
_round("batch", _varied(batch=(32,), prior="gaussian"), 1, "choosing")
_round("fitted", _varied(temperature=(0.03, 0.1, 0.3), route="fitted"), 1, "choosing")


def problems_of(side: str) -> list[Problem]:
    if side in PROBLEMS:
        return [PROBLEMS[side]]
    return [p for p in PROBLEMS.values() if side == "all" or p.chooses == (side == "choosing")]


def run(
    name: str, folder: Path, file: Path, only: str | None = None, seeds: int | None = None
) -> None:
    """Fits the cells of a round that are not in the file yet."""
    candidates, usual, side = ROUNDS[name]
    for seed in range(seeds or usual):
        for problem in problems_of(side):
            for candidate in candidates:
                # real targets have one temperature: no trials
                if only in (None, problem.name) and not (name == "trials" and problem.real):
                    run_cell(problem, candidate, seed, folder, file)


def run_cell(problem: Problem, candidate: Candidate, seed: int, folder: Path, file: Path) -> None:
    candidate = on(problem, candidate)
    if has_cell(read_cells(file), problem.name, candidate, seed):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = cell(problem, candidate, seed, folder)
        except bmr.errors.PyroBMRError as error:
            print(problem.name, candidate.name, seed, error, flush=True)
            return
    add_cell(file, problem.name, candidate, seed, found, versions().get("commit", ""))
    best = found["scores"]["1"]["validation"]
    print(time.strftime("%H:%M:%S"), problem.name, candidate.name, seed, best, flush=True)


def run_defaults(folder: Path, only: str | None, seeds: int) -> None:
    """Makes the fits by default that are not in their file yet."""
    problems = [p for p in PROBLEMS.values() if not p.real and p.cost == 1]
    run_into(FITS, default_fit, KEYS, problems, ROUTES, folder, only, seeds)


def run_targets(folder: Path, only: str | None, seeds: int) -> None:
    """Makes the fits of networks to real targets that are not in their file yet."""
    problems = [p for p in PROBLEMS.values() if p.real and p.model != "linear_regression"]
    run_into(TARGET_FITS, target_fit, TARGET_KEYS, problems, ROWS, folder, only, seeds)


def run_into(
    file: Path,
    make: Callable[[Problem, str, int, Path], dict[str, Any]],
    keys: list[str],
    problems: list[Problem],
    rows: Sequence[str],
    folder: Path,
    only: str | None,
    seeds: int,
) -> None:
    """Adds what `make` makes of each problem, row and seed to a table with these `keys`."""
    named = [problem for problem in problems if only in (None, problem.name)]
    for seed, problem, row in product(range(seeds), named, rows):
        fits = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=keys)
        if (fits[keys] == [problem.name, row, seed]).all(axis=1).any():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = make(problem, row, seed, folder)
        line = pd.DataFrame([{**found, "commit": versions().get("commit", "")}])
        line.to_csv(file, mode="a", header=not len(fits), index=False, float_format="%.6g")
        print(time.strftime("%H:%M:%S"), *found.values(), flush=True)


def candidates_of(cells: list[Line]) -> list[Candidate]:
    """The candidates that were run, those for real targets apart."""
    return list(dict.fromkeys(c.candidate for c in cells if not PROBLEMS[c.problem].real))


def write_page(file: Path) -> None:
    """Fills the tables of the page."""
    cells = read_cells(file)
    fill(PAGE, choice_table(list(PROBLEMS.values()), cells), "trials")
    for side in ("choosing", "reporting"):
        lines = regret_table(candidates_of(cells), problems_of(side), cells, CANDIDATES[0])
        fill(PAGE, lines, f"regrets, {side}")
        fill(PAGE, default_table(side, pd.read_csv(FITS), cells), f"defaults, {side}")
    fill(PAGE, target_table(pd.read_csv(TARGET_FITS)), TARGETS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder of the tables of R")
    parser.add_argument("--cells", type=Path, default=CELLS, help="their file")
    rounds = [DEFAULTS, TARGETS, *ROUNDS]
    parser.add_argument("--round", nargs="*", default=rounds, choices=rounds)
    parser.add_argument("--only", help="a problem")
    parser.add_argument("--seeds", type=int, help="in place of those of the round")
    parser.add_argument("--page", action="store_true", help="fit nothing, only write the page")
    arguments = parser.parse_args()
    for name in () if arguments.page else arguments.round:
        if name in (DEFAULTS, TARGETS):
            fits = run_defaults if name == DEFAULTS else run_targets
            fits(arguments.data, arguments.only, arguments.seeds or 2)
        else:
            run(name, arguments.data, arguments.cells, arguments.only, arguments.seeds)
    if arguments.page or not arguments.only:
        write_page(arguments.cells)


if __name__ == "__main__":
    main()
