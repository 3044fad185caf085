"""What a prediction is: averaged class probabilities, or a mixture over draws, with its epistemic
and aleatoric parts apart.

Owns `prediction_of`, which averages over draws or over the members of an ensemble. In all
predictions the rows come first. Next: `observed_site.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ModelError
from pyro_bmr.prediction.chunked import ChunkedPrediction
from pyro_bmr.prediction.class_prediction import ClassPrediction, entropy
from pyro_bmr.prediction.mixture_prediction import MixturePrediction
from pyro_bmr.prediction.real_prediction import RealPrediction

__all__ = [
    "ChunkedPrediction",
    "ClassPrediction",
    "MixturePrediction",
    "Parameters",
    "Prediction",
    "RealPrediction",
    "prediction_of",
    "rows_joined",
]


Prediction = ClassPrediction | RealPrediction | MixturePrediction | ChunkedPrediction
# (probs,) of a Categorical, (loc, scale) of a Normal; draws are stacked in front
Parameters = tuple[Tensor, ...]


def prediction_of(
    parts: Iterable[Parameters], draws: int, marker: float | None = None
) -> ClassPrediction | RealPrediction:
    """The prediction of `draws` whose parameters come in `parts`, one or several draws at a time.
    The class probabilities of all draws are never in memory at once. Targets that are the `marker`,
    a class or NaN, are not scored.
    """
    kept: list[Parameters] = []
    probs: Tensor | None = None
    entropies: Tensor | None = None
    for part in parts:
        if len(part) > 1:
            kept.append(part)
            continue
        total, own = part[0].sum(0), entropy(part[0]).sum(0)
        probs, entropies = (
            (total, own)
            if probs is None or entropies is None
            else (probs.add_(total), entropies.add_(own))
        )
    if probs is None or entropies is None:
        locs, scales = (torch.cat(tensors) for tensors in zip(*kept, strict=True))
        return RealPrediction(locs, scales, missing=marker is not None)
    mean, aleatoric = probs / draws, entropies / draws
    epistemic = (entropy(mean) - aleatoric).clamp_min(0)
    return ClassPrediction(mean, aleatoric, epistemic, marker)


def rows_joined(parts: Sequence[Prediction], sizes: Sequence[int]) -> Prediction:
    """The prediction of the rows of all `parts`, of so many rows each, one after the other; all
    have the same draws.

    Raises:
        ModelError: they are of several kinds.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(isinstance(part, ChunkedPrediction) for part in parts):
        return _in_chunks(parts, sizes)
    if any(type(part) is not type(first) for part in parts):
        raise ModelError(
            "predict: expected one kind of distribution for all rows, got"
            f" {', '.join(sorted({type(part).__name__ for part in parts}))}"
        )
    every: Sequence[Any] = parts
    if isinstance(first, MixturePrediction):
        draws = zip(*(part.parts for part in every), strict=True)
        return MixturePrediction([[fn for fns in draw for fn in fns] for draw in draws], first.dim)
    names, axis = (
        (("probs", "aleatoric", "epistemic"), 0)
        if isinstance(first, ClassPrediction)
        else (("locs", "scales"), 1)
    )
    joined: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in every], axis) for name in names
    }
    return replace(first, **joined)


def _in_chunks(parts: Sequence[Any], sizes: Sequence[int]) -> ChunkedPrediction:
    """The same, where a part is computed for each question."""
    chunks: list[Any] = []
    rows: list[int] = []
    for part, size in zip(parts, sizes, strict=True):
        chunked = isinstance(part, ChunkedPrediction)
        chunks += part.chunks if chunked else [partial(_itself, part)]
        rows += part.sizes if chunked else [size]
    return ChunkedPrediction(chunks, rows)


def _itself(part: Any) -> Any:
    return part
