"""The most memory that a call held beyond what its process had before (Linux).

Owns `peak_memory`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def peak_memory(run: Callable[[], T]) -> tuple[T, int]:
    """What the call returns, and bytes. The kernel's mark of the most memory is reset before, since
    it would hide what fits into memory that was in use earlier and is free again.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _kilobytes("VmRSS")
    result = run()
    return result, 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
