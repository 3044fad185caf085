"""Sums over the entries of each group, and a number of each group at all of its entries.

The labels of units, inputs and layers do not change along most axes of a site, and are stored as
expanded tensors. The sums run over those axes first, so that nothing is looked up entry by entry.
Owns `varying`, `moved`, `label_sums`, `label_counts`, `labels_in_use` and `at_labels`. Next:
`entries.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def varying(labels: Tensor) -> Tensor:
    """One position of each axis along which the labels are expanded, and all of the others."""
    for axis, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and stride == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


def moved(labels: Tensor, device: torch.device) -> Tensor:
    """The labels on a device, still expanded."""
    return varying(labels).to(device).expand(labels.shape)


def label_sums(labels: Tensor, each: Tensor, count: int, kept: Tensor | None = None) -> Tensor:
    """For each group from 0 to `count` − 1, the sum of `each` over its kept entries, in float64.

    `labels`: the group of each entry of a site, negative: in none. `each`, `kept`: in its shape;
    `kept` None: all.
    """
    few = varying(labels)
    total = _over_the_rest(each if kept is None else each.where(kept, 0), few)
    inside = few >= 0
    return total.new_zeros(count).index_add_(0, few[inside], total[inside])


def label_counts(labels: Tensor, count: int, kept: Tensor | None = None) -> Tensor:
    """For each group from 0 to `count` − 1, the number of its kept entries, in float64."""
    few, entries = varying(labels), _kept_entries(labels, kept)
    inside = few >= 0
    return entries.new_zeros(count).index_add_(0, few[inside], entries[inside])


def labels_in_use(labels: Tensor, kept: Tensor | None = None) -> Tensor:
    """The distinct labels of the kept entries, those of entries in no group among them."""
    return varying(labels)[_kept_entries(labels, kept) > 0].unique()


def at_labels(labels: Tensor, values: Tensor, elsewhere: float | bool) -> Tensor:
    """The value of its group at each entry of a site, `elsewhere` at those in no group; an expanded
    tensor, as `labels` is.
    """
    with_last = torch.cat([values, values.new_tensor([elsewhere])])
    return with_last[varying(labels).clamp_min(-1)].expand(labels.shape)


def _kept_entries(labels: Tensor, kept: Tensor | None) -> Tensor:
    """How many kept entries there are for each position of `varying(labels)`."""
    few = varying(labels)
    if kept is not None:
        return _over_the_rest(kept, few)
    return torch.full(
        few.shape, labels.numel() / max(few.numel(), 1), dtype=torch.float64, device=few.device
    )


def _over_the_rest(each: Tensor, few: Tensor) -> Tensor:
    """The sum of `each` over the axes that `few` has one position of, in float64."""
    axes = [k for k, size in enumerate(few.shape) if size != each.shape[k]]
    return each.sum(axes, keepdim=True, dtype=torch.float64) if axes else each.double()
