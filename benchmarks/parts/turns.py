"""Contenders that take turns in one process: their times, and a table over plain training."""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pyro_bmr as bmr

PLAIN = "plain training, fused Adam"
# steps of a turn: as many as share a draw of noise, so that every turn has its part of the cost
TURN = 32


def enlarged_digits() -> tuple[Tensor, Tensor]:
    digits = bmr.load("digits")
    return (
        nn.functional.interpolate(
            digits.x_train.view(-1, 1, 8, 8), (28, 28), mode="bilinear"
        ).contiguous(),
        digits.y_train,
    )


def measure(
    steps: dict[str, Callable[[], None]], x: Tensor, y: Tensor, rounds: int
) -> dict[str, dict[str, float]]:
    """Contender → milliseconds a step, contenders taking turns. Each round writes other rows into x
    and y, which the contenders read.
    """
    images, labels = enlarged_digits()
    processor: dict[str, list[float]] = {name: [] for name in steps}
    clock: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        rows = torch.arange(number * len(x), (number + 1) * len(x)) % len(images)
        x.copy_(images[rows]), y.copy_(labels[rows])
        for name, step in steps.items():
            step()  # brings its vectors back into the caches, as in a training loop
            began, began_clock = time.process_time(), time.perf_counter()
            for _ in range(TURN):
                step()
            clock[name].append(1e3 * (time.perf_counter() - began_clock) / TURN)
            processor[name].append(1e3 * (time.process_time() - began) / TURN)
    for times in (*processor.values(), *clock.values()):
        del times[0]
    plain = processor[PLAIN]
    return {name: figures(processor[name], clock[name], plain) for name in steps}


def figures(
    processor: list[float], clock: list[float], plain: list[float], blocks: int = 10
) -> dict[str, float]:
    """Medians over rounds, of the times and of the ratio to `plain` training in the same round, and
    the smallest median of the blocks of rounds.
    """
    size = max(len(processor) // blocks, 1)

    def best_block(times: list[float]) -> float:
        return min(statistics.median(times[k : k + size]) for k in range(0, len(times), size))

    return {
        "processor_median": statistics.median(processor),
        "processor_over_plain": statistics.median(map(operator.truediv, processor, plain)),
        "processor_best_block": best_block(processor),
        "clock_median": statistics.median(clock),
        "clock_best_block": best_block(clock),
    }


def show(case: str, rows: dict[str, dict[str, float]]) -> None:
    """Prints a table in Markdown."""
    base = rows[PLAIN]
    print(
        f"\n| {case} | ms, processor | over plain | best block | over plain | clock, over plain |"
        "\n|---|---|---|---|---|---|"
    )
    for name, row in rows.items():
        block, clock = (row[k] / base[k] for k in ("processor_best_block", "clock_median"))
        print(
            f"| {name} | {row['processor_median']:.2f} | {row['processor_over_plain']:.2f} |"
            f" {row['processor_best_block']:.2f} | {block:.2f} | {clock:.2f} |",
            flush=True,
        )
