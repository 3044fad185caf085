"""Which weights of a trained network are pruned together, and which cannot be pruned.

Owns `groups_of` and `warn_of_others`. Next: `rounds.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from pyro_bmr.errors import ReductionError, described, warn
from pyro_bmr.reduction.attention_heads import Heads, heads_of
from pyro_bmr.reduction.groups import group_labels, is_recurrent

FEW = 0.1  # of the weights: so many may be left out, or be zero, without a word
Shapes = Mapping[str, tuple[int, ...]]


def groups_of(
    net: nn.Module,
    shapes: Shapes,
    per: str | Heads | Mapping[str, Tensor],
    heads: int | Mapping[str, int] | None,
    frozen: Collection[str],
) -> Mapping[str, Tensor] | None:
    """Weight → the group of each entry, −1 for those in none; None where weights go one by one.

    Args:
        shapes: of the weights that are pruned, in the order in which the network uses them.
        per, heads: as for `prune`.
        frozen: parameters that are not pruned.

    Raises:
        ReductionError: as `group_labels`, or no group could be removed.
    """
    if isinstance(per, str) and per == "weight":
        return None
    if isinstance(per, Mapping):
        per = _within(net, shapes, per)
    if heads is None and (per == "head" or isinstance(per, Heads)):
        heads = heads_of(net)
    labels = dict(group_labels(shapes, per, heads))
    last = list(shapes)[-1]
    if per in ("unit", "channel") and not _has_frozen_after(net, last, frozen):
        labels[last] = torch.tensor(-1).expand(shapes[last])  # the outputs
    if per in ("unit", "channel"):
        # a unit of a recurrent layer is there for as long as its biases are
        cells = [name for name in labels if is_recurrent(name)]
        labels |= {name: torch.tensor(-1).expand(shapes[name]) for name in cells}
    if not any(bool((label >= 0).any()) for label in labels.values()):
        raise ReductionError(
            f"per={described(per)}: no group of the weights that can be pruned,"
            f" {', '.join(shapes)}, could be removed whole; prune single weights, or give"
            " labels >= 0"
        )
    return labels


def _has_frozen_after(net: nn.Module, name: str, frozen: Collection[str]) -> bool:
    """Whether a frozen matrix comes after the weight in the network."""
    matrices = [n for n, p in net.named_parameters() if p.ndim > 1]
    return not set(matrices[matrices.index(name) :]).isdisjoint(frozen)


def _within(net: nn.Module, shapes: Shapes, per: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The labels of the weights that are pruned. A group that has entries elsewhere, too, is kept:
    it could not be removed whole.
    """
    known = dict(net.named_parameters())
    absent = [name for name in per if name in known and name not in shapes]
    if not absent:
        return per
    bound = torch.cat([per[name].flatten().long().cpu() for name in absent])
    warn(
        f"prune: {', '.join(absent)} cannot be pruned here, so the groups of per= that have"
        " entries there are kept whole; leave out only=, or these layers from the labels"
    )
    inside = {name: labels for name, labels in per.items() if name not in absent}
    return {
        name: labels.masked_fill(torch.isin(labels.long().cpu(), bound).to(labels.device), -1)
        for name, labels in inside.items()
    }


def warn_of_others(
    others: Mapping[str, Tensor], pruned: Mapping[str, Tensor], patterns: Collection[str]
) -> None:
    """Says which weights stay whole for want of Kronecker factors, if they are not few."""
    left = {
        name: p.numel()
        for name, p in others.items()
        if p.ndim > 1 and any(fnmatchcase(name, each) for each in patterns)
    }
    share = sum(left.values()) / (sum(left.values()) + sum(p.numel() for p in pruned.values()))
    if share > FEW:
        warn(
            f"prune: {', '.join(left)}, {share:.0%} of the weights, have no Kronecker factors"
            " (curvature(...).table() says why), and stay whole; kept is the fraction of the others"
        )
