"""The files of what is shared out: torch's distributed checkpoints, in safetensors. They are read
by any number of processes, and nothing is unpickled.

Owns `begin_parts`, `written_parts`, `check_parts` and `read_parts`. torch's own format for such
checkpoints has pickled metadata; that of its `HuggingFaceStorageWriter` has none. Next:
`sharded_checkpoints.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from pyro_bmr.errors import FitError
from pyro_bmr.files import digest
from pyro_bmr.sharding.layout import Layout

_SHA256 = 32  # bytes


class _Copied(BlockingAsyncStager):
    """For tensors that are copies already."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict


def begin_parts(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    layout: Layout,
    group: dist.ProcessGroup,
) -> Future[Any]:
    """Copies this process's part of `tensors` (name → site → part) and begins to write it; a call
    of all processes. `group`: the processes, for messages of the thread that writes.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    # on a CPU async_save copies twice, and refuses a view (findings/async_save_views.sh)
    copied = layout.device.type == "cpu"
    state = {
        f"{name}/{site}": layout.dtensor(site, part.clone() if copied else part)
        for name, parts in tensors.items()
        for site, part in parts.items()
    }
    storage = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    begun = async_save(
        state,
        storage_writer=storage,
        process_group=group,
        async_stager=_Copied() if copied else None,
    )
    return cast("Future[Any]", begun)


def written_parts(folder: Path, group: dist.ProcessGroup) -> dict[str, str]:
    """The SHA-256 of the files of all processes by name, which are written; a call of all of
    them.
    """
    own = sorted(folder.glob(f"*{dist.get_rank() + 1:05d}-model-*.safetensors"))
    name = own[0].name if own else ""
    found: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (name, digest(own[0]) if own else ""), group)
    return {name: sha256 for name, sha256 in filter(None, found) if name}


def check_parts(folder: Path, files: Mapping[str, str], layout: Layout) -> None:
    """Checks the SHA-256 of each of the `files`, some in each process; a call of all of them.

    Raises:
        FitError: in all processes, if a file is damaged or missing.
    """
    wrong = torch.zeros(1, device=layout.device)
    for path, sha256 in sorted(files.items())[dist.get_rank() :: dist.get_world_size()]:
        file = folder / Path(path).name
        wrong += not (file.is_file() and digest(file) == sha256)
    dist.all_reduce(wrong)
    if wrong.item():
        raise FitError(
            f"'{folder}': {int(wrong)} of {len(files)} files are damaged or missing; remove it and"
            " the file beside it"
        )


def read_parts(
    folder: Path, names: Mapping[str, torch.dtype], like: Mapping[str, Tensor], layout: Layout
) -> dict[str, dict[str, Tensor]]:
    """Name → site → this process's part, of the shape that `like` has, with any number of
    processes; a call of all of them. `names`: of the tensors of each site, and their dtypes.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found = {
        name: {site: torch.zeros_like(part, dtype=dtype) for site, part in like.items()}
        for name, dtype in names.items()
    }
    state = {
        f"{name}/{site}": layout.dtensor(site, part)
        for name, parts in found.items()
        for site, part in parts.items()
    }
    load(state, storage_reader=HuggingFaceStorageReader(str(folder)))
    return {
        name: {site: state[f"{name}/{site}"].to_local() for site in parts}
        for name, parts in found.items()
    }
