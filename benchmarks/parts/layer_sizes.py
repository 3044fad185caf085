"""Which part of each layer is kept when a network is pruned to one size: two published rules.

Owns `lamp` and `owl`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyro_bmr.curvatures import Curvature

MOST_APART = 0.08  # of `owl`, as published; half of what is kept where that is less
OUTLIER = 5  # times the mean of its layer, as published


def lamp(weights: Mapping[str, Tensor], kept: float) -> dict[str, float]:
    """The sizes under one threshold of w²/Σ of the squares that are as large or larger in the layer
    (Lee et al. 2021, arXiv 2010.07611).
    """
    scores = {}
    for name, weight in weights.items():
        squares = weight.flatten().square().sort(descending=True).values
        scores[name] = squares / squares.cumsum(0)
    pooled = torch.cat(list(scores.values())).sort(descending=True).values
    limit = pooled[round(kept * len(pooled)) - 1]
    return {name: float((score >= limit).double().mean()) for name, score in scores.items()}


def owl(
    weights: Mapping[str, Tensor], norms: Mapping[str, Tensor], kept: float
) -> dict[str, float]:
    """Layers with more outliers of |w| times the norm of its input keep more, at most `MOST_APART`
    from the mean (Yin et al. 2024, arXiv 2310.05175).

    Args:
        norms: name → the norm of each input.
    """
    outliers, counts = [], []
    for name, weight in weights.items():
        score = weight.flatten(1).abs() * norms[name]
        outliers.append(float((score > OUTLIER * score.mean()).double().mean()))
        counts.append(float(weight.numel()))
    share, count = torch.tensor(outliers), torch.tensor(counts)
    apart = min(MOST_APART, kept / 2)
    moved = 2 * apart * (share - share.min()) / (share.max() - share.min()).clamp(min=1e-12)
    sizes = kept + moved - (moved * count).sum() / count.sum()
    return dict(zip(weights, sizes.clamp(0, 1).tolist(), strict=True))


def weights_and_norms(
    net: nn.Module, found: Curvature, names: list[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Name → weight, and name → the norm of each input of it."""
    weights = {name: net.get_parameter(name).detach() for name in names}
    norms = {}
    for name in names:
        layer = found.layers[name]
        norm = layer.inputs.diagonal().sqrt()
        norms[name] = norm[:-1] if layer.bias is not None else norm
    return weights, norms
