"""The folder of a cell, which is a run for `pyro-bmr reduce` and `pyro-bmr export`.

It contains the definition of the cell, its log, its fit and exported weights, and its row. The row
is written last and marks the cell as finished. Owns `run_cell`, `finished_row` and `failure`. Next:
`curves.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import subprocess
import traceback
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch

from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import PyroBMRError
from pyro_bmr.experiments.grid import Cell
from pyro_bmr.experiments.log import logged, threads
from pyro_bmr.experiments.measures import measured
from pyro_bmr.experiments.methods import Trained, method_named
from pyro_bmr.experiments.models import load_model, on_device
from pyro_bmr.experiments.options import data_named
from pyro_bmr.experiments.runs import FORMAT, prior_name, save_run
from pyro_bmr.experiments.scores import class_probabilities
from pyro_bmr.exporting import save
from pyro_bmr.files import finite, locked, read_json, reading, write_atomically, write_json
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.predict import Prediction

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, float]
AGAIN = "remove its folder to run the cell again"


def run_cell(cell: Cell, cells: Path, number: int = 1) -> tuple[str, ...] | None:
    """Trains and scores a cell with `number` threads of torch and keeps it in `cells`.

    An error of the cell is kept there too, so that the other cells go on. Returns the cautions
    about its reduction, None if it failed. A cell that another process trains at this time, such as
    one that a cluster has given to two workers, is waited for and not trained again.
    """
    folder = cells / cell.slug
    if finished_row(folder) is not None:
        return ()
    with locked(folder, wait=True):
        return () if finished_row(folder) is not None else _run(cell, folder, number)


def _run(cell: Cell, folder: Path, number: int) -> tuple[str, ...] | None:
    write_json(folder / "settings.json", _settings(cell))
    error: Exception | None = None
    with threads(number), logged(folder / "log.txt"):
        try:
            trained, data = _train(cell, progress=True)
            for caution in trained.cautions:
                print(f"the reduction after the fit: {caution}")
            prediction = trained.predict(data.x_test)
            row = measured(trained, data, prediction, cell.shift, cell.timed)
            row["kilobytes"] = _keep(cell, trained, data, prediction, folder)
        except Exception as problem:
            error = problem
            traceback.print_exc()
    if error is None:
        (folder / "failed.txt").unlink(missing_ok=True)
        figures = finite(row)
        write_json(folder / "row.json", {**figures, "sha256": _digest(figures)}, durable=True)
        return trained.cautions
    name = "" if isinstance(error, PyroBMRError) else f"{type(error).__name__}: "
    line = name + (" ".join(str(error).split()) or "no message")
    write_atomically(folder / "failed.txt", lambda path: path.write_text(line, encoding="utf-8"))
    return None


def row_of(cell: Cell, number: int, progress: bool) -> tuple[Row, tuple[str, ...]]:
    """The row of a cell that is not kept on disk, and the cautions about its reduction."""
    with threads(number):
        trained, data = _train(cell, progress)
        row = measured(trained, data, trained.predict(data.x_test), cell.shift, cell.timed)
    return row, trained.cautions


def _train(cell: Cell, progress: bool) -> tuple[Trained, Data]:
    """What the method of a cell leaves behind, and the data with the rows that are scored."""
    data = cell.rows or data_named(cell.data, cell.validation, cell.likelihood or None)
    build = cell.build or load_model(cell.model)
    build = on_device(build, cell.device) if cell.device else build
    return method_named(cell.method)(build, data, cell.seed, cell.options, progress), data


def _settings(cell: Cell) -> dict[str, Any]:
    in_memory = [name for name, given in (("model", cell.build), ("data", cell.rows)) if given]
    about = {"format": FORMAT, **cell.definition, "versions": versions()}
    return {**about, "in_memory": in_memory}


def _keep(cell: Cell, trained: Trained, data: Data, prediction: Prediction, folder: Path) -> float:
    """Writes all that tables, pictures and commands want of a trained network, and returns the size
    of its weights in kilobytes.
    """
    labels = class_probabilities(prediction, data)
    calibration = None if labels is None else metrics.calibration(*labels).tolist()
    report = {
        "calibration": calibration,
        "input_shape": list(data.x_train.shape[1:]),
        "warnings": trained.cautions,
        "convergence": getattr(trained.fit, "convergence", None),
        "trials": {f"{temperature:g}": nll for temperature, nll in trained.trials.items()},
    }
    save(trained.weights, folder, report)
    write_atomically(
        folder / "history.csv", lambda path: trained.history.to_csv(path, index=False, na_rep="nan")
    )
    if trained.fit is not None:
        prior = prior_name(trained.declared)
        scale, noise = trained.extra.get("scale", 1.0), trained.extra.get("noise")
        about = {"prior": prior, "temperature": trained.fit.temperature, "scale": scale}
        about |= {} if noise is None else {"noise": noise}
        run = save_run(trained.fit, folder, {**_settings(cell), **about})
        if trained.reduction is not None:
            run.reduced(trained.reduction, {"target": cell.options.get("kept")})
    return (folder / "model.safetensors").stat().st_size / 1000


def finished_row(folder: Path) -> Row | None:
    """The figures of a finished cell; None while it is not.

    Raises:
        PyroBMRError: row.json is not what the cell wrote.
    """
    path = folder / "row.json"
    if not path.exists():
        return None
    row = read_cell(path)
    if row.pop("sha256", None) != _digest(row):
        raise PyroBMRError(
            f"'{path}' is damaged: expected the figures that its cell wrote, got others; remove it"
            " to run the cell again"
        )
    return {name: math.nan if value is None else value for name, value in row.items()}


def _digest(figures: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def read_cell(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a cell.

    Raises:
        PyroBMRError: the file is not readable, or is something else.
    """
    return read_json(path, f"'{path}' is not what a study writes", PyroBMRError, AGAIN)


def calibration_of(folder: Path) -> np.ndarray | None:
    """The calibration of a cell, (bins, 3); None for real targets.

    Raises:
        PyroBMRError: report.json is not what a cell writes.
    """
    path = folder / "report.json"
    rows = read_cell(path).get("calibration")
    with reading(f"'{path}' is not what a study writes", PyroBMRError, AGAIN):
        table = None if rows is None else np.array(rows, dtype=float)
        if table is not None and (table.ndim != 2 or table.shape[1] != 3):
            raise ValueError("calibration is no table of three columns")
    return table


def read_history(folder: Path) -> pd.DataFrame:
    """The epochs of a finished cell, without rows for a method that has none.

    Raises:
        PyroBMRError: history.csv is no table.
    """
    import pandas as pd

    with reading(f"'{folder / 'history.csv'}' is no history", PyroBMRError, AGAIN):
        try:
            return pd.read_csv(folder / "history.csv")
        except pd.errors.EmptyDataError:
            return pd.DataFrame()


def failure(folder: Path) -> str | None:
    """The error of a cell that was tried and failed, in one line; None for any other."""
    path = folder / "failed.txt"
    return (
        path.read_text(encoding="utf-8", errors="replace")
        if path.exists() and not (folder / "row.json").exists()
        else None
    )


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """What a number may depend on: Python, torch, Pyro and pyro_bmr, and the git commit of a
    checkout, with a + if its pyro_bmr or models has changes.
    """
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pyro": pyro.__version__,
        "pyro_bmr": version("pyro_bmr"),
    }
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit, changes = (
                subprocess.run(
                    ["git", "-C", str(root), *command],
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=10,
                ).stdout.strip()
                for command in (
                    ["rev-parse", "--short", "HEAD"],
                    ["status", "--porcelain", "--untracked-files=no", "--", "pyro_bmr", "models"],
                )
            )
            found["commit"] = commit + ("+" if changes else "")
    return found
