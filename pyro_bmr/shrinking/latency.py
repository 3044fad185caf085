"""The measured time of a call of a network, on one thread.

Owns `one_thread`, `milliseconds`, `latency` and `processor`. Next: `untied.py`.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyro_bmr.data.inputs import Inputs, call_arguments, device_of, of_each, rows_in


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which torch has one thread, and so has an ONNX session that is made in it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def milliseconds(
    run: Callable[..., Any],
    example: Inputs,
    batch: int,
    seconds: float = 0.3,
    least: int = 5,
) -> list[float]:
    """The times of calls on `batch` rows on one thread, in milliseconds.

    Calls are made for about `seconds`, and at least `least` are counted. The first is not, unless
    it alone takes longer than `seconds`: what it fills, such as caches, then matters little.
    """
    device = device_of(example)
    index = torch.arange(batch, device=device) % rows_in(example)
    given, named = call_arguments(run, of_each(lambda part: part[index], example))
    times: list[float] = []
    with one_thread():
        warm = False
        while len(times) < least or sum(times) < 1e3 * seconds:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run(*given, **named)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken = time.perf_counter() - start
            if warm or taken > seconds:
                times.append(1e3 * taken)
            warm = True
    return times


def latency(run: Callable[..., Any], example: Inputs, batch: int, seconds: float = 0.3) -> float:
    """The median time of one call on `batch` rows, in milliseconds, on one thread."""
    return statistics.median(milliseconds(run, example, batch, seconds))


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        return name.partition(":")[2].strip()
    except (OSError, StopIteration, UnicodeDecodeError):
        return platform.processor() or platform.machine()
