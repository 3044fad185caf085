"""The cells of `benchmarks/defaults.py` in one small file of the repository: a line per cell, and
another where its variances were widened.

Next: `regret.py`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from parts.trials.cell import Candidate

Scores = dict[str, float]
_SPLITS, _SCORES = ("validation", "test"), ("log_score", "accuracy", "ece", "rmse")
_FIGURES = ("kept", "steps_taken", "processor_seconds")
_OF_CANDIDATE = tuple(field.name for field in fields(Candidate))
_COLUMNS = (
    *("problem", "seed", "widening", "commit"),
    *_OF_CANDIDATE,
    *(f"{split}_{score}" for split in _SPLITS for score in _SCORES),
    *_FIGURES,
)


@dataclass(frozen=True)
class Line:
    """A cell: what was fitted, its scores by split, and what it took. `widening`: the factor on its
    variances.
    """

    problem: str
    candidate: Candidate
    seed: int
    widening: float
    scores: Mapping[str, Scores]
    figures: Scores


def read_cells(file: Path) -> list[Line]:
    """The cells in the file, none if it is not there."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as opened:
        return [_line(row) for row in csv.DictReader(opened)]


def add_cell(
    file: Path, problem: str, candidate: Candidate, seed: int, found: Mapping[str, Any], commit: str
) -> None:
    """Writes what `cell` found as lines of the file."""
    figures = {
        "kept": found["kept"],
        "steps_taken": found["steps"],
        "processor_seconds": found["processor_seconds"],
    }
    lines = []
    for widening, scores in found["scores"].items():
        factor = found["widening"] if widening == "best" else 1
        about = {"problem": problem, "seed": seed, "widening": factor, "commit": commit}
        named = {f"{s}_{k}": v for s in _SPLITS for k, v in scores[s].items()}
        lines.append({**about, **vars(candidate), **named, **figures})
    is_new = not file.exists()
    with file.open("a", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, _COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({k: _in_words(v) for k, v in line.items()} for line in lines)


def has_cell(lines: Iterable[Line], problem: str, candidate: Candidate, seed: int) -> bool:
    """Whether that cell was run."""
    return (problem, candidate, seed) in {(x.problem, x.candidate, x.seed) for x in lines}


def _in_words(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _line(row: Mapping[str, str]) -> Line:
    given = {field.name: _value(row[field.name], str(field.type)) for field in fields(Candidate)}
    scores = {
        split: {k: float(row[f"{split}_{k}"]) for k in _SCORES if row[f"{split}_{k}"]}
        for split in _SPLITS
    }
    figures = {name: float(row[name]) for name in _FIGURES}
    candidate = Candidate(**given)
    widening = float(row["widening"])
    return Line(row["problem"], candidate, int(row["seed"]), widening, scores, figures)


def _value(text: str, kind: str) -> Any:
    """A field of a candidate, of the type that is written there."""
    if not text:
        return None
    return text if kind == "str" else int(text) if kind.startswith("int") else float(text)
