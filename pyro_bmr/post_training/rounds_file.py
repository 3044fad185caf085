"""The state after a round, in a file, from which a pruning that was stopped continues.

Owns `write_round` and `read_round`. Next: `groups.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_bmr.errors import ModelError
from pyro_bmr.files import make_folder, reading, write_atomically

_FILE = "round.safetensors"


def write_round(
    folder: Path, about: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Writes tensors and state, in the place of those of the round before."""
    make_folder(folder)
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    words = {"about": about, "state": json.dumps(dict(state))}
    write_atomically(folder / _FILE, lambda path: save_file(plain, path, words))


def read_round(folder: Path, about: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state; None if no round has been written yet.

    Raises:
        ModelError: the file is damaged, or of another network or other arguments.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    with (
        reading(f"'{path}' is damaged", ModelError, "delete it to begin again"),
        safe_open(path, "pt") as file,
    ):
        words = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state: dict[str, Any] = json.loads(words["state"])
    if words["about"] != about:
        raise ModelError(
            f"checkpoint='{folder}': it is of another network or of other arguments; give another"
            " folder, or delete it to begin again"
        )
    return tensors, state


def about_call(parameters: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> str:
    """What tells a call from others: its weights and arguments."""
    plain = {name: value for name, value in arguments.items() if not isinstance(value, Mapping)}
    digest = hashlib.sha256(repr(sorted(plain.items())).encode())
    labels = {
        f"{key} {name}": value
        for key in sorted(arguments.keys() - plain.keys())
        for name, value in sorted(arguments[key].items())
    }
    for name, value in {**labels, **parameters}.items():
        digest.update(name.encode())
        whole = torch.as_tensor(value).detach().cpu().contiguous()
        digest.update(repr(tuple(whole.shape)).encode() + whole.double().numpy().tobytes())
    return digest.hexdigest()[:16]
