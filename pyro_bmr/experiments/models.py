"""The models of a comparison by name: those that come with the library, and files of the user's
own.

Owns `load_model`, `model_names` and `default_model`. Next: `plots.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import ModelError
from pyro_bmr.priors import Prior

Build = Callable[[Data, Prior], Callable[..., Any]]


def load_model(name: str | Path) -> Build:
    """The `build` function of a model: a name in `models/`, with its argument after a colon, or a
    .py file.

    Raises:
        ModelError: there is no such model, or its file has no `build`.
    """
    stem, _, argument = str(name).partition(":")
    if stem.endswith(".py"):
        path = Path(stem)
        spec = (
            importlib.util.spec_from_file_location(f"pyro_bmr_model_{path.stem}", path)
            if path.is_file()
            else None
        )
        if spec is None or spec.loader is None:
            raise ModelError(
                f"no model file '{stem}'; give a .py file with a function build(data, prior)"
            )
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    elif stem in model_names():
        module = importlib.import_module(f"pyro_bmr.models.{stem}")
    else:
        raise ModelError(
            f"no model '{stem}'; the models are: {', '.join(model_names())}; or give a .py file"
            " with a function build(data, prior)"
        )
    build = getattr(module, "build", None)
    if not callable(build):
        raise ModelError(f"'{stem}' has no function build(data, prior) that returns a Pyro program")
    if argument and len(inspect.signature(build).parameters) < 3:
        raise ModelError(f"'{name}': the model '{stem}' takes no argument after a colon")
    return (lambda data, prior: build(data, prior, argument)) if argument else build


def default_model(data: Data) -> str:
    """The model where none is named: a linear regression of real targets, else a perceptron."""
    return "linear_regression" if data.task == "regression" else "mlp"


def model_names() -> list[str]:
    """The models that come with the library."""
    package = importlib.import_module("pyro_bmr.models")
    return sorted(
        path.stem
        for folder in package.__path__
        for path in Path(folder).glob("*.py")
        if path.stem != "__init__"
    )
