"""What a network costs: parameters, FLOPs, and the measured latency of anything that can be called.

Owns `parameters`, `flops`, `Timed` and `with_latencies`. Next: `loaders_source.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyro_bmr.data.inputs import Inputs, call_arguments, of_each
from pyro_bmr.errors import ModelError
from pyro_bmr.shrinking.latency import milliseconds
from pyro_bmr.shrinking.refusals import first_line

_TURNS = 3


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


@dataclass(frozen=True)
class Timed:
    """What is timed: a call of `run` on rows of `example`. `costs` (name → value): what is known of
    it so far, with its `format`. `like`: another format that is the same network computed in the
    same way; then only that one is called.
    """

    costs: dict[str, Any]
    run: Callable[..., Any]
    example: Inputs
    like: str = ""

    @property
    def timed_format(self) -> str:
        """The format whose calls give its latency."""
        name: str = self.costs["format"]
        return self.like or name


def counted(net: nn.Module, example: Inputs) -> dict[str, int]:
    """The parameters of `net`, those that are not zero, and its FLOPs for one row of `example`."""
    dtypes = (p.dtype for p in net.parameters() if p.is_floating_point())
    dtype = next(dtypes, None)
    like = of_each(lambda part: part.to(dtype) if part.is_floating_point() else part, example)
    return {**parameters(net), "FLOPs": flops(net, like)}


def with_latencies(
    contenders: Sequence[Timed], seconds: float, batches: Sequence[int]
) -> list[dict[str, Any]]:
    """The costs of each, with the time of a call on batches of these sizes: the median, the time
    that nine of ten calls stay under, and the number of calls behind both.

    They take turns, so that all meet the same state of the machine; `seconds`: for each and batch.
    At least three calls of each are counted.

    Raises:
        ModelError: one does not take batches of other sizes than the example's.
    """
    rows = [{**one.costs, "latency of": one.timed_format} for one in contenders]
    for batch in batches:
        calls: dict[str, list[float]] = {one.timed_format: [] for one in contenders}
        for _ in range(_TURNS):
            for one in contenders:
                if not one.like:
                    calls[one.timed_format] += _calls(one, batch, batches, seconds / _TURNS)
        for row in rows:
            times = calls[row["latency of"]]
            row[f"ms at batch {batch}"] = statistics.median(times)
            row[f"p90 ms at batch {batch}"] = statistics.quantiles(times, n=10, method="inclusive")[
                -1
            ]
            row[f"calls at batch {batch}"] = len(times)
    return rows


def _calls(one: Timed, batch: int, batches: Sequence[int], seconds: float) -> list[float]:
    try:
        return milliseconds(one.run, one.example, batch, seconds, least=1)
    except Exception as error:  # a forward may allow only its own number of rows
        raise ModelError(
            f"format '{one.costs['format']}' does not run on batches of {tuple(batches)} rows"
            f" ({type(error).__name__}: {first_line(error)})"
        ) from None
