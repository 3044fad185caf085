"""A network as a folder to ship: files in several formats, a Python file that rebuilds it with torch alone, and a report of what it costs.

Owns `deploy`. The formats are in `formats.py`, the Python file in `network_source.py`, the figures in `costs.py`. Next: `data_set.py`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pyro_bmr.errors import ModelError, PyroBMRError
from pyro_bmr.exporting.costs import flops, latency, parameters
from pyro_bmr.exporting.formats import FORMATS, Format, save_tensors
from pyro_bmr.exporting.network_source import network_source
from pyro_bmr.files import replacing, write_json
from pyro_bmr.shrinking.graphs import trace

BATCHES = (1, 128)


@torch.no_grad()
def deploy(
    net: nn.Module,
    folder: str | Path,
    example: Tensor,
    *,
    formats: Iterable[str] = ("safetensors",),
    before: nn.Module | None = None,
    ensemble: Mapping[str, Tensor] | None = None,
    report: Mapping[str, Any] | None = None,
    seconds: float = 0.3,
) -> pd.DataFrame:
    """Writes `net` to `folder` in each format, with `network.py` and `report.json`, and returns the table of what each costs.

    Every file is read back by its loader in `network.py` and has to give the outputs of `net` before any of them is put in the folder; either all
    files are there afterwards or none is new. Files that an earlier `deploy` wrote there, such as another format or an ensemble, go.

    Args:
        net: an exported network, shrunk or not; plain torch, traceable by `torch.fx`.
        example: rows of the input.
        formats: of `FORMATS`: state_dict, safetensors, half, program (torch.export), onnx, prune (masks of torch.nn.utils.prune), csr, 2:4.
            safetensors is always written.
        before: the dense network, for the first row of the table.
        ensemble: name → stacked draws, from `ensemble`; written as ensemble.safetensors.
        report: kept in report.json as it is: ΔF, kept, prior, data, seed.
        seconds: for each measurement of a latency.

    Returns:
        One row per format: format, file, bytes, parameters, nonzero, FLOPs (per row of the input), and the median latency in milliseconds on
        one thread at batch 1 and 128.

    Raises:
        ModelError: a format is not one of the list or not to be had here, or does not give the outputs of `net`.
        PyroBMRError: the folder cannot be written.
    """
    wanted = list(dict.fromkeys(["safetensors", *formats]))
    for name in wanted:
        if name not in FORMATS:
            raise ModelError(f"no format '{name}'; the formats are: {', '.join(FORMATS)}")
    graph = trace(copy.deepcopy(net))
    rows = example[torch.arange(max(2, min(len(example), 16))) % len(example)]
    outputs = net.eval()(rows)
    folder = Path(folder)
    with replacing(folder, "report.json", "network.py", gone=_written_before(folder)) as inside:
        table, files = [], dict[str, dict[str, Any]]()
        if before is not None:
            _write(FORMATS["safetensors"], before, rows, inside / "before.safetensors")
            table.append(_row("before", "", (inside / "before.safetensors").stat().st_size, before, before, example, seconds))
            (inside / "before.safetensors").unlink()
        (inside / "network.py").write_text(network_source(graph, f"{type(net).__name__}, pruned", version("pyro_bmr")))
        for key in wanted:
            form = FORMATS[key]
            _write(form, graph, rows, inside / form.file)
        if ensemble is not None:
            save_tensors(ensemble, inside / "ensemble.safetensors")
        files = {p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in sorted(inside.iterdir())}
        loaders = _module(inside / "network.py")
        for key in wanted:
            form = FORMATS[key]
            run = _checked(key, form, loaders, rows, outputs) if form.loader else graph
            inputs = example.half() if key == "half" and example.is_floating_point() else example
            table.append(_row(key, form.file, files[form.file]["bytes"], net, run, inputs, seconds))
        if ensemble is not None:
            loaders.load_ensemble()
        frame = pd.DataFrame(table)
        content = {
            "format": "pyro_bmr report 2",
            "version": version("pyro_bmr"),
            "network": type(net).__name__,
            "input": {"shape": list(example.shape[1:]), "dtype": str(example.dtype).removeprefix("torch.")},
            **(report or {}),
            "costs": table,
            "files": files,
            "tensors": {k: {"shape": list(t.shape), "nonzero": int(t.count_nonzero())} for k, t in graph.state_dict().items()},
        }
        write_json(inside / "report.json", content)
    return frame


def _written_before(folder: Path) -> list[str]:
    """The names of the files that the report in a folder lists; none if there is no report of a deployment."""
    try:
        files = json.loads((folder / "report.json").read_text(encoding="utf-8"))["files"]
        return [name for name in files if Path(name).name == name and (folder / name).is_file()]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def _write(form: Format, net: nn.Module, rows: Tensor, path: Path) -> None:
    try:
        form.write(net, rows, path)
    except (OSError, SafetensorError) as error:
        raise PyroBMRError(f"cannot write '{path.name}': {getattr(error, 'strerror', None) or error}") from None


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pyro_bmr_written_network", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _checked(key: str, form: Format, loaders: ModuleType, rows: Tensor, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    run: Any = getattr(loaders, form.loader)(form.file)
    if isinstance(run, nn.Module):
        run = run.to(rows.device)
    got = run(rows.half() if key == "half" and rows.is_floating_point() else rows)
    error, size = float((got.to(outputs) - outputs).abs().max()), float(outputs.abs().max())
    if not error <= form.tolerance * max(size, 1e-3):
        raise ModelError(f"format '{key}': read back, its outputs differ from the network's by {error:.2g}, where the largest is {size:.2g}")
    return run  # type: ignore[no-any-return]


def _row(key: str, file: str, size: int, net: nn.Module, run: Callable[[Tensor], Tensor], example: Tensor, seconds: float) -> dict[str, Any]:
    like = example.to(next((p.dtype for p in net.parameters()), example.dtype)) if example.is_floating_point() else example
    times = {f"ms at batch {batch}": latency(run, example, batch, seconds) for batch in BATCHES}
    return {"format": key, "file": file, "bytes": size, **parameters(net), "FLOPs": flops(net, like), **times}
