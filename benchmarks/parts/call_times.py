"""The processor time of a call of several networks that take turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyro_bmr.data.inputs import Inputs, call_arguments, of_each, rows_in

_TURNS, _CALLS = 5, 3


@torch.no_grad()
def call_times(
    runs: Mapping[str, Callable[..., Any]], example: Inputs, batch: int, seconds: float
) -> dict[str, float]:
    """Name → the median time of a call on `batch` rows, in milliseconds of processor time.

    In each turn every network makes one call that is not counted, which brings its weights back
    into the caches, and then calls for `seconds` / 5, but at least three.
    """
    index = torch.arange(batch) % rows_in(example)
    rows = of_each(lambda part: part[index], example)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_TURNS):
        for name, run in runs.items():
            given, named = call_arguments(run, rows)
            run(*given, **named)
            here: list[float] = []
            while len(here) < _CALLS or sum(here) < 1e3 * seconds / _TURNS:
                start = time.process_time()
                run(*given, **named)
                here.append(1e3 * (time.process_time() - start))
            times[name] += here
    return {name: statistics.median(found) for name, found in times.items()}
