"""The table of a deployment: what the dense network and each written format cost.

Owns `Trial`, `dense_networks`, `read_format` and `with_shared_calls`. Next: `deployment.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pyro_bmr.data.inputs import Inputs, of_each
from pyro_bmr.errors import warn
from pyro_bmr.exporting.costs import Timed, counted
from pyro_bmr.exporting.formats import FORMATS
from pyro_bmr.exporting.loaders_source import loaders_source
from pyro_bmr.exporting.written_files import halved, loaded_module, read_back, write_format
from pyro_bmr.shrinking.verification import Answers

# of the largest output; 8-bit numbers that are further off are warned of
_ROUNDED_FAR = 0.1


@dataclass(frozen=True)
class Trial:
    """What is deployed, `net` in plain form, and what it is tried on.

    `name`: of its class. `rows`: inputs, and `outputs`: what `net` gives on them, with which the
    files that are read back are compared. `example`, `seconds` and `batches`: for latencies.
    """

    net: nn.Module
    name: str
    rows: list[Inputs]
    outputs: Answers
    example: Inputs
    seconds: float
    batches: tuple[int, ...]


def dense_networks(
    before: nn.Module, trial: Trial, stage: Path, keys: Iterable[str]
) -> list[Timed]:
    """The dense network, and its ONNX file if one of the small network is wanted. Its files are
    removed again.
    """
    found = list[Timed]()
    for key in ("safetensors", *(["onnx"] if "onnx" in keys else [])):
        path = stage / f"before-{FORMATS[key].file}"
        write_format(key, before, of_each(torch.clone, trial.rows[0]), path)
        try:
            size, name = path.stat().st_size, "before"
            run: Callable[..., Any] = before
            if key == "onnx":
                path_of_code = stage / "before.py"
                path_of_code.write_text(loaders_source("", trial.name, version("pyro_bmr")))
                run, name = loaded_module(path_of_code).load_onnx(path.name), "before, onnx"
            costs = {"format": name, "file": "", "bytes": size, **counted(before, trial.example)}
            found.append(Timed(costs, run, trial.example))
        finally:
            path.unlink()
            (stage / "before.py").unlink(missing_ok=True)
    return found


def read_format(
    key: str,
    written: nn.Module,
    loaders: ModuleType,
    trial: Trial,
    files: Mapping[str, Mapping[str, Any]],
) -> tuple[Timed, float]:
    """One format, after its file was read back and checked, and how far its outputs differ."""
    form, example = FORMATS[key], trial.example
    run: Callable[..., Any] = written
    differs = 0.0
    if form.loader:
        run, differs = read_back(key, loaders, trial.rows, trial.outputs)
    if form.rounded and differs > _ROUNDED_FAR:
        warn(
            f"deploy: the outputs of format '{key}' differ from the network's by {differs:.0%} of"
            " the largest; score it on held-out rows before it is used, or leave it out of"
            " `formats`"
        )
    size = files[form.file]["bytes"]
    costs = {"format": key, "file": form.file, "bytes": size, **counted(trial.net, example)}
    return Timed(costs, run, of_each(halved, example) if key == "half" else example), differs


def with_shared_calls(timed: Sequence[Timed]) -> list[Timed]:
    """The same formats; one whose file holds the same network as another's is not timed again."""
    runs = {one.costs["format"]: one.run for one in timed}
    likes = [FORMATS[key].like for key in runs]
    return [
        replace(one, like=like) if like and _same_tensors(one.run, runs[like]) else one
        for one, like in zip(timed, likes, strict=True)
    ]


def _same_tensors(a: Callable[..., Any], b: Callable[..., Any]) -> bool:
    """Whether two networks of one class have the same tensors, in the same order in memory."""
    if not isinstance(a, nn.Module) or not isinstance(b, nn.Module):
        return False
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(
        t.dtype == other[name].dtype
        and t.stride() == other[name].stride()
        and torch.equal(t, other[name])
        for name, t in one.items()
    )
