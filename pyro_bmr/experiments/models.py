"""The models of a comparison by name: those that come with the library, and files of the user's
own.

Owns `load_model`, `model_names`, `default_model`, and `device_named` and `on_device`, where they
compute. Next: `plots.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import ModelError, described
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


def device_named(name: str) -> torch.device:
    """The device of that name, such as cpu, cuda or cuda:1.

    Raises:
        ModelError: torch does not have it here, or tensors on it have no values.
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"device {described(name)}: expected cpu, or a device that this torch computes on, such"
            f" as cuda ({why})"
        ) from None
    return device


def cell_device(name: str) -> str:
    """The device of a cell: its name, empty for the CPU.

    Raises:
        ModelError: as `device_named`.
    """
    device = device_named(name)
    number = 0 if device.index is None else device.index
    return "" if device.type == "cpu" else f"{device.type}:{number}"


def on_device(build: Build, name: str) -> Build:
    """The same model with its programs on a device, of the same start weights. A fit, predictions
    and baselines take their rows there.

    Raises:
        ModelError: as `device_named`; or when it builds a program that is no module, for another
            device than the CPU.
    """
    device = device_named(name)

    def built(data: Data, prior: Prior) -> Callable[..., Any]:
        program = build(data, prior)
        if isinstance(program, nn.Module):
            return program.to(device)
        if device.type != "cpu":
            raise ModelError(
                f"device '{name}': expected a model whose program is a torch module, got"
                f" {type(program).__name__}, which has no place of its own; leave the device out"
            )
        return program

    return built


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
