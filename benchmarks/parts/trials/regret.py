"""What the cells of `benchmarks/defaults.py` say: regrets, and the tables of its page.

A candidate is compared on the seeds that it was run with. Regret is relative to the best candidate
of a problem, each measured by its gain over one candidate that was run everywhere, seed by seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from parts.pages import table
from parts.trials.cell import Candidate, on
from parts.trials.cells_file import Line, Scores
from parts.trials.problems import Problem

_FEWEST = 3  # problems, for a line of the table of regrets
Cells = dict[str, dict[int, Scores]]
"""Candidate → seed → scores, kept and seconds."""


def cells_of(problem: Problem, lines: Iterable[Line]) -> Cells:
    """Scores on validation rows of a problem that chooses, on test rows of one that reports. The
    fitted route has a second line, with the best widening.
    """
    rows = "validation" if problem.chooses else "test"
    found: Cells = {}
    for line in lines:
        if line.problem != problem.name:
            continue
        name = line.candidate.name + ("" if line.widening == 1 else ", widened")
        more = {"kept": line.figures["kept"], "seconds": line.figures["processor_seconds"]}
        found.setdefault(name, {})[line.seed] = {**line.scores[rows], **more}
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
    candidate: Candidate,
    problems: Iterable[Problem],
    cells: Sequence[Line],
    over: Candidate,
    measure: str,
) -> dict[str, float]:
    """Problem → regret, for the problems on which the candidate was run."""
    found = {}
    for problem in problems:
        gained = gains(cells_of(problem, cells), on(problem, over).name, measure)
        name = on(problem, candidate).name
        if name in gained:
            found[problem.name] = max(gained.values()) - gained[name]
    return found


def regret_table(
    candidates: Sequence[Candidate],
    problems: Sequence[Problem],
    cells: Sequence[Line],
    over: Candidate,
) -> list[str]:
    """A line per candidate that was run on a few problems: its regrets on these."""
    lines = []
    for candidate in candidates:
        lost = regrets(candidate, problems, cells, over, "log_score")
        missed = regrets(candidate, problems, cells, over, "accuracy")
        if len(lost) < _FEWEST:
            continue
        worst = max(lost, key=lambda name: lost[name])
        runs = [
            run
            for problem in problems
            for run in cells_of(problem, cells).get(on(problem, candidate).name, {}).values()
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
