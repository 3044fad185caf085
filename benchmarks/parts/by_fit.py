"""The cost of a step by the public call: (a fit of 4 epochs − a fit of 1) / 3, of `fit` and of a
plain training loop over the same rows, in turns.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import pyro_bmr as bmr
from benchmarks.parts.turns import PLAIN, figures


def by_fit(
    net: nn.Module,
    data: tuple[Tensor, Tensor],
    batch: int,
    contenders: dict[str, dict[str, Any]],
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Milliseconds a step of plain training and of the `contenders` (name → prior, guide,
    optimiser), on 100 batches of repeated rows.
    """
    rows = torch.arange(100 * batch) % len(data[0])
    x, y = (part[rows] for part in data)
    calls: dict[str, Callable[[int], object]] = {PLAIN: partial(train, net, x, y, batch)}
    for name, options in contenders.items():
        prior = options.get("prior", bmr.Gaussian())
        program = bmr.BayesianNetwork(net, prior, bmr.Categorical())
        calls[name] = partial(whole_fit, program, x, y, batch, options)
    calls[PLAIN](1)  # the first optimiser of a process imports modules
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            one, four = (seconds_of(partial(call, epochs)) for epochs in (1, 4))
            times[name].append((1e3 * (four[0] - one[0]) / 300, 1e3 * (four[1] - one[1]) / 300))
    processor, clock = (
        {name: [each[k] for each in found] for name, found in times.items()} for k in (0, 1)
    )
    return {name: figures(processor[name], clock[name], processor[PLAIN]) for name in calls}


def train(net: nn.Module, x: Tensor, y: Tensor, batch: int, epochs: int) -> None:
    """Plain training."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 100)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()


def whole_fit(
    program: bmr.BayesianNetwork,
    x: Tensor,
    y: Tensor,
    batch: int,
    options: dict[str, Any],
    epochs: int,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bmr.errors.PyroBMRWarning)  # too short to converge
        bmr.fit(
            program, (x, y), guide=options.get("guide", bmr.MeanField), epochs=epochs,
            batch_size=batch, optimizer=options.get("make"), progress=False,
        )  # fmt: skip


def seconds_of(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the processor and of the clock."""
    began, began_clock = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - began, time.perf_counter() - began_clock
