"""`study`: runs what is not finished of a declared grid, in parallel, and writes the report. The
only file that starts processes.

joblib carries cells, which are plain values, between the processes of this user; no file is
unpickled. Next: `runs.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pyro_bmr.errors import ModelError, PyroBMRError, described
from pyro_bmr.experiments.cell_folder import failure, finished_row, run_cell
from pyro_bmr.experiments.declaration import Cell, Study, declare
from pyro_bmr.experiments.report import results, write_report
from pyro_bmr.files import locked, make_folder, write_atomically

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class StudyResults:
    """What is there after a run: `table`, one row per finished cell; `failures`, cell → its error
    in one line; `folder`.
    """

    table: pd.DataFrame
    failures: Mapping[str, str]
    folder: Path


def study(
    declaration: str | Path | Mapping[str, Any] | Study,
    out: str | Path,
    *,
    jobs: int | None = None,
    only: Collection[str] = (),
    seeds: int | None = None,
    validation: float | None = None,
    progress: bool = True,
) -> StudyResults:
    """Runs the cells of a declared study that are not finished, and writes results.csv, report.md,
    report.html and pictures to `out`.

    A cell is a model, a data set, a method with its options, and a seed. It is trained with one
    thread in a process of its own and kept in ``out/cells``; a finished one is not run again, one
    that failed is. Cells do not depend on each other nor on `jobs`: the same numbers come out.

    Args:
        declaration: a TOML file or a mapping of its shape (docs/studies.md), or what `declare` made
            of one.
        jobs: processes; None for those of an enclosing `joblib.parallel_config`, whose backend
            (Dask, Ray, …) is used, or else one.
        only: names of methods; others are not run, but what is finished of them is reported.
        seeds, validation: in the place of those of the declaration; `validation` scores that
            fraction of the training rows instead of the test rows.

    Raises:
        PyroBMRError: something in the declaration is wrong, with file and key, and nothing was run;
            or `out` cannot be written, or is in use by another process.

    Example:
        >>> found = study("fashion_mnist.toml", "results/fashion-mnist", jobs=2)
    """
    if jobs is not None and (type(jobs) is not int or jobs == 0):
        raise ModelError(
            f"jobs={described(jobs)}: a number of processes is wanted, -1 for one per core, or None"
        )
    if isinstance(declaration, Study) and (seeds, validation) != (None, None):
        raise ModelError(
            "seeds and validation are those of the declared study; give them to declare"
        )
    declared = (
        declaration
        if isinstance(declaration, Study)
        else declare(declaration, seeds=seeds, validation=validation)
    )
    folder, wanted = Path(out), chosen(declared, only)
    if (folder / "settings.json").exists():
        raise PyroBMRError(
            f"'{folder}' holds a run or a comparison; choose another folder for the study"
        )
    with locked(folder):
        make_folder(folder / "cells")
        write_atomically(
            folder / f"study{declared.suffix}",
            lambda path: path.write_text(declared.text, encoding="utf-8"),
        )
        todo = [cell for cell in wanted if finished_row(folder / "cells" / cell.slug) is None]
        try:
            _run(declared.name, todo, folder / "cells", jobs, progress)
        finally:
            table = results(declared, folder)
            write_report(declared, folder, table)
    failures = {
        cell.slug: line
        for cell in wanted
        if (line := failure(folder / "cells" / cell.slug)) is not None
    }
    return StudyResults(table, failures, folder)


def _run(name: str, todo: list[Cell], cells: Path, jobs: int | None, progress: bool) -> None:
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    # with others the bar moves at the end
    lazy = getattr(get_active_backend()[0], "supports_return_generator", False)
    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered" if lazy else "list")
    failed = 0
    with tqdm(total=len(todo), disable=not progress, unit="cell", desc=name) as bar:
        try:
            for good in parallel(delayed(_succeeds)(cell, cells) for cell in todo):
                failed += not good
                bar.set_postfix_str(f"{failed} failed", refresh=False)
                bar.update()
        except BrokenExecutor:
            raise PyroBMRError(
                "a process of the study was killed, perhaps for want of memory; run it again, with"
                " fewer --jobs"
            ) from None


def _succeeds(cell: Cell, cells: Path) -> bool:
    # the bars of a cell go to its log; the lock of all processes is a semaphore, which one that is
    # stopped leaves behind
    tqdm.set_lock(RLock())
    run_cell(cell, cells)
    return failure(cells / cell.slug) is None


def chosen(declared: Study, only: Collection[str]) -> list[Cell]:
    """The cells of the methods named, all of them if none is.

    Raises:
        ModelError: there is no such method in the study.
    """
    names = list(dict.fromkeys(cell.name for cell in declared.cells))
    if unknown := [name for name in only if name not in names]:
        raise ModelError(
            f"only '{unknown[0]}': no such method in the study; its methods are: {', '.join(names)}"
        )
    return [cell for cell in declared.cells if not only or cell.name in only]


def cells_left(
    declared: Study, out: str | Path, *, only: Collection[str] = (), jobs: int = 1
) -> tuple[pd.DataFrame, float]:
    """Each cell with its state (finished, failed or open) and seconds (estimated while not
    finished), and the seconds that `jobs` processes still need.

    Estimates are means over the finished cells of the same model, data and method; without any, of
    the same model and data; else NaN.

    Raises:
        PyroBMRError: as `study`.
    """
    import pandas as pd

    rows = []
    for cell in chosen(declared, only):
        folder = Path(out) / "cells" / cell.slug
        row = finished_row(folder)
        state = "finished" if row else "open" if failure(folder) is None else "failed"
        seconds = row["seconds"] if row else math.nan
        rows.append(
            {
                "model": cell.model,
                "data": cell.data,
                "method": cell.label,
                "cell": cell.slug,
                "state": state,
                "seconds": seconds,
            }
        )
    table = pd.DataFrame(rows)
    finished = table[table["state"] == "finished"]
    for keys in (["model", "data", "method"], ["model", "data"]):
        typical = finished.groupby(keys)["seconds"].mean().rename("typical").reset_index()
        table["seconds"] = table["seconds"].fillna(
            table.merge(typical, how="left", on=keys)["typical"]
        )
    left = table.loc[table["state"] != "finished", "seconds"]
    processes = (os.cpu_count() or 1) if jobs < 0 else max(jobs, 1)
    return table[["cell", "method", "state", "seconds"]], float(left.sum(skipna=False)) / processes
