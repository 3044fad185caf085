"""Which prior, optimiser, temperature, length of a fit and schedule of reductions lose least over
problems that lie apart: `python benchmarks/defaults.py --data FOLDER --out results/defaults` fits
what is missing, and writes the table of docs/results/defaults.md.

`parts/trials/problems.py` has the problems, and says where their tables come from. A cell is a
problem, a candidate and a seed, one file in `--out`. Its scores on validation rows choose, on half
of the problems. Its scores on test rows are only reported, on the other half. Regret is the log
score of the best candidate of a problem minus that of the candidate, in nats per row.

`--round NAME` fits the candidates of one round only, `--page` writes the page from what there is.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from parts.pages import fill
from parts.trials.cell import PLAIN, Candidate, cell, on
from parts.trials.problems import PROBLEMS, Problem
from parts.trials.regret import regret_table, run_table, score_table

import pyro_bmr as bmr
from pyro_bmr.experiments.folder import versions

PAGE = Path(__file__).parents[1] / "docs" / "results" / "defaults.md"

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


def candidates_of(out: Path) -> list[Candidate]:
    """The candidates that were run, those for real targets apart."""
    found = {}
    for file in sorted(out.glob("*/*/*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        if cell["problem"] in PROBLEMS and not PROBLEMS[cell["problem"]].real:
            found[file.parent.name] = Candidate(**cell["candidate"])
    return list(found.values())


def write_page(out: Path) -> None:
    """Fills the tables of the page."""
    candidates, over = candidates_of(out), PLAIN
    shown = [
        ("plain network", PLAIN),
        *(
            (f"{prior}, T = {t}", replace(_TEN, prior=prior, temperature=t))
            for prior in ("gaussian:layer", "gaussian")
            for t in (0.3, 0.1)
        ),
    ]
    for side in ("choosing", "reporting"):
        problems = problems_of(side)
        fill(PAGE, regret_table(candidates, problems, out, over), f"regrets, {side}")
        fill(PAGE, score_table(shown, problems, out), f"scores, {side}")
    fill(PAGE, run_table(PROBLEMS["digits"], out), "digits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/defaults"))
    parser.add_argument("--round", nargs="*", default=list(ROUNDS), choices=list(ROUNDS))
    parser.add_argument("--only", help="a problem")
    parser.add_argument("--seeds", type=int, help="in place of those of the round")
    parser.add_argument("--page", action="store_true", help="fit nothing, only write the page")
    arguments = parser.parse_args()
    for name in () if arguments.page else arguments.round:
        run(name, arguments.data, arguments.out, arguments.only, arguments.seeds)
    if arguments.page or not arguments.only:
        write_page(arguments.out)


if __name__ == "__main__":
    main()
