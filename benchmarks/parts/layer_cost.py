"""Seconds and memory of pruning one layer to half, beside SparseGPT of the same run.

Owns `layer_costs`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks.parts.one_shot import sparsegpt_layer
from benchmarks.parts.pages import table
from benchmarks.parts.peak_memory import peak_memory
from pyro_bmr.curvatures import Curvature, LayerCurvature
from pyro_bmr.post_training.layer import layers_of
from pyro_bmr.post_training.masks import pruned_at

SHAPES = ((384, 1536), (768, 3072), (1024, 4096), (4096, 4096))
KEPT, ROWS, TURNS = 0.5, 8192, 2


def layer_costs() -> list[str]:
    """A table: one layer, its curvature given, of correlated inputs and gradients. Each layer in a
    process of its own.
    """
    head = ["layer", "one round, s", "SparseGPT, s", "ratio", "memory, MB", "over both factors"]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        return table(head, list(pool.map(_layer_cost, SHAPES)))


def _layer_cost(shape: tuple[int, int]) -> list[str]:
    """Seconds of the processor: the least of some runs in turns, since other processes only add."""
    torch.set_num_threads(1)
    n, m = shape
    torch.manual_seed(0)
    weight = torch.randn(n, m) / m**0.5
    inputs, outputs = _second_moment(m), 100 * _second_moment(n)
    found = Curvature({"w": LayerCurvature("w", None, outputs, inputs, (n, m))}, {}, {}, ROWS)

    def ours() -> Tensor:
        scale = float(weight.square().mean().sqrt())
        layers = layers_of(found, {"w": weight}, {"w": scale}, {}, 0.05)
        pruned = pruned_at(layers, KEPT, 0.0)
        return layers["w"].holding(pruned["w"])[0].mean

    def rival() -> Tensor:
        return sparsegpt_layer(weight, inputs, KEPT)

    factors = (n * n + m * m) * 4
    _, memory = peak_memory(ours)
    turns = [[_seconds(run) for run in (ours, rival)] for _ in range(TURNS)]
    seconds = [min(column) for column in zip(*turns, strict=True)]
    return [
        f"{n} × {m}", *(f"{s:.1f}" for s in seconds), f"{seconds[0] / seconds[1]:.2f}",
        f"{memory / 1e6:.0f}", f"{memory / factors:.1f}",
    ]  # fmt: skip


def _second_moment(size: int) -> Tensor:
    mix = torch.randn(size, size) / size**0.5
    rows = torch.randn(2 * size, size) @ (0.5 * torch.eye(size) + mix)
    return rows.mT @ rows / len(rows)


def _seconds(run: Callable[[], Tensor]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
