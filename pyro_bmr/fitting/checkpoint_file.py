"""The file of a checkpoint: safetensors, with all that is no tensor as JSON in its header, and a
SHA-256 of everything. Nothing is pickled or unpickled.

Owns `write` and `read`. Next: `processes.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_bmr.errors import FitError
from pyro_bmr.files import reading, write_atomically

_KIND, _VERSION = "pyro_bmr checkpoint", 3
_FORMAT = f"{_KIND} {_VERSION}"


class OtherFormat(FitError):
    """A checkpoint that another version of the library has written, in a format of its own."""


def write(path: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint so that `path` is either whole or not there.

    Raises:
        FitError: the state holds something that is no tensor, number, string or container of such.
        PyroBMRError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    texts = {"settings": json.dumps(settings), "state": json.dumps(_packed(state, "", tensors, {}))}
    metadata = {"format": _FORMAT, **texts, "sha256": digest(tensors, *texts.values())}
    write_atomically(path, lambda p: save_file(tensors, p, metadata=metadata), durable=True)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the state in a checkpoint; nothing is unpickled.

    Raises:
        FitError: it is damaged, or no checkpoint.
        OtherFormat: another version of the library has written it.
    """
    damage = f"'{path}' is damaged, or no checkpoint", FitError, "remove it"
    opened: Any = partial(safe_open, path, framework="pt")
    with reading(*damage), opened() as file:
        metadata = file.metadata() or {}
    _check_format(path, metadata.get("format", ""))
    with reading(*damage):
        with opened() as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        texts = metadata["settings"], metadata["state"]
        if digest(tensors, *texts) != metadata["sha256"]:
            raise ValueError("its SHA-256 is not that of its contents")
        settings, state = json.loads(texts[0]), _unpacked(json.loads(texts[1]), tensors)
        if not (isinstance(settings, dict) and isinstance(state, dict)):
            raise ValueError("settings or state are no objects")
    return settings, state


def _check_format(path: Path, found: str) -> None:
    """Raises FitError unless a file says that it is a checkpoint; OtherFormat if it is one of
    another format.
    """
    if found == _FORMAT:
        return
    if not found.startswith(_KIND):
        raise FitError(
            f"'{path}' is no checkpoint: expected {_FORMAT!r} in it, got {found!r}; remove it"
        )
    raise OtherFormat(
        f"'{path}': expected a checkpoint of format {_VERSION}, got format"
        f" {found.removeprefix(_KIND).strip()}, which another version of pyro_bmr has written;"
        " finish the fit with that version, or begin it in another folder"
    )


def digest(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """The SHA-256 of texts and of named tensors."""
    content = hashlib.sha256("\0".join(texts).encode())
    for name, tensor in sorted(tensors.items()):
        content.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        content.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
    return content.hexdigest()


def _packed(value: Any, where: str, tensors: dict[str, Tensor], names: dict[Any, str]) -> Any:
    """`value` as JSON, its tensors added to `tensors` under the path that leads to them, each
    once.
    """
    inner = partial(_packed, tensors=tensors, names=names)
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        key = (
            (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else where
        )
        if key not in names:
            names[key] = where
            storage = ("storage", plain.untyped_storage().data_ptr())
            tensors[where] = plain.clone() if storage in names else plain
            names[storage] = where
        return {"__tensor__": names[key]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"__tuple__": [inner(v, f"{where}/{k}") for k, v in enumerate(value)]}
    if isinstance(value, list):
        return [inner(v, f"{where}/{k}") for k, v in enumerate(value)]
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("__") for k in value):
            return {k: inner(v, f"{where}/{k}") for k, v in value.items()}
        return {
            "__items__": [
                [inner(k, f"{where}/key"), inner(v, f"{where}/{k}")] for k, v in value.items()
            ]
        }
    raise FitError(
        f"checkpoint: {where[1:]} is a {type(value).__name__}, which cannot be saved without"
        " pickling; fit without checkpoint, or without it"
    )


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__tuple__" in value:
        return tuple(_unpacked(v, tensors) for v in value["__tuple__"])
    if "__items__" in value:
        return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in value["__items__"]}
    return {k: _unpacked(v, tensors) for k, v in value.items()}
