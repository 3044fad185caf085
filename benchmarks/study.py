"""The comparative study: runs what is not finished of `benchmarks/study_*.toml`, and fills the
tables of docs/results/study.md.

    python benchmarks/study.py --jobs 2
    python benchmarks/study.py --only mlp lenet       # some of them
    python benchmarks/study.py --fill                 # no run, the tables of what is finished
    python benchmarks/study.py --anew --jobs 2        # the cells of docs/results/study as well

The tables of regression want `results/regression-data`, which `regression_tables.py` makes, that of
MNIST `results/mnist-moved.npz`, which `moved_mnist.py` makes. What is finished is in results/study,
its figures and the commit of each fit in docs/results/study, a row per cell; a cell of either is
not run again.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd

import pyro_bmr as bmr
from pyro_bmr.experiments.declaration import declare
from pyro_bmr.experiments.folder import read_cell
from pyro_bmr.experiments.grid import Study
from pyro_bmr.experiments.report import mean_and_spread, results

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.pages import fill, table

PAGE = Path("docs/results/study.md")
CELLS = Path("docs/results/study")
ROOT = Path("results/study")
BESIDE_THE_PAPER = ("accuracy", "nll", "ece", "ece_mass", "kept", "size", "seconds", "step_ratio")
COLUMNS = {
    "": ("accuracy", "nll", "brier", "ece", "kept", "size", "seconds", "step_ratio"),
    **dict.fromkeys(("paper_mlp", "paper_lenet", "transformers"), BESIDE_THE_PAPER),
    "transformers_wide": BESIDE_THE_PAPER[:-1],  # its cells ran beside others
    "regression": ("rmse", "nll", "kept", "elbo", "seconds", "step_ratio"),
}
"""Study → the columns of its table; "" for all others. Those of shift are added where a study has
them.
"""
SHIFTED = (
    "shift_nll_1",
    "shift_nll_3",
    "shift_nll_5",
    "shift_ece_1",
    "shift_ece_3",
    "shift_ece_5",
    "ood_auroc",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = {
        path.stem.removeprefix("study_"): path
        for path in sorted(Path("benchmarks").glob("study_*.toml"))
    }
    parser.add_argument("--only", nargs="+", choices=found, default=list(found))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--fill", action="store_true", help="run nothing")
    parser.add_argument(
        "--anew", action="store_true", help="run what is in docs/results/study, too"
    )
    arguments = parser.parse_args()
    for name in arguments.only:
        declared = declare(found[name])
        before = pd.DataFrame({"cell": []}) if arguments.anew else cells_of_the_page(name)
        left = replace(
            declared,
            cells=tuple(cell for cell in declared.cells if cell.slug not in set(before["cell"])),
        )
        if not arguments.fill and left.cells:
            bmr.study(left, ROOT / name, jobs=arguments.jobs)
        rows = with_those_before(declared, before, results(left, ROOT / name), ROOT / name)
        if not rows.empty:
            rows.to_csv(CELLS / f"{name}.csv", index=False, float_format="%.7g")
            write_table(name, rows, len(declared.cells))


def cells_of_the_page(name: str) -> pd.DataFrame:
    """The rows of a study in docs/results/study, with the commit of each."""
    path = CELLS / f"{name}.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame({"cell": []})


def with_those_before(
    declared: Study, before: pd.DataFrame, new: pd.DataFrame, folder: Path
) -> pd.DataFrame:
    """All rows, in the order of the declaration and with its labels; those of cells that are not
    declared any more go.
    """
    if not new.empty:
        new = new.assign(
            commit=[
                read_cell(folder / "cells" / cell / "settings.json")["versions"].get("commit", "?")
                for cell in new["cell"]
            ]
        )
    labels = {cell.slug: cell.label for cell in declared.cells}
    parts = [part for part in (before, new) if not part.empty]
    if not parts:
        return new
    table = pd.concat(parts, ignore_index=True)
    table = table[table["cell"].isin(labels)].sort_values(
        "cell", key=lambda cells: cells.map(list(labels).index), ignore_index=True
    )
    return table.assign(method=table["cell"].map(labels))


def write_table(name: str, results: pd.DataFrame, cells: int) -> None:
    """Puts the means of a study between its marks on the page."""
    results["data"] = [table_of(str(data)) for data in results["data"]]
    keys = [key for key in ("model", "data", "method", "option_kept") if key in results]
    columns = [
        column
        for column in (*COLUMNS.get(name, COLUMNS[""]), *SHIFTED)
        if column in results and results[column].notna().any()
    ]
    shown = [key for key in keys if key in ("method", "option_kept") or results[key].nunique() > 1]
    names = {"option_kept": "target"}
    rows = []
    for key, group in results.groupby(keys, sort=False, dropna=False):
        place = dict(zip(keys, key, strict=True))
        spreads = [mean_and_spread(c, group[c].mean(), group[c].std()) for c in columns]
        rows.append([*(_word(place[k]) for k in shown), str(len(group)), *spreads])
    lines = table([*(names.get(key, key) for key in shown), "fits", *columns], rows)
    commits = ", ".join(sorted(set(results["commit"])))
    command = f"pyro-bmr study benchmarks/study_{name}.toml --out {ROOT / name}"
    note = (
        f"`{command}`, {len(results)} of {cells} cells, commit {commits}; [each"
        f" cell](study/{name}.csv)."
    )
    fill(PAGE, [*lines, "", note], name)


def _word(value: str | float) -> str:
    """A string as it is, a number in short, "" for NaN."""
    return value if isinstance(value, str) else "" if math.isnan(value) else f"{value:g}"


def table_of(data: str) -> str:
    """The table that a file is a split of, results/regression-data/concrete-0.npz of concrete;
    other data as they are called.
    """
    return Path(data).stem.rsplit("-", 1)[0] if data.endswith(".npz") else data


if __name__ == "__main__":
    main()
