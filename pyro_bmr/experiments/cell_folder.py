"""One cell of a study in a folder of its own: what defines it, what it said, what it left, and last
of all its row, which says that it is finished.

Owns `run_cell`, `finished_row` and `failure`. Next: `pictures.py`.
"""

from __future__ import annotations

import contextlib
import io
import math
import platform
import subprocess
import time
import traceback
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch

from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import PyroBMRError
from pyro_bmr.experiments.declaration import Cell
from pyro_bmr.experiments.measures import measured
from pyro_bmr.experiments.methods import Trained, method_named
from pyro_bmr.experiments.models import load_model
from pyro_bmr.experiments.options import data_named
from pyro_bmr.exporting import save
from pyro_bmr.files import (
    finite,
    make_folder,
    read_json,
    reading,
    write_atomically,
    write_json,
    writing,
)
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.predict import ClassPrediction

if TYPE_CHECKING:
    import pandas as pd

_SECONDS_BETWEEN_LINES = 5.0


def run_cell(cell: Cell, cells: Path) -> None:
    """Trains and scores a cell with one thread of torch, and keeps it in `cells`; whatever it
    raises is kept there too, and the study goes on.
    """
    folder = cells / cell.slug
    if finished_row(folder) is not None:  # by another process with the same folder
        return
    make_folder(folder)
    config = {**cell.definition, "versions": versions()}
    write_json(folder / "config.json", config)
    error: Exception | None = None
    with writing(folder / "log.txt"):
        log = _Log((folder / "log.txt").open("w", encoding="utf-8"))
    with _one_thread(), _into(log):
        try:
            data = data_named(cell.data, cell.validation)
            trained = method_named(cell.method)(
                load_model(cell.model), data, cell.seed, cell.options, True
            )
            row = _keep(trained, data, folder, cell.shift)
        except Exception as problem:
            error = problem
            traceback.print_exc()
    if error is None:
        (folder / "failed.txt").unlink(missing_ok=True)
        write_json(folder / "row.json", row, durable=True)
    else:
        name = "" if isinstance(error, PyroBMRError) else f"{type(error).__name__}: "
        line = name + (" ".join(str(error).split()) or "no message")
        write_atomically(
            folder / "failed.txt", lambda path: path.write_text(line, encoding="utf-8")
        )


def _keep(trained: Trained, data: Data, folder: Path, shift: bool) -> dict[str, Any]:
    """Writes all that tables and pictures want of a trained network, and returns its row."""
    prediction = trained.predict(data.x_test)
    calibration = (
        metrics.calibration(prediction.probs, data.y_test).tolist()
        if isinstance(prediction, ClassPrediction)
        else None
    )
    save(
        trained.weights,
        folder,
        {"calibration": calibration, "input_shape": list(data.x_train.shape[1:])},
    )
    write_atomically(
        folder / "history.csv", lambda path: trained.history.to_csv(path, index=False, na_rep="nan")
    )
    return dict(
        finite(
            {
                **measured(trained, data, prediction, shift),
                "kilobytes": (folder / "model.safetensors").stat().st_size / 1000,
            }
        )
    )


def finished_row(folder: Path) -> dict[str, float] | None:
    """The figures of a finished cell; None while it is not.

    Raises:
        PyroBMRError: row.json is not what a cell writes.
    """
    path = folder / "row.json"
    if not path.exists():
        return None
    row = read_cell(path)
    if not row or not all(
        value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        for value in row.values()
    ):
        raise PyroBMRError(
            f"'{path}' is no row of a study (figures are wanted); remove it to run the cell again"
        )
    return {name: math.nan if value is None else value for name, value in row.items()}


def read_cell(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a cell.

    Raises:
        PyroBMRError: the file is not readable, or is something else.
    """
    return read_json(
        path,
        f"'{path}' is not what a study writes",
        PyroBMRError,
        "remove its folder to run the cell again",
    )


def read_history(folder: Path) -> pd.DataFrame:
    """The epochs of a finished cell, without rows for a method that has none.

    Raises:
        PyroBMRError: history.csv is no table.
    """
    import pandas as pd

    with reading(
        f"'{folder / 'history.csv'}' is no history",
        PyroBMRError,
        "remove the folder to run the cell again",
    ):
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


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order whatever the number of processes, and no two of them for one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _into(log: io.TextIOBase) -> Iterator[None]:
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            yield
        finally:
            log.close()


class _Log(io.TextIOBase):
    """A text file in which a progress bar is a line now and then, and its last state one when the
    log is closed. No cell fails for want of its log.
    """

    def __init__(self, file: io.TextIOBase | Any) -> None:
        self.file, self.shown, self.waiting = file, 0.0, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text.startswith("\r"):
            self.waiting = text.strip() or self.waiting
            if time.monotonic() - self.shown > _SECONDS_BETWEEN_LINES:
                self._write_line()
        else:
            self._put(text)
        return len(text)

    def close(self) -> None:
        if self.waiting:
            self._write_line()
        with contextlib.suppress(OSError):
            self.file.close()
        super().close()

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.file.write(text)
            self.file.flush()

    def _write_line(self) -> None:
        self._put(f"{self.waiting}\n")
        self.shown, self.waiting = time.monotonic(), ""
