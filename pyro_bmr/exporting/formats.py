"""The formats of an exported network: a function that writes each, and the name of its loader.

The loaders are in the `network.py` that is written beside the files. Owns `FORMATS`. Next:
`written_files.py`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pyro_bmr.data.inputs import Inputs, call_arguments, device_of, pieces
from pyro_bmr.errors import ModelError
from pyro_bmr.exporting.weights_file import save_tensors
from pyro_bmr.shrinking.exported_graph import exportable, shapes_by_name
from pyro_bmr.shrinking.graph_names import without_clashes

# Fraction of zeros: below it compressed rows are slower than dense ones on a CPU.
SPARSE_FROM = 0.97
# of the ranges of activations
_CALIBRATIONS, _ROWS_AT_A_TIME = 16, 64


@dataclass(frozen=True)
class Format:
    """One format. `file`: its name. `loader`: the function of `network.py` that reads it.

    `write`: (network, example of two rows or more, path) → None. `tolerance`: of the outputs that
    the loader gives, relative to the largest. `rounded`: whether numbers are rounded to 8 bits, so
    that what that costs depends on the network; it gets the whole example. `like`: the format
    whose loader gives the same network, if the tensors are the same.
    """

    file: str
    loader: str
    write: Callable[[nn.Module, Inputs, Path], None]
    tolerance: float = 1e-4
    rounded: bool = False
    like: str = ""


def _state_dict(net: nn.Module, example: Inputs, path: Path) -> None:
    # If torch itself writes to a disk that is full, it raises a RuntimeError or ends the process.
    made = io.BytesIO()
    torch.save({name: t.detach().cpu() for name, t in net.state_dict().items()}, made)
    path.write_bytes(made.getbuffer())


def _safetensors(net: nn.Module, example: Inputs, path: Path) -> None:
    save_tensors(net.state_dict(), path)


def _half(net: nn.Module, example: Inputs, path: Path) -> None:
    save_tensors(
        {name: t.half() if t.is_floating_point() else t for name, t in net.state_dict().items()},
        path,
    )


def _program(net: nn.Module, example: Inputs, path: Path) -> None:
    made = io.BytesIO()
    with warnings.catch_warnings(), exportable(net):
        warnings.simplefilter("ignore")  # torch's own deprecations
        given, named, shapes = _open_arguments(net, example)
        program = torch.export.export(without_clashes(net), given, named, dynamic_shapes=shapes)
        torch.export.save(program, made)
    path.write_bytes(made.getbuffer())


def _open_arguments(net: nn.Module, example: Inputs) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The arguments of the forward, and the axes whose length may change: the rows; with several
    inputs, such as texts and their masks, every axis whose length the network does not fix.
    """
    given, named = call_arguments(net, example)
    auto, single = torch.export.Dim.AUTO, isinstance(example, Tensor)
    shapes = tree_map(
        lambda part: dict.fromkeys(range(1 if single else part.ndim), auto),
        (*given, *named.values()),
    )
    return given, named, shapes_by_name(net, given, named, shapes)


def _onnx(net: nn.Module, example: Inputs, path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"format 'onnx': expected the package {error.name}, which is not installed; install it"
            " with: pip install 'pyro_bmr[onnx]'"
        ) from None
    with _quiet_logging(), exportable(net):
        given, named, shapes = _open_arguments(net, example)
        if given and isinstance(given[-1], dict):  # torch would take it for keyword arguments
            given, named = given[:-1], {list(shapes)[-1]: given[-1]}
        torch.onnx.export(
            without_clashes(net),
            given,
            path,
            kwargs=named,
            dynamo=True,
            verbose=False,
            dynamic_shapes=shapes,
            external_data=False,
        )


# `reduce_range`: weights have 7 bits, since processors without the newer instructions (VNNI) add
# products of 8 bits up in 16, which overflow.
def _int8(net: nn.Module, example: Inputs, path: Path) -> None:
    """Weights in 8 bits; the scale of the activations is that of each call."""

    def write(source: Path) -> None:
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(source, path, per_channel=True, reduce_range=True)

    _quantised(net, example, path, write)


def _int8_static(net: nn.Module, example: Inputs, path: Path) -> None:
    """Weights and activations in 8 bits, with the range of the activations on the example."""

    def write(source: Path) -> None:
        from onnxruntime.quantization import quantize_static

        rows = _Rows(source, net, example)
        quantize_static(source, path, rows, per_channel=True, reduce_range=True)

    _quantised(net, example, path, write)


def _quantised(net: nn.Module, example: Inputs, path: Path, write: Callable[[Path], None]) -> None:
    """Writes the network with 8-bit numbers, from its ONNX file, by `write`."""
    with tempfile.TemporaryDirectory() as folder:
        source, prepared = path.with_name("model.onnx"), Path(folder) / "prepared.onnx"
        if not source.exists():  # the format "onnx" is not wanted
            source = Path(folder) / "model.onnx"
            _onnx(net, example, source)
        with _quiet_logging():
            from onnxruntime.quantization import shape_inference

            shape_inference.quant_pre_process(source, prepared, skip_symbolic_shape=True)
            write(prepared)


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """A context without what torch.onnx and onnxruntime log and print of their steps."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Rows:
    """The example in pieces, as onnxruntime reads them to find the range of activations."""

    def __init__(self, source: Path, net: nn.Module, example: Inputs) -> None:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
        names = [part.name for part in session.get_inputs()]
        some = islice(pieces(example, _ROWS_AT_A_TIME), _CALIBRATIONS)
        given = [tree_leaves(call_arguments(net, part)) for part in some]
        self._batches = iter(
            [{n: t.cpu().numpy() for n, t in zip(names, one, strict=True)} for one in given]
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def _prune(net: nn.Module, example: Inputs, path: Path) -> None:
    tensors = dict(net.state_dict())
    for name, parameter in net.named_parameters():
        owner = net.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            tensors[f"{name}_orig"] = tensors.pop(name)
            tensors[f"{name}_mask"] = (parameter != 0).to(parameter.dtype)
    if not any(name.endswith("_mask") for name in tensors):
        raise ModelError(
            "format 'prune': expected a Linear or Conv layer to hold a mask, got a network without"
        )
    save_tensors(tensors, path)


def _csr(net: nn.Module, example: Inputs, path: Path) -> None:
    tensors = dict(net.state_dict())
    zeros = {
        name: float((layer.weight == 0).double().mean())
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Linear) and layer.weight.numel()
    }
    sparse = [name for name, share in zeros.items() if share >= SPARSE_FROM]
    if not sparse:
        most = max(zeros.values(), default=0.0)
        raise ModelError(
            f"format 'csr': expected a Linear layer with at least {SPARSE_FROM:.0%} zeros, got"
            f" {most:.1%} in the sparsest; shrink the network and use 'safetensors'"
        )
    for name in sparse:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that its compressed rows are in beta
            rows = tensors.pop(f"{name}.weight").to_sparse_csr()
        tensors |= {
            f"{name}.crow": rows.crow_indices().int(),
            f"{name}.col": rows.col_indices().int(),
            f"{name}.values": rows.values(),
        }
    save_tensors(tensors, path)


def _semi_structured(net: nn.Module, example: Inputs, path: Path) -> None:
    device = device_of(example)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise ModelError(
            "format '2:4': expected a CUDA device of compute capability 8.0 or more, got the"
            f" network on '{device}'; use 'safetensors' or 'half'"
        )
    tensors = dict(net.state_dict())
    packed = [name for name, layer in net.named_modules() if _is_semi_structured(layer)]
    if not packed:
        raise ModelError(
            "format '2:4': expected a Linear layer with at most two of every four weights and with"
            " sides that are multiples of 32 and 64, got a network without"
        )
    for name in packed:
        weight = tensors.pop(f"{name}.weight").detach().half()
        sparse = torch.sparse.to_sparse_semi_structured(weight)
        tensors |= {f"{name}.weight.packed": sparse.packed, f"{name}.weight.meta": sparse.meta}
    save_tensors(tensors, path)


def _is_semi_structured(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Linear) or layer.in_features % 64 or layer.out_features % 32:
        return False
    fours = layer.weight.detach().half().view(-1, 4)
    return bool((fours.count_nonzero(1) <= 2).all())


FORMATS: Mapping[str, Format] = {
    "state_dict": Format("state_dict.pt", "load_state_dict", _state_dict, like="safetensors"),
    "safetensors": Format("model.safetensors", "load", _safetensors),
    "half": Format("model-half.safetensors", "load", _half, tolerance=2e-2),
    "program": Format("model.pt2", "load_program", _program),
    "onnx": Format("model.onnx", "load_onnx", _onnx),
    "int8": Format("model-int8.onnx", "load_onnx", _int8, tolerance=0.5, rounded=True),
    "int8-static": Format(
        "model-int8-static.onnx", "load_onnx", _int8_static, tolerance=0.5, rounded=True
    ),
    "prune": Format("prune.safetensors", "load_prune", _prune),
    "csr": Format("csr.safetensors", "load_csr", _csr),
    "2:4": Format("semi-structured.safetensors", "", _semi_structured),
}
