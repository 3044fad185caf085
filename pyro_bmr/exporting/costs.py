"""What a network costs: parameters, FLOPs, and the measured latency of anything that can be called.

Owns `parameters`, `flops`, `latency` and `cost_row`. Next: `loaders_source.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyro_bmr.data.inputs import Inputs, call_arguments, device_of, of_each, rows_in
from pyro_bmr.errors import ModelError
from pyro_bmr.shrinking.refusals import first_line

BATCHES = (1, 128)


def parameters(net: nn.Module) -> dict[str, int]:
    """The number of parameters, and how many of them are not zero; buffers are not counted."""
    numbers = list(net.parameters())
    return {
        "parameters": sum(p.numel() for p in numbers),
        "nonzero": sum(int(p.count_nonzero()) for p in numbers),
    }


@torch.no_grad()
def flops(net: nn.Module, example: Inputs) -> int:
    """Floating-point operations for one row of `example`: matrix products, with those of attention,
    and convolutions.

    A multiplication and an addition are counted as two.
    """
    # The counter would record gradients of parameters.
    constants = {name: t.detach() for name, t in (*net.named_parameters(), *net.named_buffers())}
    fast = torch.backends.mha.get_fastpath_enabled()
    # The counter does not know attention in one step on a CPU.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            row = of_each(lambda part: part[:1].clone(), example)
            torch.func.functional_call(net, constants, *call_arguments(net, row))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


@torch.no_grad()
def latency(run: Callable[..., Any], example: Inputs, batch: int, seconds: float = 0.3) -> float:
    """The median time of one call on `batch` rows, in milliseconds, on one thread.

    It is measured for about `seconds`, and over at least five calls.
    """
    index, device = torch.arange(batch) % rows_in(example), device_of(example)
    given, named = call_arguments(run, of_each(lambda part: part[index], example))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(*given, **named)
        times: list[float] = []
        while len(times) < 5 or sum(times) < seconds:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run(*given, **named)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 1e3 * statistics.median(times)


def cost_row(
    key: str,
    file: str,
    size: int,
    net: nn.Module,
    run: Callable[..., Any],
    example: Inputs,
    seconds: float,
) -> dict[str, Any]:
    """The costs of one format: of its `file` of `size` bytes, of `net`, and of a call of `run`.

    Raises:
        ModelError: `run` does not take batches of other sizes than the example's.
    """
    dtypes = (p.dtype for p in net.parameters() if p.is_floating_point())
    dtype = next(dtypes, None)
    like = of_each(lambda part: part.to(dtype) if part.is_floating_point() else part, example)
    try:
        times = {f"ms at batch {batch}": latency(run, example, batch, seconds) for batch in BATCHES}
    except Exception as error:  # a forward may allow only its own number of rows
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
