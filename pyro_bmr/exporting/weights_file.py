"""The weights of a network or a program as files that load where Pyro is not installed.

Owns `save` (model.safetensors and report.json) and `save_tensors`. Next: `costs.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pyro_bmr.errors import ModelError
from pyro_bmr.exporting.finite import check_finite, check_network
from pyro_bmr.files import digests, replacing, write_atomically, write_json
from pyro_bmr.networks.plain_module import plain_module
from pyro_bmr.reduction.collapse import collapse_of


def save(
    weights: nn.Module | Mapping[str, Tensor],
    folder: str | Path,
    report: Mapping[str, Any] | None = None,
) -> None:
    """Writes `model.safetensors` (a state_dict) and `report.json` to `folder`.

    Neither file is ever left half written, or beside an older version of the other. A module is
    saved in its plain form (`plain_module`), so that the file loads where nothing is compiled,
    wrapped or pruned by hooks. `report` is written unchanged, beside the parameter names, shapes,
    numbers of non-zeros, and the SHA-256 of the file. A warning of empty layers is added to its
    `warnings` (`Reduction.warnings`). Load with
    `net.load_state_dict(safetensors.torch.load_file(path))`.

    Raises:
        ModelError: a tensor is not finite or cannot be written, or the report is no JSON; nothing
            is written then.
        PyroBMRError: the folder cannot be written.
    """
    tensors = _checked_tensors(weights)
    said = list(dict.fromkeys([*(report or {}).get("warnings", ()), *collapse_of(tensors)]))
    with replacing(Path(folder), "report.json") as stage:
        write_atomically(stage / "model.safetensors", lambda path: save_tensors(tensors, path))
        content = {
            "format": "pyro_bmr report 1",
            **(report or {}),
            "warnings": said,
            "files": {name: {"sha256": sha256} for name, sha256 in digests(stage).items()},
            "tensors": {name: _about(t) for name, t in tensors.items()},
        }
        write_json(stage / "report.json", content)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes one safetensors file; tied tensors are stored once each, as safetensors requires."""
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)


def _about(tensor: Tensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "nonzero": int(tensor.count_nonzero()),
    }


def _checked_tensors(weights: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name → tensor of what is to be saved.

    Raises:
        ModelError: a tensor is not finite, or is of a kind that safetensors cannot hold.
    """
    if isinstance(weights, nn.Module):
        plain = plain_module(weights).net
        tensors = dict(plain.state_dict())
        _check_kinds(tensors)
        check_network(plain, "save")
        return tensors
    if not isinstance(weights, Mapping) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise ModelError(
            "save: expected a network or a mapping from names to tensors, got"
            f" {type(weights).__name__}"
        )
    tensors = dict(weights)
    _check_kinds(tensors)
    check_finite(tensors, "save")
    return tensors


def _check_kinds(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if kind := _unstorable(tensor):
            raise ModelError(
                f"save: tensor '{name}': expected dense values of a dtype that safetensors has,"
                f" such as float32 or complex64, got a tensor {kind}"
            )


def _unstorable(tensor: Tensor) -> str:
    """What keeps safetensors from holding a tensor; empty if nothing does."""
    if nn.parameter.is_lazy(tensor):
        return "without a shape"
    dense = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)
    if dense and tensor.dtype != torch.complex128:
        return ""
    return f"of {tensor.dtype}, {tensor.layout}, on '{tensor.device}'"
