"""`study` runs the unfinished cells of a declared grid in parallel and writes the report. This is
the only file that starts processes.

joblib carries cells between the processes of this user; no file is unpickled. Owns `run`, for
`study` and `compare`. Next: `compare.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from pyro_bmr.errors import ModelError, PyroBMRError, described
from pyro_bmr.experiments.declaration import declare
from pyro_bmr.experiments.folder import Row, failure, finished_row, run_cell
from pyro_bmr.experiments.grid import Cell, Study, sized
from pyro_bmr.experiments.report import failed_lines, failures_of, results, write_report
from pyro_bmr.files import locked, make_folder, write_atomically

if TYPE_CHECKING:
    import pandas as pd

Result = TypeVar("Result")
COMPARISON = "comparison.json"
"""The file that says what a comparison is; the file of a study is study.toml or study.json."""


@dataclass(frozen=True)
class StudyResults:
    """The results of a run.

    `table`: one row per finished cell. `failures`: cell → its error in one line. `cautions`: cell →
    the cautions about its reduction, for the cells that this call ran. `failed`: the cells that
    failed, in the words of a table.
    """

    table: pd.DataFrame
    failures: Mapping[str, str]
    folder: Path
    cautions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    failed: Sequence[str] = ()


def study(
    declaration: str | Path | Mapping[str, Any] | Study,
    out: str | Path,
    *,
    jobs: int | None = None,
    only: Collection[str] = (),
    seeds: int | None = None,
    validation: float | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> StudyResults:
    """Runs the cells of a declared study that are not finished, and writes results.csv, report.md,
    report.html and pictures to `out`.

    A cell is a model, a data set, a method with its options, and a seed. It is trained with one
    thread in a process of its own and kept in ``out/cells``; a finished one is not run again, one
    that failed is. Cells do not depend on each other nor on `jobs`: the same numbers come out. The
    folder of a finished cell is a run for ``pyro-bmr reduce`` and ``pyro-bmr export``.

    Args:
        declaration: a TOML file or a mapping of its shape (docs/studies.md), or what `declare` made
            of one.
        jobs: processes; None for those of an enclosing `joblib.parallel_config`, whose backend
            (Dask, Ray, …) is used, or else one.
        only: names of methods; others are not run, but what is finished of them is reported.
        seeds, validation: in the place of those of the declaration; `validation` scores that
            fraction of the training rows instead of the test rows.
        device: where the cells compute, such as cuda.

    Raises:
        PyroBMRError: something in the declaration is wrong, with file and key, and nothing was run;
            or `out` cannot be written, or is in use by another process.

    Example:
        >>> found = study("fashion_mnist.toml", "results/fashion-mnist", jobs=2)
    """
    check_jobs(jobs)
    if isinstance(declaration, Study) and (seeds, validation, device) != (None, None, "cpu"):
        raise ModelError(
            "seeds, validation and device are those of the declared study; give them to declare"
        )
    declared = (
        declaration
        if isinstance(declaration, Study)
        else declare(declaration, seeds=seeds, validation=validation, device=device)
    )
    return run(declared, Path(out), chosen(declared, only), jobs=jobs, progress=progress)


def run(
    declared: Study,
    folder: Path,
    wanted: Sequence[Cell],
    *,
    jobs: int | None,
    progress: bool,
    threads: int = 1,
) -> StudyResults:
    """Runs those of the `wanted` cells that are not finished, each with that number of threads, and
    writes the report of all cells.
    """
    _refuse_other_results(folder, declared.file)
    with locked(folder):
        make_folder(folder / "cells")
        write_atomically(
            folder / declared.file, lambda path: path.write_text(declared.text, encoding="utf-8")
        )
        work = partial(run_cell, cells=folder / "cells", number=threads)

        def row_of(slug: str) -> Row | None:
            return finished_row(folder / "cells" / slug)

        done: dict[str, tuple[str, ...] | None] = {}
        try:
            for cells in in_turn(wanted, row_of):
                todo = [cell for cell in cells if row_of(cell.slug) is None]
                done |= in_parallel(work, todo, jobs, progress, declared.name)
        finally:
            declared = replace(declared, cells=sized(declared.cells, row_of))
            table = results(declared, folder)
            write_report(declared, folder, table)
    failures = failures_of(sized(wanted, row_of), folder)
    cautions = {slug: said for slug, said in done.items() if said}
    return StudyResults(table, failures, folder, cautions, failed_lines(declared, failures))


def in_turn(cells: Sequence[Cell], row_of: Callable[[str], Row | None]) -> Iterator[list[Cell]]:
    """The cells with a size of their own, and then, with its size, those of another's."""
    yield [cell for cell in cells if not cell.size_of]
    yield [cell for cell in sized([c for c in cells if c.size_of], row_of) if not cell.size_of]


def check_jobs(jobs: int | None) -> None:
    """Raises unless it is a number of processes."""
    if jobs is not None and (type(jobs) is not int or jobs == 0):
        raise ModelError(
            f"jobs: expected a number of processes, -1 for one per core, or None, got"
            f" {described(jobs)}"
        )


def _refuse_other_results(folder: Path, file: str) -> None:
    others = {
        "posterior.safetensors": "a run of pyro-bmr fit",
        "settings.json": "a run, or a comparison of an older version",
        "cells/*/config.json": "a study of an older version",
        **({"study.*": "a study"} if file == COMPARISON else {COMPARISON: "a comparison"}),
    }
    for name, what in others.items():
        if any(folder.glob(name)):
            raise PyroBMRError(
                f"'{folder}' holds {what}, expected an empty folder or one of this"
                f" {'comparison' if file == COMPARISON else 'study'}; choose another folder"
            )


def in_parallel(
    work: Callable[[Cell], Result],
    todo: Sequence[Cell],
    jobs: int | None,
    progress: bool,
    name: str,
) -> dict[str, Result]:
    """The name of a cell's folder → what `work` returns for it, None if it failed, each in a
    process of its own where there are several.
    """
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    if not todo:
        return {}
    # with others the bar moves at the end
    lazy = getattr(get_active_backend()[0], "supports_return_generator", False)
    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered" if lazy else "list")
    found, failed = {}, 0
    with tqdm(total=len(todo), disable=not progress, unit="cell", desc=name) as bar:
        try:
            here = os.getcwd()
            for slug, result in parallel(delayed(_alone)(work, cell, here) for cell in todo):
                found[slug] = result
                failed += result is None
                bar.set_postfix_str(f"{failed} failed", refresh=False)
                bar.update()
        except BrokenExecutor:
            raise PyroBMRError(
                "a process of the study was killed, perhaps for want of memory; run it again, with"
                " fewer --jobs"
            ) from None
    return {cell.slug: found[cell.slug] for cell in todo}


def _alone(work: Callable[[Cell], Result], cell: Cell, here: str) -> tuple[str, Result]:
    # a process of an earlier study may stand elsewhere: relative names are those of the caller
    if os.path.isdir(here) and os.getcwd() != here:
        os.chdir(here)
    # the bars of a cell go to its log; the lock of all processes is a semaphore, which one that is
    # stopped leaves behind
    tqdm.set_lock(RLock())
    return cell.slug, work(cell)


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
