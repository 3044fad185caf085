"""The outputs of a study: results.csv, one row per finished cell; report.md and report.html, means
over seeds; pictures.

Owns `results`, `means` and `write_report`. Next: `study.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyro_bmr.experiments.cell_folder import failure, finished_row, read_cell
from pyro_bmr.experiments.declaration import Study
from pyro_bmr.experiments.page import Section, page
from pyro_bmr.experiments.pictures import KEYS, draw
from pyro_bmr.experiments.results_folder import markdown, mean_and_spread
from pyro_bmr.files import make_folder, write_atomically

if TYPE_CHECKING:
    import pandas as pd

_MEASURES = (
    "accuracy",
    "rmse",
    "nll",
    "brier",
    "ece",
    "ece_mass",
    "kept",
    "size",
    "kilobytes",
    "elbo",
    "delta_f",
    "seconds",
    "step_ratio",
)
_NOT_AVERAGED = ("seed", "cell", "parameters", "kept_parameters")


def results(declared: Study, folder: Path) -> pd.DataFrame:
    """One row per finished cell, in the order of the declaration: what it is, its options, its
    figures, and the name of its folder.
    """
    import pandas as pd

    rows = []
    for cell in declared.cells:
        row = finished_row(folder / "cells" / cell.slug)
        if row is not None:
            data = cell.data if cell.validation is None else f"{cell.data} (validation)"
            about = {"model": cell.model, "data": data, "method": cell.label, "seed": cell.seed}
            rows.append(
                {
                    **about,
                    **{f"option_{name}": value for name, value in cell.options.items()},
                    **row,
                    "cell": cell.slug,
                }
            )
    table = pd.DataFrame(rows)
    order = sorted(map(str, table), key=lambda name: not name.startswith("option_"))
    first = [name for name in ("model", "data", "method", "seed") if name in table]
    return table[
        [
            *first,
            *(name for name in order if name not in (*first, "cell")),
            *(name for name in order if name == "cell"),
        ]
    ]


def means(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean and standard deviation over seeds (NaN for one), a row per model, data, method and
    target fraction `option_kept`, of all measures there are.
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


def as_text(mean: pd.DataFrame, spread: pd.DataFrame) -> pd.DataFrame:
    """Both as one table of texts, 0.893 ± 0.002; the target fraction is called target."""
    import pandas as pd

    columns = {}
    for name in map(str, mean):
        if name == "option_kept":
            columns["target"] = ["" if pd.isna(value) else f"{value:g}" for value in mean[name]]
        elif name in ("model", "data", "method", "seeds"):
            columns[name] = [str(value) for value in mean[name]]
        else:
            columns[name] = [
                mean_and_spread(name, m, s) for m, s in zip(mean[name], spread[name], strict=True)
            ]
    return pd.DataFrame(columns)


def summary_of(table: pd.DataFrame) -> pd.DataFrame:
    """The results of a study as a table of texts: mean ± standard deviation over seeds, a row per
    model, data, method and target.
    """
    return as_text(*means(table))


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
    mean, spread = means(table)
    pictures = draw(table, mean, spread, folder)
    for old in (folder / "pictures").glob("*.png"):
        if old.name not in {picture.file for picture in pictures}:
            old.unlink()
    texts = as_text(mean, spread)
    failures = {
        cell.slug: line
        for cell in declared.cells
        if (line := failure(folder / "cells" / cell.slug)) is not None
    }
    made_with = list(dict.fromkeys(_versions(folder / "cells" / name) for name in table["cell"]))
    command = f"pyro-bmr study study{declared.suffix} --out ."
    state = (
        f"{len(table)} of {len(declared.cells)} cells finished, {len(failures)} failed;"
        f" {table['seed'].nunique()} seeds, mean ± standard deviation."
    )
    lines = [f"# {declared.name}", "", state, ""]
    for (model, data), part in texts.groupby(["model", "data"], sort=False):
        lines += [f"## {model} on {data}", "", markdown(part.drop(columns=["model", "data"])), ""]
        lines += [
            f"![{picture.caption}](pictures/{picture.file})\n"
            for picture in pictures
            if picture.place == (model, data)
        ]
    if failures:
        lines += ["## Failed", "", *(f"- `{name}`: {line}" for name, line in failures.items()), ""]
    lines += [
        "## Declaration",
        "",
        f"In this folder: `{command}`",
        "",
        f"```{declared.suffix[1:]}",
        declared.text.rstrip(),
        "```",
        "",
    ]
    lines += ["Made with " + "; ".join(made_with) + ".", ""]
    write_atomically(
        folder / "report.md", lambda path: path.write_text("\n".join(lines), encoding="utf-8")
    )
    sections = [
        Section(
            f"{model} on {data}",
            [
                (p.caption, (folder / "pictures" / p.file).read_bytes())
                for p in pictures
                if p.place == (model, data)
            ],
        )
        for model, data in texts[["model", "data"]].drop_duplicates().itertuples(index=False)
    ]
    html = page(
        declared.name,
        state,
        texts,
        mean,
        sections,
        failures,
        {"Declaration": declared.text, "Command": command, "Made with": "\n".join(made_with)},
    )
    write_atomically(folder / "report.html", lambda path: path.write_text(html, encoding="utf-8"))


def _versions(folder: Path) -> str:
    return ", ".join(
        f"{name} {value}"
        for name, value in read_cell(folder / "config.json").get("versions", {}).items()
    )
