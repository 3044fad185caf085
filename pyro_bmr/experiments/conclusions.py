"""What the table of a study says, in sentences: which row is first in log score, what the reduction
cost, how the baseline of the same size does, what has not converged, and what is no better than
the base rates.

Owns `conclusions`. Next: `page.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pyro_bmr.experiments.lines import SIGNS, Line, lines_of, no_better, percent

if TYPE_CHECKING:
    import pandas as pd

_NAMES = {"accuracy": "accuracy", "rmse": "RMSE", "nll": "NLL", "ece": "ECE"}
_MOST = 3  # names in a sentence; more are counted


def conclusions(table: pd.DataFrame, failed: Sequence[str] = ()) -> list[str]:
    r"""The sentences about a table of one row per cell, of one model and data set.

    Args:
        table: as `compare` returns it, or as results.csv has it.
        failed: the names of cells that failed.

    Example:
        >>> print("\n".join(conclusions(pd.read_csv("results/digits/results.csv"))))
    """
    lines = lines_of(table)
    said = [_first(lines), _cost(lines), _beside_magnitude(lines), _unconverged(lines)]
    said += [_at_base_rates(lines), _missing(failed)]
    return [sentence for sentence in said if sentence]


def _first(lines: Sequence[Line]) -> str:
    """Which row has the least NLL, and which are level with it."""
    ranked = sorted((line for line in lines if line.finite("nll")), key=lambda a: a.mean("nll"))
    if not ranked:
        return ""
    least = ranked[0].mean("nll")
    first = [line for line in ranked if line.mean("nll") == least]
    rest = ranked[len(first) :]
    error = first[0].error()
    known = "" if math.isnan(error) else f" ± {error:.3f}"
    names = _listed([line.name for line in first])
    text = f"In log score {names} {'are' if len(first) > 1 else 'is'} first, with an NLL of"
    text += f" {least:.3f}{known} nats per row ({_about_error(first[0])})"
    if not rest:
        return f"{text}."
    if not known:
        return f"{text}; next is {rest[0].name} with {rest[0].mean('nll'):.3f}."
    level = [
        line for line in rest if line.mean("nll") - least <= math.hypot(error, _known(line.error()))
    ]
    if not level:
        return f"{text}; no other row is level with it within the error of the difference."
    return f"{text}; within the error of the difference, {_level(level)} level with it."


def _level(level: Sequence[Line]) -> str:
    """The rows, by name or by number, with their verb."""
    if len(level) <= _MOST:
        return f"{_listed([line.name for line in level])} {'are' if len(level) > 1 else 'is'}"
    least = min(level, key=lambda line: line.mean("kept"))
    size = percent(least.mean("kept"))
    return f"{len(level)} other rows (the sparsest is {least.name}, with {size} kept) are"


def _about_error(line: Line) -> str:
    """What the error of a row is made of."""
    rows = not math.isnan(line.mean("nll_error"))
    if line.seeds > 1:
        return f"{line.seeds} seeds; standard error of seeds{' and scored rows' if rows else ''}"
    return "one seed; standard error of the scored rows alone" if rows else "one seed, no error"


def _cost(lines: Sequence[Line]) -> str:
    """How each reduced row differs from the fitted row of its prior, over the seeds of both."""
    fitted = {a.about["prior"]: a for a in lines if a.about.get("route") == "fitted"}
    clauses = []
    for after in lines:
        before = fitted.get(after.about.get("prior"))
        if after.about.get("route") != "reduced" or before is None:
            continue
        if seeds := set(after.figures["nll"]) & set(before.figures["nll"]):
            clauses.append(_difference(before, after, seeds))
    return f"Beside the fitted row of its prior, {'; '.join(clauses)}." if clauses else ""


def _difference(before: Line, after: Line, seeds: Iterable[int]) -> str:
    """What a reduced row keeps, and the changes of its scores."""
    old, new = (line.over(seeds) for line in (before, after))
    changes = [
        f"{new.mean(figure) - old.mean(figure):+.3f}".replace("-", "−") + f" in {name}"
        for figure, name in _NAMES.items()
        if not math.isnan(new.mean(figure) - old.mean(figure))
    ]
    sizes = f"{percent(new.mean('kept'))} instead of {percent(old.mean('kept'))}"
    return f"{after.name} keeps {sizes}, with {_listed(changes, len(changes))}"


def _beside_magnitude(lines: Sequence[Line]) -> str:
    """Magnitude pruning beside the reduced row whose size it has."""
    pruned = [line for line in lines if line.about.get("route") == "magnitude"]
    reduced = _of_size(lines, pruned[0]) if pruned else None
    if reduced is None:
        return ""
    score = "accuracy" if "accuracy" in reduced.figures else "rmse"
    two = pruned[0], reduced
    figures = [
        f"{_NAMES[score]} {_digits(line.mean(score))} and NLL {_digits(line.mean('nll'))}"
        for line in two
    ]
    error = math.hypot(*(_known(line.error()) for line in two))
    gap = pruned[0].mean("nll") - reduced.mean("nll")
    verdict = "better" if gap > 0 else "worse"
    if abs(gap) <= error:
        verdict = "level within error"
    return (
        f"At the same size, {percent(reduced.mean('kept'))} of the parameters, magnitude pruning"
        f" has {figures[0]}, {reduced.name} {figures[1]}: in log score the reduction is {verdict}."
    )


def _of_size(lines: Sequence[Line], pruned: Line) -> Line | None:
    """The reduced row of that size, over the same seeds; weights may be 0 by chance, too."""
    sizes = pruned.figures["kept"]
    whole = [
        line.over(sizes)
        for line in lines
        if line.about.get("route") == "reduced" and set(sizes) <= set(line.figures["kept"])
    ]

    def apart(line: Line) -> float:
        own = line.figures["kept"]
        return sum(abs(own[seed] - size) for seed, size in sizes.items())

    nearest = min(whole, key=apart, default=None)
    return nearest if nearest and apart(nearest) <= 0.02 * sum(sizes.values()) else None


def _unconverged(lines: Sequence[Line]) -> str:
    """Which fits did not converge, among those that were judged."""
    judged = [line for line in lines if not math.isnan(line.mean("converged"))]
    if not judged:
        return ""
    short = [line for line in judged if line.mean("converged") < 1]
    if not short:
        return "All fits converged."
    if all(line.mean("converged") == 0 for line in judged):
        return "No fit converged; the figures may still change with a longer fit."
    names = [
        f"{line.name} ({sum(v == 0 for v in values)} of {len(values)}"
        f" seed{'s' if len(values) > 1 else ''})"
        for line in short
        for values in [[v for v in line.figures["converged"].values() if not math.isnan(v)]]
    ]
    return (
        f"Not converged: {_listed(names, len(names))}; their figures may still change with a"
        " longer fit."
    )


def _at_base_rates(lines: Sequence[Line]) -> str:
    """The rows that are marked."""
    scores = [name for name in SIGNS if any(name in line.figures for line in lines)]
    marked = [
        line
        for line in lines
        if any(no_better(line, name) for name in scores if name in line.figures)
    ]
    if not marked:
        return ""
    bases = ", ".join(
        f"{_NAMES[name]} {_digits(marked[0].mean(f'base_{name}'))}"
        for name in scores
        if not math.isnan(marked[0].mean(f"base_{name}"))
    )
    names = _listed([line.name for line in marked], len(marked))
    return f"Marked with *: {names}, no better than a prediction that ignores the inputs ({bases})."


def _missing(failed: Sequence[str]) -> str:
    """What failed."""
    return f"Failed, and in no figure: {_listed(failed)}." if failed else ""


def _listed(names: Sequence[str], most: int = _MOST) -> str:
    """`a, b and c`; of more than `most` names, the first and how many more there are."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _digits(value: float) -> str:
    return f"{value:.3f}"


def _known(error: float) -> float:
    return 0.0 if math.isnan(error) else error
