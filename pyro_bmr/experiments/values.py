"""The values of a declaration. Each is checked, and every error names the file and the key.

Owns `Values`. Next: `declaration.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from pyro_bmr.errors import ModelError, PyroBMRError, described
from pyro_bmr.experiments.grid import Scalar


class Values:
    """A mapping whose refusals name the file and the key."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where, self.values = where, values

    def wrong(self, key: str, rule: str) -> PyroBMRError:
        """An error at that key."""
        return ModelError(f"{self.where}: {key}: {rule}")

    @contextlib.contextmanager
    def refusals(self, key: str) -> Iterator[None]:
        """Within it, an error of the library is one at that key."""
        try:
            yield
        except PyroBMRError as error:
            raise self.wrong(key, str(error)) from None

    def expected(self, good: bool, key: str, rule: str, value: object) -> None:
        """Raises unless the value is `good`, with the rule that it breaks."""
        if not good:
            raise self.wrong(key, f"expected {rule}, got {_short(value)}")

    def known(self, key: str, values: Mapping[str, Any], keys: Iterable[str]) -> None:
        """Raises if `values` has a key that is none of `keys`."""
        if unknown := [name for name in values if name not in keys]:
            raise self.wrong(f"{key}{unknown[0]}", f"no such key; the keys are {', '.join(keys)}")

    def present(self, keys: Iterable[str]) -> None:
        """Raises if one of the keys is missing."""
        for key in keys:
            if key not in self.values:
                raise self.wrong(key, "is missing")

    def used(self, key: str, options: Mapping[str, Any], used: Collection[str]) -> None:
        """Raises if an option is used by no method."""
        if unused := [name for name in options if name != "for" and name not in used]:
            raise self.wrong(f"{key}.{unused[0]}", "no method of the study knows this option")

    def text(self, key: str, value: object) -> str:
        """A text that is not empty."""
        self.expected(isinstance(value, str) and bool(value.strip()), key, "a text", value)
        return str(value)

    def truth(self, key: str, value: object) -> bool:
        """True or false."""
        self.expected(isinstance(value, bool), key, "true or false", value)
        return bool(value)

    def names(self, key: str, value: object) -> list[str]:
        """A name, or a list of different names."""
        names = [value] if isinstance(value, str) else value
        good = (
            isinstance(names, list)
            and bool(names)
            and all(isinstance(name, str) and name for name in names)
        )
        self.expected(good, key, "a name or a list of names", value)
        assert isinstance(names, list)
        self.expected(len(set(names)) == len(names), key, "each name once", value)
        return names

    def subset(self, key: str, value: object, allowed: Collection[str]) -> list[str]:
        """Names that are among those at the top of the file."""
        names = self.names(key, value)
        if unknown := [name for name in names if name not in allowed]:
            raise self.wrong(
                key, f"no '{unknown[0]}' at the top of the file, which has {', '.join(allowed)}"
            )
        return names

    def table(self, key: str, value: object) -> Mapping[str, Any]:
        """A table of options."""
        self.expected(isinstance(value, Mapping), key, "a table of options", value)
        assert isinstance(value, Mapping)
        return value

    def of_each(self, key: str, value: object, names: Collection[str]) -> dict[str, str]:
        """Name → its text: one text for all of the `names`, or a table with those that differ."""
        if isinstance(value, str):
            return dict.fromkeys(names, self.text(key, value))
        found = self.table(key, value)
        self.known(f"{key}.", found, names)
        return {name: self.text(f"{key}.{name}", text) for name, text in found.items()}

    def methods(self, value: object) -> list[dict[str, Any]]:
        """The [[method]] tables, each with a name of its own."""
        good = isinstance(value, list) and value and all(isinstance(m, Mapping) for m in value)
        self.expected(bool(good), "method", "at least one [[method]]", value)
        assert isinstance(value, list)
        found: list[dict[str, Any]] = []
        for k, entry in enumerate(value):
            name = self.text(f"method[{k}].name", entry.get("name", entry.get("method")))
            if name in [other["name"] for other in found]:
                raise self.wrong(f"method '{name}'", "two methods have this name; rename one")
            found.append({**entry, "name": name})
        return found

    def options(self, key: str, values: Mapping[str, Any]) -> dict[str, list[Scalar]]:
        """Option → its values: one, unless a list is given."""
        found = {}
        for name, value in values.items():
            listed = value if isinstance(value, list) else [value]
            good = bool(listed) and all(
                isinstance(v, (str, int, float, bool))
                and (not isinstance(v, float) or math.isfinite(v))
                for v in listed
            )
            rule = "a finite number, a text, true or false, or a list of these that is not empty"
            self.expected(good, f"{key}.{name}", rule, value)
            if name == "validation":
                raise self.wrong(
                    f"{key}.{name}",
                    "the whole study holds out the same rows; say validation = … at the top of the"
                    " file",
                )
            found[name] = listed
        return found

    def seeds(self, value: object) -> list[int]:
        """The seeds of a number, 0 … n − 1, or of a list."""
        if type(value) is int and value >= 1:
            return list(range(value))
        good = (
            isinstance(value, list)
            and bool(value)
            and all(type(seed) is int and seed >= 0 for seed in value)
            and len(set(value)) == len(value)
        )
        rule = "a number of seeds, at least 1, or a list of different seeds"
        self.expected(good, "seeds", rule, value)
        assert isinstance(value, list)
        return value

    def validation(self, value: object) -> float | None:
        """A fraction of the training rows, or None."""
        good = value is None or (isinstance(value, float) and 0 < value < 1)
        rule = "a fraction of the training rows between 0 and 1"
        self.expected(good, "validation", rule, value)
        return value if isinstance(value, float) else None


def _short(value: object) -> str:
    words = repr(value)
    return words if len(words) <= 160 else described(value)
