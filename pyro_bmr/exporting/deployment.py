"""A network as a folder to ship: files in several formats, a Python file that rebuilds it with
torch alone, and a report of what it costs.

Owns `deploy`. The formats are in `formats.py`, the Python file in `network_source.py`, the figures
in `costs.py`. Next: `baselines/training.py`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._pytree import tree_structure

from pyro_bmr.errors import ModelError, PyroBMRError, PyroBMRWarning
from pyro_bmr.exporting.costs import flops, latency, parameters
from pyro_bmr.exporting.finite import check_network
from pyro_bmr.exporting.formats import FORMATS, Format, save_tensors
from pyro_bmr.exporting.network_source import loaders_source, network_source
from pyro_bmr.files import digest, replacing, write_json
from pyro_bmr.networks.plain_module import module_copy, plain_copy
from pyro_bmr.reduction.collapse import collapse_of
from pyro_bmr.shrinking.graphs import trace
from pyro_bmr.shrinking.refusals import MASKED, first_line
from pyro_bmr.shrinking.verification import (
    Answers,
    answers,
    difference,
    disagreement,
    inputs_like,
    leaves,
)

if TYPE_CHECKING:
    import pandas as pd

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
    """Writes `net` to `folder` in each format, with `network.py` and `report.json`, and returns the
    table of what each costs.

    Every file is read back by its loader in `network.py` and has to give the outputs of `net` in
    evaluation mode before any of them is put in the folder; either all files are there afterwards
    or none is new. Files that an earlier `deploy` wrote there, such as another format or an
    ensemble, go.

    `net` is left as it is, in the mode that it has. Where it cannot be written as Python of torch
    alone, `network.py` holds the loaders without the class, which is said by a PyroBMRWarning and,
    as `not_in_python`, in the report.

    Args:
        net: an exported network, shrunk or not; plain torch, with one input tensor and outputs of
            any structure.
        example: rows of the input.
        formats: of `FORMATS`: state_dict, safetensors, half, program (torch.export), onnx, prune
            (masks of torch.nn.utils.prune), csr, 2:4. safetensors is always written.
        before: the dense network, for the first row of the table.
        ensemble: name → stacked draws, from `ensemble`; written as ensemble.safetensors.
        report: kept in report.json as it is: ΔF, kept, prior, data, seed; to its `warnings`
            (`Reduction.warnings`) comes one of empty layers.
        seconds: for each measurement of a latency.

    Returns:
        DataFrame: One row per format: format, file, bytes, parameters, nonzero, FLOPs (per row of
            the input), and the median latency in milliseconds on one thread at batch 1 and 128.

    Raises:
        ModelError: a format is not one of the list or not to be had here, or does not give the
            outputs of `net`.
        PyroBMRError: the folder cannot be written.
    """
    import pandas as pd

    wanted = list(dict.fromkeys(["safetensors", *formats]))
    for name in wanted:
        if name not in FORMATS:
            raise ModelError(f"no format '{name}'; the formats are: {', '.join(FORMATS)}")
    if not isinstance(example, Tensor) or example.ndim < 1 or len(example) < 1:
        got = (
            f"shape {tuple(example.shape)}"
            if isinstance(example, Tensor)
            else type(example).__name__
        )
        raise ModelError(
            f"deploy: example: expected rows of the network's input, as one tensor, got {got}"
        )
    plain = plain_copy(net)
    check_network(plain, "deploy")
    rows = [example[torch.arange(max(2, min(len(example), 16))) % len(example)]]
    rows.append(rows[0].repeat_interleave(2, 0)[:3])  # another number of rows
    outputs = answers(plain, rows, double=False)
    if outputs.outputs[0] is None or not outputs.outputs[0]:
        raise ModelError(
            f"deploy: {type(net).__name__} gives no tensor on rows of the example, of shape"
            f" {tuple(rows[0].shape)} ({outputs.error})"
        )
    folder = Path(folder)
    with replacing(folder, "report.json", "network.py", gone=_written_before(folder)) as inside:
        table = (
            []
            if before is None
            else [
                _before(
                    plain_copy(before), rows[0], example, seconds, inside / "before.safetensors"
                )
            ]
        )
        written, reason = _network_file(
            plain, f"{type(net).__name__}, pruned", rows, inside / "network.py"
        )
        for key in wanted:
            _write(key, written, rows[0].clone(), inside / FORMATS[key].file)
        if ensemble is not None:
            save_tensors(ensemble, inside / "ensemble.safetensors")
        paths = sorted(p for p in inside.iterdir() if p.is_file())
        files: dict[str, dict[str, Any]] = {
            p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in paths
        }
        loaders = _module(inside / "network.py")
        if reason:
            vars(loaders)["Network"] = lambda: module_copy(plain)
        for key in wanted:
            form = FORMATS[key]
            run = _checked(key, form, loaders, rows, outputs) if form.loader else written
            inputs = example.half() if key == "half" and example.is_floating_point() else example
            table.append(
                _row(key, form.file, files[form.file]["bytes"], plain, run, inputs, seconds)
            )
        if ensemble is not None:
            loaders.load_ensemble()
        frame = pd.DataFrame(table)
        content = {
            "format": "pyro_bmr report 2",
            "version": version("pyro_bmr"),
            "network": type(net).__name__,
            "input": {
                "shape": list(example.shape[1:]),
                "dtype": str(example.dtype).removeprefix("torch."),
            },
            **({"not_in_python": reason} if reason else {}),
            **(report or {}),
            "warnings": list(
                dict.fromkeys(
                    [*(report or {}).get("warnings", ()), *collapse_of(written.state_dict())]
                )
            ),
            "costs": table,
            "files": files,
            "tensors": {
                k: {"shape": list(t.shape), "nonzero": int(t.count_nonzero())}
                for k, t in written.state_dict().items()
            },
        }
        write_json(inside / "report.json", content)
    if reason:
        warnings.warn(
            f"deploy: {type(net).__name__} cannot be written as Python of torch alone ({reason});"
            " network.py reads the other files without its class, ask for the format 'program' to"
            " run it without yours",
            PyroBMRWarning,
            stacklevel=3,  # past torch.no_grad
        )
    return frame


def _written_before(folder: Path) -> list[str]:
    """The names of the files that the report in a folder lists; none if there is no report of a
    deployment.
    """
    try:
        files = json.loads((folder / "report.json").read_text(encoding="utf-8"))["files"]
        return [name for name in files if Path(name).name == name and (folder / name).is_file()]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def _network_file(
    plain: nn.Module, title: str, rows: list[Tensor], path: Path
) -> tuple[nn.Module, str]:
    """Writes `network.py`. The network whose tensors it wants, and why it has no class of its own:
    empty if it has, and gives the outputs of `plain`.
    """
    inputs = [*rows, *inputs_like(rows[0], plain)]
    try:
        graph = trace(module_copy(plain))
        path.write_text(network_source(graph, title, version("pyro_bmr")), encoding="utf-8")
        net = _module(path).with_weights(
            {name: t.detach() for name, t in graph.state_dict().items()}
        )
        reason = disagreement(
            answers(plain, inputs, double=False), answers(net, inputs, double=False)
        )
        if reason:
            raise ModelError(f"written so, {reason}")
        if tree_structure(net(rows[0].clone())) != tree_structure(plain(rows[0].clone())):
            raise ModelError("written so, its outputs lose their structure")
        return graph, ""
    # whatever a user's forward raises when it meets a proxy, or a line of Python that is not what
    # it was
    except Exception as error:
        reason = (
            str(error).removesuffix(f"; {MASKED}")
            if isinstance(error, PyroBMRError)
            else f"{type(error).__name__}: {first_line(error)}"
        )
    path.write_text(loaders_source(reason, title, version("pyro_bmr")), encoding="utf-8")
    return plain, reason


def _before(
    before: nn.Module, rows: Tensor, example: Tensor, seconds: float, path: Path
) -> dict[str, Any]:
    _write("safetensors", before, rows.clone(), path)
    try:
        return _row("before", "", path.stat().st_size, before, before, example, seconds)
    finally:
        path.unlink()


def _write(key: str, net: nn.Module, rows: Tensor, path: Path) -> None:
    try:
        FORMATS[key].write(net, rows, path)
    except PyroBMRError:
        raise
    except (OSError, SafetensorError) as error:
        raise PyroBMRError(
            f"cannot write '{path.name}': {getattr(error, 'strerror', None) or error}"
        ) from None
    # whatever torch.export, onnx or safetensors raise when they meet what they do not know
    except Exception as error:
        raise ModelError(
            f"format '{key}' cannot hold this network ({type(error).__name__}:"
            f" {first_line(error)}); leave it out of `formats`"
        ) from None


def _module(path: Path) -> ModuleType:
    module = ModuleType("pyro_bmr_written_network")
    module.__file__ = str(path)
    # an import would leave its cache in the folder
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
    return module


def _checked(
    key: str, form: Format, loaders: ModuleType, rows: list[Tensor], outputs: Answers
) -> Callable[[Tensor], Any]:
    try:
        run: Any = getattr(loaders, form.loader)(form.file)
        if isinstance(run, nn.Module):
            run = run.to(rows[0].device)
        inputs = [x.half() if key == "half" and x.is_floating_point() else x.clone() for x in rows]
        got = [
            leaves(run(x))
            for x, want in zip(inputs, outputs.outputs, strict=True)
            if want is not None
        ]
    # whatever a program or a session raises that was written for other rows
    except Exception as error:
        raise ModelError(
            f"format '{key}': read back, it does not run ({type(error).__name__}:"
            f" {first_line(error)}); leave it out of `formats`"
        ) from None
    for want, have in zip((want for want in outputs.outputs if want is not None), got, strict=True):
        wrong, size = difference(want, have)
        if not wrong <= form.tolerance * max(size, 1e-3):
            raise ModelError(
                f"format '{key}': read back, its outputs differ from the network's by {wrong:.2g},"
                f" where the largest is {size:.2g}"
            )
    return run  # type: ignore[no-any-return]


def _row(
    key: str,
    file: str,
    size: int,
    net: nn.Module,
    run: Callable[[Tensor], Any],
    example: Tensor,
    seconds: float,
) -> dict[str, Any]:
    dtypes = (p.dtype for p in net.parameters() if p.is_floating_point())
    like = example.to(next(dtypes, example.dtype)) if example.is_floating_point() else example
    try:
        times = {f"ms at batch {batch}": latency(run, example, batch, seconds) for batch in BATCHES}
    except Exception as error:  # a forward that wants its own number of rows
        raise ModelError(
            f"format '{key}' does not run on batches of {BATCHES} rows ({type(error).__name__}:"
            f" {first_line(error)})"
        ) from None
    return {
        "format": key,
        "file": file,
        "bytes": size,
        **parameters(net),
        "FLOPs": flops(net, like),
        **times,
    }
