"""Seconds and memory of pruning one layer to half, beside SparseGPT of the same run.

Owns `layer_costs`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.parts.one_shot import sparsegpt_layer
from benchmarks.parts.pages import table
from pyro_bmr.curvatures import Curvature, LayerCurvature
from pyro_bmr.post_training.layer import layers_of
from pyro_bmr.post_training.masks import pruned_at

SHAPES = ((384, 1536), (768, 3072), (1024, 4096))
KEPT, ROWS = 0.5, 8192


def layer_costs() -> list[str]:
    """A table: one layer, its curvature given, of correlated inputs and gradients."""
    lines = []
    for n, m in SHAPES:
        torch.manual_seed(0)
        weight = torch.randn(n, m) / m**0.5
        inputs, outputs = _second_moment(m), 100 * _second_moment(n)
        found = Curvature({"w": LayerCurvature("w", None, outputs, inputs, (n, m))}, {}, {}, ROWS)

        def ours(found: Curvature = found, weight: Tensor = weight) -> Tensor:
            scale = float(weight.square().mean().sqrt())
            layers = layers_of(found, {"w": weight}, {"w": scale}, {}, 0.05)
            pruned = pruned_at(layers, KEPT, 0.0)
            return layers["w"].holding(pruned["w"])[0].mean

        def rival(weight: Tensor = weight, inputs: Tensor = inputs) -> Tensor:
            return sparsegpt_layer(weight, inputs, KEPT)

        factors = (n * n + m * m) * 4 / 1e6
        seconds = [_seconds(run) for run in (ours, rival)]
        lines.append(
            [f"{n} × {m}", *(f"{s:.1f}" for s in seconds), f"{seconds[0] / seconds[1]:.2f}",
             f"{factors:.0f}"]
        )  # fmt: skip
    head = ["layer", "one round, s", "SparseGPT, s", "ratio", "factors, MB"]
    return table(head, lines)


def _second_moment(size: int) -> Tensor:
    mix = torch.randn(size, size) / size**0.5
    rows = torch.randn(2 * size, size) @ (0.5 * torch.eye(size) + mix)
    return rows.mT @ rows / len(rows)


def _seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
