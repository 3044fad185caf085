"""The outputs of a study: results.csv, one row per finished cell; report.md and report.html, means
over seeds; pictures.

Owns `results`, `means`, `summary_of`, `failures_of` and `write_report`, and tables as text and on
the screen. Next: `study.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_bmr.experiments.conclusions import conclusions
from pyro_bmr.experiments.folder import Row, failure, finished_row, read_cell
from pyro_bmr.experiments.grid import Cell, Study
from pyro_bmr.experiments.lines import MARK, marks_of
from pyro_bmr.experiments.page import TEXT, Section, page
from pyro_bmr.experiments.pictures import KEYS, Picture, draw
from pyro_bmr.experiments.settings import ROUTES
from pyro_bmr.files import make_folder, write_atomically

if TYPE_CHECKING:
    import pandas as pd

_MEASURES = [
    *("accuracy", "rmse", "nll", "brier", "ece", "ece_mass", "crps", "coverage", "kept", "size"),
    *("kilobytes", "elbo", "delta_f", "seconds", "converged", "step_ratio"),
]
_NOT_AVERAGED = (
    *("seed", "cell", "temperature", "parameters", "kept_parameters"),
    *("nll_error", "base_accuracy", "base_rmse", "base_nll"),
)
_DIGITS = dict(seconds=1, step_ratio=2, kilobytes=1, elbo=0, delta_f=0, kept=4, size=4)


def results(declared: Study, folder: Path) -> pd.DataFrame:
    """One row per finished cell, in the order of the declaration: what it is, its options, its
    figures, and the name of its folder.
    """
    rows = {cell.slug: finished_row(folder / "cells" / cell.slug) for cell in declared.cells}
    return table_of(declared, {slug: row for slug, row in rows.items() if row is not None})


def table_of(declared: Study, rows: Mapping[str, Row]) -> pd.DataFrame:
    """The rows of cells, by the names of their folders, as one table."""
    import pandas as pd

    table = pd.DataFrame(
        [
            {**cell.about, **rows[cell.slug], "cell": cell.slug}
            for cell in declared.cells
            if cell.slug in rows
        ]
    )
    columns = dict.fromkeys(name for cell in declared.cells for name in cell.about)
    first = sorted((c for c in columns if c in table), key=lambda c: c.startswith("option_"))
    rest = [name for name in map(str, table) if name not in (*first, "cell")]
    return table[[*first, *rest, *(["cell"] if "cell" in table else [])]]


def means(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean and standard deviation over seeds (NaN for one), a row for each of what `KEYS` tells
    apart, of all measures there are.
    """
    keys = [key for key in KEYS if key in table]
    further = [
        name
        for name in map(str, table)
        if name not in (*keys, *_MEASURES, *_NOT_AVERAGED) and not name.startswith("option_")
    ]
    measures = [
        name for name in (*_MEASURES, *further) if name in table and table[name].notna().any()
    ]
    groups = table.groupby(keys, sort=False, dropna=False)
    mean, spread = groups[measures].mean().reset_index(), groups[measures].std().reset_index()
    place = len(keys)
    for made in (mean, spread):
        made.insert(place, "seeds", groups.size().to_numpy())
    return mean, spread


def as_text(
    mean: pd.DataFrame, spread: pd.DataFrame, marks: Mapping[str, Sequence[bool]]
) -> pd.DataFrame:
    """Both as one table of texts, 0.893 ± 0.002, with a mark behind some; the target fraction is
    called target, and of the fits that converged there is the number.
    """
    import pandas as pd

    columns = {}
    for name in map(str, mean):
        if name == "option_kept":
            columns["target"] = ["" if pd.isna(value) else f"{value:g}" for value in mean[name]]
        elif name in (*TEXT, "seeds"):
            columns[name] = [str(value) for value in mean[name]]
        elif name == "converged":
            columns[name] = [
                "" if math.isnan(part) else {0: "no", 1: "yes"}.get(part, f"{part:.0%} of seeds")
                for part in mean[name]
            ]
        else:
            marked = marks.get(name, [False] * len(mean))
            columns[name] = [
                mean_and_spread(name, m, s) + (MARK if mark else "")
                for m, s, mark in zip(mean[name], spread[name], marked, strict=True)
            ]
    return pd.DataFrame(columns)


def summary_of(table: pd.DataFrame, shown: Sequence[str] | None = None) -> pd.DataFrame:
    """The results of a study as a table of texts: mean ± standard deviation over seeds, a row per
    line of its tables; the columns `shown`, all by default. A figure with a * is no better than
    that of the base rates.
    """
    texts = as_text(*means(table), marks_of(table))
    return texts if shown is None else texts[[name for name in texts if name in shown]]


def printed(texts: pd.DataFrame) -> str:
    """A table of texts for the screen; figures stand below each other with and without a mark."""

    def aligned(column: pd.Series) -> pd.Series:
        marked = column.str.endswith(MARK)
        return column.where(marked, column + " " * len(MARK)) if marked.any() else column

    return texts.apply(aligned).to_string(index=False)


def mean_and_spread(measure: str, mean: float, spread: float) -> str:
    """``0.893 ± 0.002``, with the digits of the measure; without the spread where there is but one
    value.
    """
    digits = _DIGITS.get(measure, 3)
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    rows = [
        list(map(str, table.columns)),
        ["---"] * table.shape[1],
        *(list(map(str, row)) for row in table.itertuples(index=False)),
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_report(declared: Study, folder: Path, table: pd.DataFrame) -> None:
    """Writes results.csv, pictures, report.md and report.html of the finished cells; nothing while
    there are none.
    """
    if table.empty:
        return
    write_atomically(
        folder / "results.csv", lambda path: table.to_csv(path, index=False, na_rep="nan")
    )
    make_folder(folder / "pictures")
    if "route" in table:
        route = table["route"]
        named = table["prior"] + ", " + route
        table = table.assign(method=named.where(route.isin(ROUTES), route))
    mean, spread = means(table)
    pictures = draw(table, mean, spread, folder)
    if "route" in table:  # which the method is the same as, in one word
        table, mean, spread = (t.drop(columns="method") for t in (table, mean, spread))
    for old in (folder / "pictures").glob("*.png"):
        if old.name not in {picture.file for picture in pictures}:
            old.unlink()
    failures = failures_of(declared.cells, folder)
    state = _state(declared, table, failures)
    said = {}
    for (model, data), rows in table.groupby(["model", "data"], sort=False):
        place = str(model), str(data)
        sentences = conclusions(rows, failed_lines(declared, failures, place))
        said[place] = [*sentences, *declared.remarks]
    texts = as_text(mean, spread, marks_of(table))
    made_with = list(dict.fromkeys(_versions(folder / "cells" / name) for name in table["cell"]))
    notes = {"Note": declared.note, "Declaration": declared.text, "Command": declared.command}
    notes = {name: text for name, text in notes.items() if text}
    notes["Made with"] = "\n".join(made_with)
    for name, text in {
        "report.md": _report(declared, state, texts, said, pictures, failures, made_with),
        "report.html": _page(declared, state, texts, mean, said, pictures, failures, notes, folder),
    }.items():
        write_atomically(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))


def failures_of(cells: Sequence[Cell], folder: Path) -> dict[str, str]:
    """Cell → its error in one line, for those that failed; a cell of another's size cannot run if
    the other failed.
    """
    found = {}
    for cell in cells:
        line = failure(folder / "cells" / cell.slug)
        if cell.size_of and failure(folder / "cells" / cell.size_of) is not None:
            line = f"its size is that of {cell.size_of}, which failed"
        if line is not None:
            found[cell.slug] = line
    return found


def failed_lines(
    declared: Study, failures: Mapping[str, str], place: tuple[str, str] | None = None
) -> list[str]:
    """The cells that failed, in the words of a table; of one model and data set, or all."""
    return [
        f"{cell.label} (seed {cell.seed})"
        for cell in declared.cells
        if cell.slug in failures and place in (None, (cell.about["model"], cell.about["data"]))
    ]


def _state(declared: Study, table: pd.DataFrame, failures: Mapping[str, str]) -> str:
    """How far the study is."""
    seeds = table["seed"].nunique()
    state = f"{len(table)} of {len(declared.cells)} cells finished, {len(failures)} failed;"
    state += f" {seeds} seeds, mean ± standard deviation." if seeds > 1 else " one seed."
    if table["parameters"].nunique() == 1:
        state += f" {int(table['parameters'].iloc[0]):,} parameters."
    return state


def _report(
    declared: Study,
    state: str,
    texts: pd.DataFrame,
    said: Mapping[tuple[str, str], Sequence[str]],
    pictures: Sequence[Picture],
    failures: Mapping[str, str],
    made_with: Sequence[str],
) -> str:
    lines = [f"# {declared.name}", "", state, ""]
    lines += [declared.note, ""] if declared.note else []
    for place, part in texts.groupby(["model", "data"], sort=False):
        columns = [
            name
            for name in part
            if name not in ("model", "data") and (declared.shown is None or name in declared.shown)
        ]
        lines += [f"## {place[0]} on {place[1]}", "", markdown(part[columns]), ""]
        lines += [*(f"- {sentence}" for sentence in said[str(place[0]), str(place[1])]), ""]
        lines += [
            f"![{picture.caption}](pictures/{picture.file})\n"
            for picture in pictures
            if picture.place == place
        ]
    if failures:
        lines += ["## Failed", "", *(f"- `{name}`: {line}" for name, line in failures.items()), ""]
    lines += ["## Declaration", ""]
    lines += [f"In this folder: `{declared.command}`", ""] if declared.command else []
    lines += [f"```{Path(declared.file).suffix[1:]}", declared.text.rstrip(), "```", ""]
    return "\n".join([*lines, "Made with " + "; ".join(made_with) + ".", ""])


def _page(
    declared: Study,
    state: str,
    texts: pd.DataFrame,
    mean: pd.DataFrame,
    said: Mapping[tuple[str, str], Sequence[str]],
    pictures: Sequence[Picture],
    failures: Mapping[str, str],
    notes: Mapping[str, str],
    folder: Path,
) -> str:
    sections = [
        Section(
            f"{model} on {data}",
            said[model, data],
            [
                (p.caption, (folder / "pictures" / p.file).read_bytes())
                for p in pictures
                if p.place == (model, data)
            ],
        )
        for model, data in mean[["model", "data"]].drop_duplicates().itertuples(index=False)
    ]
    return page(declared.name, state, texts, mean, sections, failures, notes)


def _versions(folder: Path) -> str:
    return ", ".join(
        f"{name} {value}"
        for name, value in read_cell(folder / "settings.json").get("versions", {}).items()
    )
