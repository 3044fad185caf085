"""What the cells of `benchmarks/defaults.py` say: regrets, and the tables of its page.

A candidate is compared on the seeds that it was run with. Regret is relative to the best candidate
of a problem, each measured by its gain over one candidate that was run everywhere, seed by seed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from parts.pages import table
from parts.trials.cell import Candidate, on
from parts.trials.problems import Problem

_FEWEST = 3  # problems, for a line of the table of regrets
Scores = dict[str, float]
Cells = dict[str, dict[int, Scores]]
"""Candidate → seed → scores, kept and seconds."""


def cells_of(problem: Problem, out: Path) -> Cells:
    """Scores on validation rows of a problem that chooses, on test rows of one that reports. The
    fitted route has a second line, with the best widening.
    """
    rows = "validation" if problem.chooses else "test"
    found: Cells = {}
    for file in sorted((out / problem.name).glob("*/*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        for widening, scores in cell.get("scores", {}).items():
            if widening not in ("1", "best"):
                continue
            name = file.parent.name + ("" if widening == "1" else ", widened")
            more = {"kept": cell["kept"], "seconds": cell["processor_seconds"]}
            found.setdefault(name, {})[cell["seed"]] = {**scores[rows], **more}
    return found


def gains(cells: Cells, over: str, measure: str) -> dict[str, float]:
    """Candidate → mean over its seeds of its measure minus that of the candidate `over`."""
    base = {seed: cell[measure] for seed, cell in cells.get(over, {}).items() if measure in cell}
    gained = {}
    for name, runs in cells.items():
        paired = [run[measure] - base[s] for s, run in runs.items() if s in base]
        if paired:
            gained[name] = statistics.mean(paired)
    return gained


def regrets(
    candidate: Candidate, problems: Iterable[Problem], out: Path, over: Candidate, measure: str
) -> dict[str, float]:
    """Problem → regret, for the problems on which the candidate was run."""
    found = {}
    for problem in problems:
        gained = gains(cells_of(problem, out), on(problem, over).name, measure)
        name = on(problem, candidate).name
        if name in gained:
            found[problem.name] = max(gained.values()) - gained[name]
    return found


def regret_table(
    candidates: Sequence[Candidate], problems: Sequence[Problem], out: Path, over: Candidate
) -> list[str]:
    """A line per candidate that was run on a few problems: its regrets on these."""
    lines = []
    for candidate in candidates:
        lost = regrets(candidate, problems, out, over, "log_score")
        missed = regrets(candidate, problems, out, over, "accuracy")
        if len(lost) < _FEWEST:
            continue
        worst = max(lost, key=lambda name: lost[name])
        runs = [
            run
            for problem in problems
            for run in cells_of(problem, out).get(on(problem, candidate).name, {}).values()
        ]
        lines.append(
            [
                candidate.name,
                str(len(lost)),
                f"{statistics.mean(lost.values()):.3f}",
                f"{lost[worst]:.3f} ({worst})",
                f"{100 * statistics.mean(missed.values()):.1f}" if missed else "",
                f"{100 * statistics.median(run['kept'] for run in runs):.1f} %",
                f"{statistics.median(run['seconds'] for run in runs):.0f}",
            ]
        )
    lines.sort(key=lambda line: (-int(line[1]), float(line[2])))
    columns = ("candidate", "problems", "mean regret", "largest", "accuracy lost", "kept", "s")
    return table(columns, lines)


def score_table(
    candidates: Sequence[tuple[str, Candidate]], problems: Sequence[Problem], out: Path
) -> list[str]:
    """A line per problem: accuracy or rmse / log score / % kept of each candidate."""
    lines = []
    for problem in problems:
        cells = cells_of(problem, out)
        line = [problem.name]
        for _, candidate in candidates:
            runs = list(cells.get(on(problem, candidate).name, {}).values())
            line.append(_figures(runs) if runs else "")
        lines.append(line)
    return table(("problem", *(words for words, _ in candidates)), lines)


def _figures(runs: Sequence[Scores]) -> str:
    first = "rmse" if "rmse" in runs[0] else "accuracy"
    means = {k: statistics.mean(run[k] for run in runs) for k in (first, "log_score", "kept")}
    return f"{means[first]:.3f} / {means['log_score']:.3f} / {100 * means['kept']:.1f}"


def run_table(problem: Problem, out: Path) -> list[str]:
    """A line per candidate of one problem with classes."""
    lines = []
    for name, cells in cells_of(problem, out).items():
        runs = list(cells.values())
        keys = ("accuracy", "log_score", "ece", "kept", "seconds")
        mean = {k: statistics.mean(run[k] for run in runs) for k in keys}
        figures = [f"{mean['accuracy']:.3f}", f"{-mean['log_score']:.3f}", f"{mean['ece']:.3f}"]
        more = [f"{100 * mean['kept']:.1f} %", f"{mean['seconds']:.0f}", str(len(runs))]
        lines.append([name, *figures, *more])
    lines.sort(key=lambda line: float(line[2]))
    return table(("candidate", "accuracy", "nll", "ece", "kept", "s", "seeds"), lines)
