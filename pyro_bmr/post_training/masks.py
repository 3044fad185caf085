"""Which weights of all layers are kept at a given fraction: those with the least ΔF, with one
threshold over all layers.

Owns `pruned_at`. Next: `steps.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyro_bmr.post_training.group_evidence import grouped_delta_f
from pyro_bmr.post_training.layer import Layer, Precisions
from pyro_bmr.reduction.decisions import lowest
from pyro_bmr.reduction.groups import NofM
from pyro_bmr.reduction.label_sums import (
    at_labels,
    label_counts,
    label_sums,
    labels_in_use,
    varying,
)

Labels = Mapping[str, Tensor]


def pruned_at(
    layers: Mapping[str, Layer],
    kept: float,
    floor: float,
    labels: Labels | None = None,
    pattern: NofM | None = None,
    inverse: Callable[[Layer], Precisions] | None = None,
) -> dict[str, Tensor]:
    """Weight → True where it is pruned, in the shape of the parameter.

    Args:
        kept: the fraction of all weights that is kept; with labels, of those in groups.
        floor: each layer keeps at least this part of that fraction, and one entry or group.
        labels: the group of each entry, −1 for those in none, which are kept. Groups are ranked by
            their ΔF per entry, summed over the layers.
        inverse: the precisions of a layer, for the ΔF of whole rows and columns. Without it, and of
            other groups, ΔF is summed over single entries.
        pattern: instead of all, the n of every m neighbours with the least ΔF; `kept` of the
            entries that are pruned by it are left for later rounds.
    """
    scores = {
        name: layer.delta_f().masked_fill_(_held(layer), torch.inf)
        for name, layer in layers.items()
    }
    if pattern is not None:
        return _patterned(scores, kept, pattern)
    if labels is not None:
        return _grouped(layers, scores, kept, floor, labels, inverse)
    chosen = _of_all(scores, kept)
    for name, score in scores.items():
        least = max(round(floor * kept * score.numel()), 1)
        if int(chosen[name].sum()) < least:
            chosen[name] = lowest(score.flatten(), least).view(score.shape)
    return {name: ~mask for name, mask in chosen.items()}


def _held(layer: Layer) -> Tensor:
    return layer.as_parameter(layer.held[:, : layer.columns])


def _of_all(scores: Mapping[str, Tensor], kept: float) -> dict[str, Tensor]:
    pooled = torch.cat([score.flatten() for score in scores.values()])
    chosen = lowest(pooled, round(kept * len(pooled))) & (pooled < torch.inf)
    parts = chosen.split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def _grouped(
    layers: Mapping[str, Layer],
    scores: Mapping[str, Tensor],
    kept: float,
    floor: float,
    labels: Labels,
    inverse: Callable[[Layer], Precisions] | None,
) -> dict[str, Tensor]:
    """Whole groups, the largest ΔF per entry first, as many as leave `kept` of the entries that are
    in groups.
    """
    count = 1 + max(int(varying(label).max()) for label in labels.values())
    total, size, gone = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    for name, score in scores.items():
        held = (score == torch.inf).cpu()
        whole = None
        if inverse is not None and bool((varying(labels[name]) >= 0).any()):
            layer = layers[name]
            whole = grouped_delta_f(layer, inverse(layer), labels[name], count)
        if whole is None:
            whole = label_sums(labels[name], score.cpu(), count, ~held)
        total += whole
        size += label_counts(labels[name], count)
        gone += label_counts(labels[name], count, held)
    rank = (total / (size - gone).clamp(min=1)).masked_fill(gone == size, torch.inf)
    for label in labels.values():
        rank = _with_least(rank, label, kept * floor)
    order = rank.argsort(descending=True)
    left = size - gone
    after = left.sum() - left[order].cumsum(0)  # weights that are kept once this group is gone too
    pruned = torch.zeros(count, dtype=torch.bool)
    # a fraction that fits exactly is met, whatever the rounding
    least = kept * size.sum() * (1 - 1e-9)
    pruned[order[: int((after >= least).sum())]] = True
    pruned &= rank > -torch.inf
    pruned |= rank == torch.inf
    return {name: at_labels(labels[name], pruned, False) for name in scores}


def _with_least(rank: Tensor, labels: Tensor, fraction: float) -> Tensor:
    """`rank` with −∞ for the best groups of a layer that has several: this fraction of them, and
    one at least.
    """
    own = labels_in_use(labels)
    own = own[own >= 0]
    if len(own) < 2:
        return rank
    least = min(max(round(fraction * len(own)), 1), int((rank[own] < torch.inf).sum()))
    return rank.index_fill(0, own[lowest(rank[own], least)], -torch.inf)


def _patterned(scores: Mapping[str, Tensor], kept: float, pattern: NofM) -> dict[str, Tensor]:
    """The entries that the pattern prunes, those with the largest ΔF first."""
    out = {}
    undivided = pattern.undivided({name: tuple(score.shape) for name, score in scores.items()})
    for name, score in scores.items():
        if name in undivided:
            out[name] = torch.zeros_like(score, dtype=torch.bool)
            continue
        pruned = ~pattern.mask(score.masked_fill(score == torch.inf, 1e30))
        by_score = score.masked_fill(~pruned, -torch.inf).flatten()
        count = min(round((1 - kept) * score.numel()), int(pruned.sum()))
        out[name] = ~lowest(by_score, score.numel() - count).view(score.shape) & pruned
    return out
