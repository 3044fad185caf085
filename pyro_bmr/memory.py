"""The memory that an allocation would take and that its device has left, so that one which cannot
succeed is refused before any work.

Owns `free_bytes`, `training_bytes`, `check_memory`, and `return_freed`. Next: `isolation.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from pathlib import Path

import torch

from pyro_bmr.errors import ModelError

_GROUP = Path("/sys/fs/cgroup")  # limits of a container, control groups version 2
_SYSTEM = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> float:
    """The bytes that are free on `device`: on a GPU its free memory, on the machine the available
    memory within the limit of its container; infinite if the system does not say.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    found = [math.inf]
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(
            line.split(":", 1)
            for line in _SYSTEM.read_text(encoding="utf-8").splitlines()
            if ":" in line
        )
        found.append(1024.0 * int(lines["MemAvailable"].split()[0]))
    with contextlib.suppress(OSError, ValueError):  # no such group, or its limit is "max"
        found.append(
            float((_GROUP / "memory.max").read_text())
            - float((_GROUP / "memory.current").read_text())
        )
    return min(found)


def training_bytes(entries: int, like: torch.Tensor) -> int:
    """The bytes of `entries` parameters in the dtype of `like`, with their gradient and Adam's two
    moments.
    """
    return 4 * entries * like.element_size()


def check_memory(what: str, needed: float, device: torch.device, mend: str) -> None:
    """Raises ModelError if `what` needs more bytes than `device` has left; the message has both
    figures and ends with `mend`.
    """
    free = free_bytes(device)
    if needed > free:
        raise ModelError(
            f"{what} takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free on '{device}';"
            f" {mend}"
        )


def return_freed() -> None:
    """Returns freed memory of the CPU to the system where the C library is glibc, which keeps most
    of it otherwise, in pieces that fit nothing else.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
