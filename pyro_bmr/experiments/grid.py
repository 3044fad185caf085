"""A grid of fits. A `Cell` is one model, data set, method with its options, and seed; a `Study` is
the cells that are reported together.

Models, data and priors are given by name, so that every process can load them, or as objects in
memory. Owns `fingerprint`, a hash of data and model files, and `sized`. Next: `baseline_cells.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pyro_bmr.data.data_set import Data
from pyro_bmr.experiments.models import Build
from pyro_bmr.priors import Gaussian

Scalar = str | int | float | bool


@dataclass(frozen=True)
class Cell:
    """One fit. `about`: column → what it is, in a table; `label`: its line there, in words;
    `varying`: the options in the name of its folder, in words.

    `likelihood`: of the data, by name or in words, empty for that of their task.

    `build`, `rows`: the model and the data where they are objects, validation rows in the place of
    the test rows if they are held out.

    `device`: where it computes, empty for the CPU.

    `size_of`: the name of the folder of another cell whose kept fraction is the option `kept` of
    this one, which runs after it (`sized`). `timed`: whether its `step_ratio` is measured.
    """

    model: str
    data: str
    fingerprint: str
    name: str = ""
    label: str = ""
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    varying: Mapping[str, Scalar] = field(default_factory=dict)
    seed: int = 0
    validation: float | None = None
    likelihood: str = ""
    device: str = ""
    shift: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    build: Build | None = None
    rows: Data | None = None
    size_of: str = ""
    timed: bool = True

    @property
    def definition(self) -> dict[str, Any]:
        """All that decides the numbers, and so not what a line is called in a table."""
        keys = ("model", "data", "fingerprint", "method", "seed", "validation", "shift")
        options = {name: _in_words(value) for name, value in self.options.items()}
        given = {key: getattr(self, key) for key in ("likelihood", "device") if getattr(self, key)}
        own = {key: getattr(self, key) for key in keys}
        return {**own, **given, "options": options}

    @property
    def slug(self) -> str:
        """The name of the cell's folder: readable, and with a hash of its definition."""
        parts = [
            self.model,
            self.data,
            self.method,
            *(f"{name}-{value}" for name, value in self.varying.items()),
            f"seed-{self.seed}",
        ]
        readable = "_".join(plain_name(Path(part).name or part) for part in parts)
        content = json.dumps(self.definition, sort_keys=True)
        return f"{readable[:100]}_{hashlib.sha256(content.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Study:
    """Cells that are reported together. `text`: the declaration as it was written; `file`: the name
    of the file that holds it; `command`: what makes it again; `shown`: the columns of its tables of
    means, None for all; `note`: a line above the first of them;
    `remarks`: sentences below each.
    """

    name: str
    cells: tuple[Cell, ...]
    text: str
    file: str
    command: str = ""
    shown: tuple[str, ...] | None = None
    note: str = ""
    remarks: tuple[str, ...] = ()


def plain_name(text: str) -> str:
    """A text with a dash for whatever may mean something else in a path."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text)


def twins(cells: Iterable[Cell]) -> tuple[Cell, Cell] | None:
    """The first two cells that would have one folder."""
    first: dict[str, Cell] = {}
    for cell in cells:
        if first.setdefault(cell.slug, cell) is not cell:
            return first[cell.slug], cell
    return None


def sized(
    cells: Iterable[Cell], row_of: Callable[[str], Mapping[str, float] | None]
) -> tuple[Cell, ...]:
    """The cells, each of another's size with that size among its options, and so with a folder of
    its own for each size; as it was while `row_of` gives None for the other's folder.
    """

    def filled(cell: Cell) -> Cell:
        row = row_of(cell.size_of) if cell.size_of else None
        if row is None:
            return cell
        return replace(cell, size_of="", options={**cell.options, "kept": row["kept"]})

    return tuple(filled(cell) for cell in cells)


def check_model(build: Build, data: Data) -> Callable[..., Any]:
    """Raises what the model says of data that do not suit it, by building it once; the program."""
    with torch.random.fork_rng():
        return build(data, Gaussian())


def fingerprint(model: str, data: Data) -> str:
    """A hash of the data, and of the model if it is a file: results of others are never taken for
    these.
    """
    content = hashlib.sha256()
    for tensor in (data.x_train, data.y_train, data.x_test, data.y_test):
        content.update(tensor.cpu().contiguous().numpy().tobytes())
    path = Path(model.partition(":")[0])
    if path.suffix == ".py" and path.is_file():
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def _in_words(value: Any) -> Any:
    """An option as JSON has it: an object by its repr, or by its type where that is an address."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    kind = type(value)
    return (
        f"{kind.__module__}.{kind.__qualname__}" if "object at 0x" in repr(value) else repr(value)
    )
