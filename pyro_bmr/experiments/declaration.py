"""The declaration of a study in a small TOML file: a grid of models, data sets, methods, options
and seeds. Errors in it are reported before any work.

Owns `declare`; `values.py` checks each value. Next: `runs.py`.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import PyroBMRError
from pyro_bmr.experiments.grid import Cell, Scalar, Study, check_model, fingerprint, twins
from pyro_bmr.experiments.methods import method_named
from pyro_bmr.experiments.models import cell_device, load_model, on_device
from pyro_bmr.experiments.options import data_named, known_options, refuse_options
from pyro_bmr.experiments.values import Values
from pyro_bmr.files import reading

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KEYS = (
    *("name", "seeds", "data", "likelihood", "models", "validation", "shift", "settings"),
    "method",
)
_METHOD_KEYS = ("name", "method", "models", "data", "for")
Grid = dict[str, list[Scalar]]
"""Option → its values, a cell for each."""


def declare(
    source: str | Path | Mapping[str, Any],
    *,
    seeds: int | None = None,
    validation: float | None = None,
    device: str = "cpu",
) -> Study:
    """The study of a TOML file, or of a mapping of the same shape; `seeds` and `validation` stand
    in for those of the declaration. Its cells compute on `device`.

    The data are loaded, the models built once for each of them, and each method is asked whether it
    takes its options.

    Raises:
        PyroBMRError: the file cannot be read or is not TOML, or a key is unknown, missing or has a
            value that it can't have; with the file and the key.
    """
    where, text, suffix, values = _read(source)
    given = Values(where, values)
    given.known("", values, _KEYS)
    given.present(("name", "data", "models", "method"))
    name = given.text("name", values["name"])
    changed = {"seeds": seeds, "validation": validation}
    own = {key: value for key, value in changed.items() if value is not None}
    reader = _Reader(given, own, cell_device(device))
    cells = [cell for method in reader.methods for cell in reader.cells(method)]
    given.used("settings", reader.shared, reader.used)
    cells.sort(key=lambda cell: (reader.models.index(cell.model), reader.data.index(cell.data)))
    if pair := twins(cells):
        raise given.wrong(
            f"method '{pair[1].name}'",
            f"{pair[1].slug} is declared already, by method '{pair[0].name}'; remove one",
        )
    for model, data in dict.fromkeys((cell.model, cell.data) for cell in cells):
        with given.refusals("models"):
            check_model(on_device(load_model(model), device), reader.rows(data))
    file = f"study{suffix}"
    where = f" --device {reader.device}" if reader.device else ""
    return Study(name, tuple(cells), text, file, f"pyro-bmr study {file} --out .{where}")


def _read(source: str | Path | Mapping[str, Any]) -> tuple[str, str, str, Mapping[str, Any]]:
    if isinstance(source, Mapping):
        return "study", json.dumps(source, indent=1, default=str), ".json", source
    with reading(
        f"'{source}' cannot be read", PyroBMRError, "give a TOML file that declares a study"
    ):
        text = Path(source).read_text(encoding="utf-8")
    with reading(f"{source}: this is no TOML", PyroBMRError, "docs/studies.md has an example"):
        return str(source), text, ".toml", tomllib.loads(text)


class _Reader:
    """Makes the cells of a declaration, method by method; `used` are the shared options that a
    method knew.
    """

    def __init__(self, given: Values, changed: Mapping[str, Any], device: str) -> None:
        values, self.device = {**given.values, **changed}, device
        self.given, self.used = given, set[str]()
        self.data, self.models = (given.names(key, values[key]) for key in ("data", "models"))
        self.seeds = given.seeds(values.get("seeds", 1))
        self.validation = given.validation(values.get("validation"))
        self.shift = given.truth("shift", values.get("shift", False))
        self.shared = given.table("settings", values.get("settings", {}))
        self.methods = given.methods(values["method"])
        self.likelihoods = given.of_each("likelihood", values.get("likelihood", {}), self.data)
        self.marks = self._fingerprints()

    def rows(self, data: str) -> Data:
        """The data set of that name, its rows held out if there are any."""
        return data_named(data, self.validation, self.likelihoods.get(data))

    def cells(self, entry: Mapping[str, Any]) -> Iterator[Cell]:
        """The cells of a [[method]], in the order of its models, data and options."""
        label = str(entry["name"])
        key = f"method '{label}'"
        with self.given.refusals(f"{key}.method"):
            method_named(str(entry.get("method")))
        models, data = (
            self.given.subset(f"{key}.{part}", entry.get(part, names), names)
            for part, names in (("models", self.models), ("data", self.data))
        )
        overrides = {"settings": self.shared.get("for", {}), key: entry.get("for", {})}
        for part, table in overrides.items():
            table = self.given.table(f"{part}.for", table)
            self.given.known(f"{part}.for.", table, (*self.models, *self.data))
        for model, name in itertools.product(self.models, self.data):
            if model in models and name in data:
                grid = self._grid(key, entry, overrides, model, name)
                yield from self._cells_of(label, entry["method"], model, name, grid)

    def _grid(
        self,
        key: str,
        entry: Mapping[str, Any],
        overrides: Mapping[str, Mapping[str, Any]],
        model: str,
        data: str,
    ) -> Grid:
        """The options of a method here: the shared ones that it knows, changed by its own."""
        common = self.given.options(
            "settings", {name: value for name, value in self.shared.items() if name != "for"}
        )
        own = self.given.options(
            key, {name: value for name, value in entry.items() if name not in _METHOD_KEYS}
        )
        for part, grid in (("settings", common), (key, own)):
            for place in (model, data):
                where = f"{part}.for.{place}"
                here = self.given.table(where, overrides[part].get(place, {}))
                grid |= self.given.options(where, here)
        common = known_options(method_named(entry["method"]), self.rows(data), common)
        self.used |= common.keys()
        return common | own

    def _cells_of(
        self, label: str, method: str, model: str, data: str, grid: Grid
    ) -> Iterator[Cell]:
        varying = [name for name, listed in grid.items() if len(listed) > 1]
        for chosen in itertools.product(*grid.values()):
            options = dict(zip(grid, chosen, strict=True))
            with self.given.refusals(f"method '{label}'"):
                refuse_options(method_named(method), self.rows(data), options)
            words = [f"{name} {options[name]}" for name in varying if name != "kept"]
            line = ", ".join([label, *words])
            called = data if self.validation is None else f"{data} (validation)"
            about = {"model": model, "data": called, "method": line}
            first = Cell(
                model,
                data,
                self.marks[model, data],
                label,
                line,
                method,
                options,
                {name: options[name] for name in varying},
                validation=self.validation,
                likelihood=self.likelihoods.get(data, ""),
                device=self.device,
                shift=self.shift,
            )
            columns = {f"option_{name}": value for name, value in options.items()}
            for k, seed in enumerate(self.seeds):
                whole = {**about, "seed": seed, **columns}
                yield replace(first, seed=seed, timed=k == 0, about=whole)

    def _fingerprints(self) -> dict[tuple[str, str], str]:
        """Loads all data, looks all models up, and says what each pair is known by."""
        for model in self.models:
            with self.given.refusals("models"):
                load_model(model)
        found = {}
        for model, name in itertools.product(self.models, self.data):
            with self.given.refusals("data"):
                found[model, name] = fingerprint(model, self.rows(name))
        return found
