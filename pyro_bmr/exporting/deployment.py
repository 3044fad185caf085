"""A network as a folder with all that it needs to run.

It holds files in several formats, a Python file that rebuilds the network with torch alone, and a
report of what it costs. Owns `deploy`. The formats are in `formats.py`, the Python file in
`network_source.py`, the costs in `costs.py`. Next: `deployed_folder.py`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_bmr.data.given import example_of
from pyro_bmr.data.inputs import described as shapes_of
from pyro_bmr.data.inputs import device_of, has_rows, of_each, parts_of, rows_in
from pyro_bmr.errors import ModelError, PyroBMRWarning, described
from pyro_bmr.exporting.cost_table import Trial, dense_networks, read_format, with_shared_calls
from pyro_bmr.exporting.costs import Timed, with_latencies
from pyro_bmr.exporting.finite import check_network
from pyro_bmr.exporting.formats import FORMATS
from pyro_bmr.exporting.weights_file import save_tensors
from pyro_bmr.exporting.written_files import loaded_module, write_format, write_network_file
from pyro_bmr.files import digest, replacing, write_json
from pyro_bmr.networks.plain_module import module_copy, plain_copy
from pyro_bmr.reduction.collapse import collapse_of
from pyro_bmr.shrinking.latency import one_thread, processor
from pyro_bmr.shrinking.verification import answers

if TYPE_CHECKING:
    import pandas as pd


@torch.no_grad()
def deploy(
    net: nn.Module,
    folder: str | Path,
    example: Any,
    *,
    formats: Iterable[str] = ("safetensors",),
    before: nn.Module | None = None,
    ensemble: Mapping[str, Tensor] | None = None,
    report: Mapping[str, Any] | None = None,
    seconds: float = 0.3,
    batches: Sequence[int] = (1, 128),
) -> pd.DataFrame:
    """Writes `net` to `folder` in each format, with `network.py` and `report.json`.

    Before any file is put in the folder, each is read back by its loader in `network.py` and has to
    give the outputs of `net` in evaluation mode. If one does not, the folder is left as it was.
    Files that an earlier `deploy` wrote there are removed, such as another format or an ensemble.

    `net` is not changed, nor is its mode. If it cannot be written as Python that needs torch alone,
    `network.py` holds the loaders without the class; a PyroBMRWarning says so, and `not_in_python`
    in the report.

    Args:
        net: an exported network, shrunk or not: plain torch, with outputs of any structure. A
            network of several inputs has no class in `network.py`.
        example: rows of the input, or data that have them, such as a loader; of several inputs a
            tuple or a dict.
        formats: of `FORMATS`: state_dict, safetensors, half, program (torch.export), onnx, int8 and
            int8-static (8-bit numbers in ONNX; the range of the activations is that of each call,
            or of `example`), prune (masks of torch.nn.utils.prune), csr, 2:4. safetensors is always
            written.
        before: the dense network, for the first row of the table, and with onnx for the second.
        ensemble: name → stacked draws, from `ensemble`; written as ensemble.safetensors.
        report: written unchanged to report.json: ΔF, kept, prior, data, seed. A warning of empty
            layers is added to its `warnings` (`Reduction.warnings`).
        seconds: for each measurement of a latency, and at least three calls; the networks take
            turns.
        batches: the numbers of rows at which it is measured.

    Returns:
        DataFrame: One row per format: format, file, bytes, parameters, nonzero, FLOPs (per row of
            the input), the latency in milliseconds on one thread at each of `batches` (the median,
            the time that nine of ten calls stay under, and the number of calls behind both), and
            the largest difference of its outputs from the network's, over the largest output. A
            file with the same network as another has the other's latency; `latency of` names it.
            The report names the machine.

    Raises:
        ModelError: a format is not in the list, is not available here, or does not give the outputs
            of `net`.
        PyroBMRError: the folder cannot be written.
    """
    import pandas as pd

    keys = _checked_formats(formats)
    trial, folder = _trial(net, example, seconds, tuple(batches)), Path(folder)
    gone = _written_before(folder)
    with replacing(folder, "report.json", "network.py", gone=gone) as stage, one_thread():
        dense = [] if before is None else dense_networks(plain_copy(before), trial, stage, keys)
        costs, reason = _filled(stage, trial, keys, dense, ensemble, report or {})
    if reason:
        warnings.warn(
            f"deploy: {trial.name} cannot be written as Python of torch alone ({reason});"
            " network.py reads the other files without its class. Use the format 'program' to run"
            " the network where its class is not installed",
            PyroBMRWarning,
            stacklevel=3,  # past torch.no_grad
        )
    return pd.DataFrame(costs)


def _trial(net: nn.Module, example: Any, seconds: float, batches: tuple[int, ...]) -> Trial:
    example = example_of(example, net)
    if not has_rows(example) or rows_in(example) < 1:
        raise ModelError(
            "deploy: example: expected rows of the network's input, as one tensor, got"
            f" {described(example)}; several inputs are a tuple or a dict of tensors"
        )
    plain, name = plain_copy(net), type(net).__name__
    check_network(plain, "deploy")
    tensors = (*plain.parameters(), *plain.buffers())
    where = next((t.device for t in tensors), device_of(example))
    example = of_each(lambda t: t.to(where), example)
    count = rows_in(example)
    some = torch.arange(max(2, min(count, 16)), device=where) % count
    rows = [of_each(itemgetter(index), example) for index in (some, some[[0, 0, 1]])]
    outputs = answers(plain, rows, double=False)
    if outputs.outputs[0] is None or not outputs.outputs[0]:
        raise ModelError(
            f"deploy: {name} gives no tensor on rows of the example, of"
            f" {shapes_of(rows[0])} ({outputs.error})"
        )
    return Trial(plain, name, rows, outputs, example, seconds, batches)


def _filled(
    stage: Path,
    trial: Trial,
    keys: list[str],
    dense: list[Timed],
    ensemble: Mapping[str, Tensor] | None,
    report: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], str]:
    """The costs of `dense` and of all formats, and why there is no class in `network.py`.

    The files are written to `stage`, read back and compared with the network.
    """
    title, path = f"{trial.name}, pruned", stage / "network.py"
    written, reason = write_network_file(trial.net, title, trial.rows, path)
    for key in keys:
        rows = trial.example if FORMATS[key].rounded else trial.rows[0]
        write_format(key, written, of_each(torch.clone, rows), stage / FORMATS[key].file)
    if ensemble is not None:
        save_tensors(ensemble, stage / "ensemble.safetensors")
    files = _file_table(stage)
    loaders = loaded_module(path)
    if reason:
        vars(loaders)["Network"] = lambda: module_copy(trial.net)
    read = [read_format(key, written, loaders, trial, files) for key in keys]
    timed = [*dense, *with_shared_calls([one for one, _ in read])]
    costs = with_latencies(timed, trial.seconds, trial.batches)
    for row, (_, differs) in zip(costs[len(dense) :], read, strict=True):
        row["difference"] = differs
    if ensemble is not None:
        loaders.load_ensemble()
    tensors = written.state_dict()
    content = _report(trial, reason, report, costs, files, tensors)
    write_json(stage / "report.json", content)
    return costs, reason


def _checked_formats(formats: Iterable[str]) -> list[str]:
    """The formats to write, each once; safetensors is the first.

    Raises:
        ModelError: a format is unknown.
    """
    keys = list(dict.fromkeys(["safetensors", *formats]))
    for key in keys:
        if key not in FORMATS:
            raise ModelError(f"no format '{key}'; the formats are: {', '.join(FORMATS)}")
    return keys


def _written_before(folder: Path) -> list[str]:
    """The names of the files that the report of an earlier deployment lists; none without one."""
    try:
        files = json.loads((folder / "report.json").read_text(encoding="utf-8"))["files"]
        return [name for name in files if Path(name).name == name and (folder / name).is_file()]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def _file_table(stage: Path) -> dict[str, dict[str, Any]]:
    """Name → size and SHA-256 of each file."""
    paths = sorted(path for path in stage.iterdir() if path.is_file())
    return {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in paths}


def _report(
    trial: Trial,
    reason: str,
    report: Mapping[str, Any],
    costs: list[dict[str, Any]],
    files: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """The content of report.json; `report`: what the user adds to it."""
    kinds = {
        name: {"shape": list(t.shape[1:]), "dtype": str(t.dtype).removeprefix("torch.")}
        for name, t in parts_of(trial.example, "").items()
    }
    said = [*report.get("warnings", ()), *collapse_of(tensors)]
    return {
        "format": "pyro_bmr report 2",
        "version": version("pyro_bmr"),
        "network": trial.name,
        "input": kinds[""] if isinstance(trial.example, Tensor) else kinds,
        **({"not_in_python": reason} if reason else {}),
        "machine": {"processor": processor(), "threads": 1, "torch": torch.__version__},
        **report,
        "warnings": list(dict.fromkeys(said)),
        "costs": costs,
        "files": files,
        "tensors": {
            name: {"shape": list(t.shape), "nonzero": int(t.count_nonzero())}
            for name, t in tensors.items()
        },
    }
