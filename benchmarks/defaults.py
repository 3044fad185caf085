"""Which prior, optimiser, temperature, length of a fit and schedule of reductions lose least over
problems that lie apart: `python benchmarks/defaults.py --data FOLDER --out results/defaults` fits
what is missing, and writes the table of docs/results/defaults.md.

`trials/problems.py` has the problems, and says where the tables come from. A cell is a problem, a
candidate and a seed, one file in `--out`. Its scores on validation rows choose, on half of the
problems; its scores on test rows are only reported, on the other half. Regret is the log score of
the best candidate of a problem minus that of the candidate, in nats per row.

`--round NAME` fits the candidates of one round only.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
from trials.cell import PLAIN, Candidate, cell, on
from trials.problems import PROBLEMS, Problem

import pyro_bmr as bmr
from pyro_bmr.experiments.folder import versions

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


_BASE_GRID = [
    *_varied(temperature=(0.3, 1.0, 0.1)),
    *_varied(temperature=(0.3, 1.0, 0.1), prior="gaussian"),
]
_SHRINKAGE = [
    replace(_BASE, route="fitted", prior=p, optimizer=o, rate=r, temperature=t)
    for t in (0.3, 0.1, 1.0)
    for p in ("spike-and-slab", "horseshoe")
    for o, r in (("adam", 1e-2), ("natural-gradient", None))
]
_SHRUNK = [
    replace(_BASE, prior=p, declared=d, temperature=t)
    for t in (0.3, 0.1)
    for d in ("gaussian:layer", "gaussian")
    for p in ("horseshoe", "spike-and-slab")
]
_round("digits", [*_BASE_GRID, *_SHRUNK[:4], *_SHRINKAGE[:8]], 1, "digits")
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
_round("plain", [PLAIN], 1, "choosing")
_round("cold", _varied(temperature=(0.3, 0.1), prior="gaussian"), 1, "choosing")
_round("layer", _varied(temperature=(0.3,)), 1, "choosing")
_round("warm", [c for c in _BASE_GRID if c.temperature == 1], 1, "choosing")
_round("schedule", _varied(reductions=(10,), prior="gaussian"), 1, "choosing")
_round("steps", _varied(steps=(1000, 6000), prior="gaussian"), 1, "choosing")
_round("adam", _varied(rate=(None, 1e-2), optimizer="adam", prior="gaussian"), 1, "choosing")
_round("batch", _varied(batch=(32,), prior="gaussian"), 1, "choosing")
_round("fitted", _varied(temperature=(0.3, 0.1), route="fitted"), 1, "choosing")


def problems_of(side: str) -> list[Problem]:
    if side in PROBLEMS:
        return [PROBLEMS[side]]
    return [p for p in PROBLEMS.values() if side == "all" or p.chooses == (side == "choosing")]


def run(
    name: str, folder: Path, out: Path, only: str | None = None, seeds: int | None = None
) -> None:
    """Fits the cells of a round that have no file yet."""
    candidates, usual, side = ROUNDS[name]
    for seed in range(seeds or usual):
        for candidate in candidates:
            for problem in problems_of(side):
                if only is None or problem.name == only:
                    run_cell(problem, candidate, seed, folder, out)


def run_cell(problem: Problem, candidate: Candidate, seed: int, folder: Path, out: Path) -> None:
    candidate = on(problem, candidate)
    file = out / problem.name / candidate.name / f"{seed}.json"
    if file.exists():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = cell(problem, candidate, seed, folder)
        except bmr.errors.PyroBMRError as error:
            found = {"error": str(error)}
    about = {"problem": problem.name, "candidate": asdict(candidate), "seed": seed}
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".part")
    written.write_text(json.dumps({**about, **versions(), **found}, indent=1))
    written.rename(file)
    best = found.get("scores", {}).get("1", {}).get("validation", found.get("error"))
    print(time.strftime("%H:%M:%S"), problem.name, candidate.name, seed, best, flush=True)


def cells(out: Path) -> pd.DataFrame:
    """A row per cell: problem, chooses, candidate, seed, and the scores on the rows of its side,
    validation for a problem that chooses and test for one that reports.
    """
    rows = []
    for file in sorted(out.glob("*/*/*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        if "error" in cell or cell["problem"] not in PROBLEMS:
            continue
        problem = PROBLEMS[cell["problem"]]
        candidate = Candidate(**cell["candidate"])
        about = {
            "problem": problem.name,
            "chooses": problem.chooses,
            # real targets have a temperature of their own, and share a candidate's row
            "candidate": replace(candidate, temperature=-1.0) if problem.real else candidate,
            "real": problem.real,
            "seed": cell["seed"],
            "kept": cell["kept"],
            "seconds": cell["processor_seconds"],
        }
        for widening, scores in cell["scores"].items():
            figures = scores["validation" if problem.chooses else "test"]
            rows.append({**about, "widening": widening, **figures})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/defaults"))
    parser.add_argument("--round", nargs="+", default=list(ROUNDS))
    parser.add_argument("--only", help="a problem")
    parser.add_argument("--seeds", type=int, help="in place of those of the round")
    arguments = parser.parse_args()
    for name in arguments.round:
        run(name, arguments.data, arguments.out, arguments.only, arguments.seeds)


if __name__ == "__main__":
    main()
