"""The options that a method accepts, found by a call whose network is never built; and the data of
a study by name, loaded once per process.

Owns `known_options`, `refuse_options` and `data_named`. Next: `values.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from pyro_bmr.data.data_set import Data, validation_data
from pyro_bmr.data.named import load
from pyro_bmr.errors import OptionError, PyroBMRError
from pyro_bmr.experiments.methods import Method
from pyro_bmr.priors import Prior

Value = TypeVar("Value")


class _Asked(Exception):
    """The options were taken: the method wants its network now."""


def _no_network(data: Data, prior: Prior) -> NoReturn:
    raise _Asked


def refuse_options(method: Method, data: Data, options: Mapping[str, Any]) -> None:
    """Raises what the method says of options that it does not take, before anything is trained.

    A method checks its options first and builds its network then; here the network is an exception,
    at which all is well.

    Raises:
        PyroBMRError: the method does not know an option, or refuses its value.
    """
    try:
        with torch.random.fork_rng():
            method(_no_network, data, 0, options, False)
    except _Asked:
        pass


def known_options(
    method: Method, data: Data, options: Mapping[str, list[Value]]
) -> dict[str, list[Value]]:
    """Those of the options that the method knows, whatever it says of their values."""
    try:
        refuse_options(method, data, {name: values[0] for name, values in options.items()})
    except OptionError as error:
        return {name: values for name, values in options.items() if name not in error.unknown}
    except PyroBMRError:  # of a value, which is refused with the rest of them later
        pass
    return dict(options)


def data_named(name: str, validation: float | None, likelihood: str | None = None) -> Data:
    """`load(name)`, or FILE.csv:COLUMN, under a likelihood by its name, and with `validation` what
    `validation_data` makes of it; from memory while the files have not changed.

    Raises:
        PyroBMRError: as `load` and `validation_data`.
    """
    stem, csv, column = name.rpartition(".csv:")
    path = Path(f"{stem}.csv" if csv else name)
    files = [path, *path.glob("*")] if path.exists() else []
    return _loaded(
        str(path),
        column if csv else None,
        likelihood,
        validation,
        tuple((str(file.absolute()), file.stat().st_mtime_ns) for file in files),
    )


@lru_cache(maxsize=2)
def _loaded(
    name: str,
    column: str | None,
    likelihood: str | None,
    validation: float | None,
    files: tuple[tuple[str, int], ...],
) -> Data:
    data = load(name, column, likelihood)
    return data if validation is None else validation_data(data, validation)
