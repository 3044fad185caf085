"""What a network costs: parameters, FLOPs, and the measured latency of anything that can be called.

Owns `parameters`, `flops` and `latency`. Next: `network_source.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def parameters(net: nn.Module) -> dict[str, int]:
    """How many numbers the network has, and how many of them are not zero; buffers of norm layers
    are not counted.
    """
    numbers = list(net.parameters())
    return {
        "parameters": sum(p.numel() for p in numbers),
        "nonzero": sum(int(p.count_nonzero()) for p in numbers),
    }


@torch.no_grad()
def flops(net: nn.Module, example: Tensor) -> int:
    """Floating-point operations for one row of `example`: matrix products, those of attention too,
    and convolutions.

    A multiplication and an addition are counted as two.
    """
    # the counter follows gradients, there are none here
    constants = {name: t.detach() for name, t in (*net.named_parameters(), *net.named_buffers())}
    fast = torch.backends.mha.get_fastpath_enabled()
    # attention in one step, on a CPU, is nothing that the counter knows
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(net, constants, (example[:1].clone(),))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


@torch.no_grad()
def latency(
    run: Callable[[Tensor], Any], example: Tensor, batch: int, seconds: float = 0.3
) -> float:
    """The median time of one call on `batch` rows, in milliseconds, on one thread; measured for
    about `seconds`, at least five calls.
    """
    x = example[torch.arange(batch) % len(example)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(x)
        times: list[float] = []
        while len(times) < 5 or sum(times) < seconds:
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            start = time.perf_counter()
            run(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 1e3 * statistics.median(times)
