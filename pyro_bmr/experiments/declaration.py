"""A study as it is declared: a grid of models, data sets, methods, options and seeds, in a small
TOML file. Whatever is wrong is refused before any work.

Owns `Study`, `Cell` and `declare`. Next: `measures.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_bmr.errors import ModelError, PyroBMRError
from pyro_bmr.experiments.methods import method_named
from pyro_bmr.experiments.models import load_model
from pyro_bmr.experiments.options import data_named, known_options, refuse_options
from pyro_bmr.experiments.results_folder import fingerprint
from pyro_bmr.files import reading

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Scalar = str | int | float | bool
_KEYS = ("name", "seeds", "data", "models", "validation", "shift", "settings", "method")
_METHOD_KEYS = ("name", "method", "models", "data", "for")


@dataclass(frozen=True)
class Cell:
    """One fit of a study. `name` is that of its [[method]], `label` has the options that vary
    within it too, but for `kept`, along which lines are drawn.
    """

    model: str
    data: str
    name: str
    label: str
    method: str
    options: Mapping[str, Scalar]
    varying: tuple[str, ...]
    seed: int
    validation: float | None
    shift: bool
    fingerprint: str

    @property
    def definition(self) -> dict[str, Any]:
        """All that decides the numbers, and so not what a line is called in a table."""
        keys = ("model", "data", "fingerprint", "method", "seed", "validation", "shift")
        return {**{key: getattr(self, key) for key in keys}, "options": dict(self.options)}

    @property
    def slug(self) -> str:
        """The name of the cell's folder: readable, and with a hash of its definition."""
        parts = [
            self.model,
            self.data,
            self.method,
            *(f"{key}-{self.options[key]}" for key in self.varying),
            f"seed-{self.seed}",
        ]
        readable = "_".join(
            "".join(c if c.isalnum() or c in ".-" else "-" for c in Path(part).name or part)
            for part in parts
        )
        content = json.dumps(self.definition, sort_keys=True)
        return f"{readable[:100]}_{hashlib.sha256(content.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Study:
    """What a declaration says. `text`: the declaration as it was written; `suffix`: of a file that
    holds it.
    """

    name: str
    cells: tuple[Cell, ...]
    text: str
    suffix: str


class _Declaration:
    """A mapping whose refusals name the file and the key."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where, self.values = where, values

    def wrong(self, key: str, rule: str) -> PyroBMRError:
        return ModelError(f"{self.where}: {key}: {rule}")

    def known(self, key: str, values: Mapping[str, Any], keys: Iterable[str]) -> None:
        if unknown := [name for name in values if name not in keys]:
            raise self.wrong(f"{key}{unknown[0]}", f"no such key; the keys are {', '.join(keys)}")

    def names(self, key: str, value: object) -> list[str]:
        names = [value] if isinstance(value, str) else value
        if (
            not isinstance(names, list)
            or not names
            or not all(isinstance(name, str) and name for name in names)
        ):
            raise self.wrong(key, f"a name or a list of names is wanted, got {value!r}")
        if len(set(names)) < len(names):
            raise self.wrong(key, f"a name stands there twice, got {value!r}")
        return names

    def table(self, key: str, value: object) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.wrong(key, f"a table of options is wanted, got {value!r}")
        return value

    def options(self, key: str, values: Mapping[str, Any]) -> dict[str, list[Scalar]]:
        """Option → its values, of which there is one unless a list is given."""
        found = {}
        for name, value in values.items():
            listed = value if isinstance(value, list) else [value]
            good = all(
                isinstance(v, (str, int, float, bool))
                and (not isinstance(v, float) or math.isfinite(v))
                for v in listed
            )
            if not listed or not good:
                raise self.wrong(
                    f"{key}.{name}",
                    "a finite number, a text, true or false, or a list of these that is not empty"
                    f" is wanted, got {value!r}",
                )
            if name == "validation":
                raise self.wrong(
                    f"{key}.{name}",
                    "the whole study holds out the same rows; say validation = … at the top of the"
                    " file",
                )
            found[name] = listed
        return found

    def seeds(self, value: object) -> list[int]:
        if type(value) is int and value >= 1:
            return list(range(value))
        if (
            isinstance(value, list)
            and value
            and all(type(seed) is int and seed >= 0 for seed in value)
            and len(set(value)) == len(value)
        ):
            return value
        raise self.wrong(
            "seeds",
            f"a number of seeds, at least 1, or a list of different seeds is wanted, got {value!r}",
        )

    def validation(self, value: object) -> float | None:
        if value is None or (isinstance(value, float) and 0 < value < 1):
            return value
        raise self.wrong(
            "validation",
            f"a fraction of the training rows between 0 and 1 is wanted, got {value!r}",
        )


def declare(
    source: str | Path | Mapping[str, Any],
    *,
    seeds: int | None = None,
    validation: float | None = None,
) -> Study:
    """The study of a TOML file, or of a mapping of the same shape; `seeds` and `validation` stand
    in for those of the declaration.

    The data are loaded, the models looked up, and each method is asked whether it takes its
    options.

    Raises:
        PyroBMRError: the file cannot be read or is not TOML, or a key is unknown, missing or has a
            value that it can't have; with the file and the key.
    """
    where, text, suffix, values = _read(source)
    given = _Declaration(where, values)
    given.known("", values, _KEYS)
    for key in ("name", "data", "models", "method"):
        if key not in values:
            raise given.wrong(key, "is missing")
    if not isinstance(values["name"], str) or not values["name"].strip():
        raise given.wrong("name", f"a text is wanted, got {values['name']!r}")
    data, models = (given.names(key, values[key]) for key in ("data", "models"))
    seed_list = given.seeds(values.get("seeds", 1) if seeds is None else seeds)
    held_out = given.validation(values.get("validation") if validation is None else validation)
    shift = values.get("shift", False)
    if not isinstance(shift, bool):
        raise given.wrong("shift", f"true or false is wanted, got {shift!r}")
    shared = given.table("settings", values.get("settings", {}))
    methods = values["method"]
    if (
        not isinstance(methods, list)
        or not methods
        or not all(isinstance(method, Mapping) for method in methods)
    ):
        raise given.wrong("method", "at least one [[method]] is wanted")
    marks = _fingerprints(given, models, data, held_out)
    cells: list[Cell] = []
    used: set[str] = set()
    for k, entry in enumerate(methods):
        label = entry.get("name", entry.get("method"))
        if not isinstance(label, str) or not label.strip():
            raise given.wrong(f"method[{k}].name", f"a text is wanted, got {label!r}")
        key = f"method '{label}'"
        if label in {cell.name for cell in cells}:
            raise given.wrong(key, "two methods have this name; rename one")
        method = entry.get("method")
        try:
            run = method_named(str(method))
        except PyroBMRError as error:
            raise given.wrong(f"{key}.method", str(error)) from None
        for restricted, allowed in (("models", models), ("data", data)):
            if unknown := [
                name
                for name in given.names(f"{key}.{restricted}", entry.get(restricted, allowed))
                if name not in allowed
            ]:
                raise given.wrong(
                    f"{key}.{restricted}",
                    f"no '{unknown[0]}' at the top of the file, which has {', '.join(allowed)}",
                )
        overrides = {
            part: given.table(f"{part}.for", table.get("for", {}))
            for part, table in (("settings", shared), (key, entry))
        }
        for part, table in overrides.items():
            given.known(f"{part}.for.", table, (*models, *data))
        own = given.options(
            key, {name: value for name, value in entry.items() if name not in _METHOD_KEYS}
        )
        for model, data_name in itertools.product(models, data):
            if model not in entry.get("models", models) or data_name not in entry.get("data", data):
                continue
            rows = data_named(data_name, held_out)
            for_here = {
                f"{part}.for.{place}": table[place]
                for part, table in overrides.items()
                for place in (model, data_name)
                if place in table
            }
            here = {
                part: given.options(part, given.table(part, table))
                for part, table in for_here.items()
            }
            common = given.options(
                "settings", {name: value for name, value in shared.items() if name != "for"}
            )
            common |= {
                name: listed
                for part, options in here.items()
                if part.startswith("settings.")
                for name, listed in options.items()
            }
            common = known_options(run, rows, common)
            mine = own | {
                name: listed
                for part, options in here.items()
                if not part.startswith("settings.")
                for name, listed in options.items()
            }
            used |= common.keys()
            grid = common | mine
            varying = tuple(name for name, listed in grid.items() if len(listed) > 1)
            for chosen in itertools.product(*grid.values()):
                options = dict(zip(grid, chosen, strict=True))
                try:
                    refuse_options(run, rows, options)
                except PyroBMRError as error:
                    raise given.wrong(key, str(error)) from None
                line = ", ".join(
                    [label, *(f"{name} {options[name]}" for name in varying if name != "kept")]
                )
                cells += [
                    Cell(
                        model,
                        data_name,
                        label,
                        line,
                        str(method),
                        options,
                        varying,
                        s,
                        held_out,
                        shift,
                        marks[model, data_name],
                    )
                    for s in seed_list
                ]
    if unused := [name for name in shared if name != "for" and name not in used]:
        raise given.wrong(f"settings.{unused[0]}", "no method of the study knows this option")
    cells.sort(key=lambda cell: (models.index(cell.model), data.index(cell.data)))
    slugs: dict[str, Cell] = {}
    for cell in cells:
        if (twin := slugs.setdefault(cell.slug, cell)) is not cell:
            raise given.wrong(
                f"method '{cell.name}'",
                f"{cell.slug} is declared already, by method '{twin.name}'; remove one",
            )
    return Study(values["name"], tuple(cells), text, suffix)


def _read(source: str | Path | Mapping[str, Any]) -> tuple[str, str, str, Mapping[str, Any]]:
    if isinstance(source, Mapping):
        return "study", json.dumps(source, indent=1, default=str), ".json", source
    with reading(
        f"'{source}' cannot be read", PyroBMRError, "a TOML file that declares a study is wanted"
    ):
        text = Path(source).read_text(encoding="utf-8")
    with reading(f"{source}: this is no TOML", PyroBMRError, "docs/studies.md has an example"):
        return str(source), text, ".toml", tomllib.loads(text)


def _fingerprints(
    given: _Declaration, models: list[str], data: list[str], validation: float | None
) -> dict[tuple[str, str], str]:
    """Loads all data, looks all models up, and says what each pair is known by."""
    found = {}
    for model in models:
        try:
            load_model(model)
        except PyroBMRError as error:
            raise given.wrong("models", str(error)) from None
        for name in data:
            try:
                found[model, name] = fingerprint(model, data_named(name, validation))
            except PyroBMRError as error:
                raise given.wrong("data", str(error)) from None
    return found
