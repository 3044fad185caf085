"""Which weights and groups are pruned, given what each site says: by the evidence, to a target
size, in a fixed pattern, or by a search over correlated posteriors.

Owns `decide`, which returns masks. Next: `reduce.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.structure import Correlated
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.priors import Prior
from pyro_bmr.reduction.correlations import correlated, independent
from pyro_bmr.reduction.group_evidence import (
    Groups,
    Results,
    check_ranks,
    fractions,
)
from pyro_bmr.reduction.groups import NofM
from pyro_bmr.reduction.label_sums import at_labels
from pyro_bmr.reduction.reduced_site import SiteReduction
from pyro_bmr.reduction.rules import is_point_spike
from pyro_bmr.reduction.search import Search
from pyro_bmr.reduction.window import windowed, windowed_groups

Kept = float | Mapping[str, float] | None
SearchMethod = Callable[..., Search]


class Decision(NamedTuple):
    """`masks`: site → True where the weight is kept. `results`: with `drop_log_odds` as it was for
    the decision, the same for all entries of a group.
    """

    masks: dict[str, Tensor]
    results: dict[str, SiteReduction]


def decide(
    posterior: Posterior,
    results: Results,
    targets: Mapping[str, Prior | None],
    labels: Mapping[str, Tensor] | None,
    threshold: float,
    kept: Kept,
    search: SearchMethod | None,
    window: bool = False,
) -> Decision:
    """The masks, which `quiet_reduction` in `reduce.py` applies. Arguments as for `reduce`, with
    `labels` from `groups.group_labels`, None for single weights.
    """
    if search is not None and not isinstance(kept, Mapping):
        found = _searched(posterior, results, targets, labels, threshold, kept, search)
        if set(found) == set(results):
            return Decision(found, dict(results))
    else:
        found = {}
    if labels is None:
        if window:
            results = windowed(results, targets, threshold)
        # a weight is kept if ΔF ≤ threshold
        masks = {name: result.drop_log_odds <= threshold for name, result in results.items()}
        if kept is not None:
            masks |= _by_size(results, kept)
        return Decision({**masks, **found}, dict(results))
    groups = Groups.of(posterior, results, targets, labels)
    results = dict(results)
    drop = groups.drop(posterior, results, targets)
    if window:
        drop = windowed_groups(drop, groups, targets, threshold)
    pruned = drop > threshold if kept is None else groups.beyond(kept, drop > threshold)
    dropped, masks = dict[str, SiteReduction](), dict[str, Tensor]()
    for name, result in results.items():
        label, mask = groups.labels[name], result.site.mask
        each = at_labels(label, drop.to(result.drop_log_odds), -torch.inf)
        inside = at_labels(label, ~pruned, True)
        each = each.contiguous() if mask is None else each.masked_fill(~mask, torch.inf)
        dropped[name] = replace(result, drop_log_odds=each)
        masks[name] = inside.contiguous() if mask is None else inside & mask
    return Decision({**masks, **found}, dropped)


def pattern_masks(results: Results, pattern: NofM) -> dict[str, Tensor]:
    """The masks of an n:m pattern, site by site; sites that it does not divide are unchanged.

    Raises:
        ReductionError: it divides none.
    """
    shapes = {name: tuple(result.drop_log_odds.shape) for name, result in results.items()}
    whole = pattern.undivided(shapes)
    if whole and not any(
        result.drop_log_odds.ndim > 1 for name, result in results.items() if name not in whole
    ):
        raise ReductionError(
            f"{pattern.left_out(shapes)}; no other site has inputs, so there is nothing to reduce:"
            " take another m"
        )
    return {
        name: result.site.kept
        if name in whole
        else pattern.mask(result.drop_log_odds) & result.site.kept
        for name, result in results.items()
    }


def _by_size(results: Results, kept: float | Mapping[str, float]) -> dict[str, Tensor]:
    """The weights with the smallest spike ΔF: of all sites together, or of each site to the
    fraction of the pattern that names it.
    """
    if isinstance(kept, Mapping):
        parts = (
            _by_size({name: results[name]}, fraction)
            for name, fraction in fractions(results, kept).items()
        )
        return {name: mask for part in parts for name, mask in part.items()}
    gains = {name: result.spike_delta_f for name, result in results.items()}
    pooled = torch.cat([gain.flatten() for gain in gains.values()])
    sizes = [gain.numel() for gain in gains.values()]
    for ranks, result in zip(pooled.split(sizes), results.values(), strict=True):
        if result.site.mask is not None:
            ranks.masked_fill_(~result.site.mask.flatten(), torch.inf)
    check_ranks(pooled)
    count = round(kept * pooled.numel())
    limit = _kth_smallest(pooled, count) if count else -math.inf
    del pooled
    chosen = {
        name: (gain <= limit) & (gain.abs() < torch.inf) & results[name].site.kept
        for name, gain in gains.items()
    }
    spare = sum(int(mask.count_nonzero()) for mask in chosen.values()) - count
    for name, gain in reversed(gains.items()):
        if spare > 0:
            spare -= _drop_last(chosen[name], gain == limit, spare)
    return chosen


def lowest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` least of flat `scores` are, as bools; of equal ones, such as those of
    weights that the data say nothing of, the first.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = _kth_smallest(scores.clone(), count)
    chosen = scores <= limit
    _drop_last(chosen, scores == limit, int(chosen.count_nonzero()) - count)
    return chosen


def _drop_last(chosen: Tensor, equal: Tensor, spare: int) -> int:
    """Takes out of `chosen` the last `spare` entries of those that are `equal`, or all; how many
    that were.
    """
    if spare == 0:
        return 0
    last = equal.flatten().nonzero()[-spare:, 0]
    chosen.view(-1)[last] = False
    return len(last)


def _kth_smallest(scores: Tensor, k: int) -> float:
    """The k-th least of flat `scores`, which this may reorder. On the CPU by numpy, in half the
    time of `kthvalue` and without its copy and its index, three times the scores together.
    """
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return float(scores.kthvalue(k).values)
    numbers = scores.detach().numpy()
    numbers.partition(k - 1)
    return float(numbers[k - 1])


def _searched(
    posterior: Posterior,
    results: Results,
    targets: Mapping[str, Prior | None],
    labels: Mapping[str, Tensor] | None,
    threshold: float,
    kept: float | None,
    search: SearchMethod,
) -> dict[str, Tensor]:
    """Masks by a search, for the sites of a point spike: those with correlations, and those that
    share groups or a target size with them.
    """
    spikes = [name for name in results if is_point_spike(targets[name])]
    blocks = {
        name: correlated(posterior[name], None if labels is None else labels[name])
        for name in spikes
    }
    joint = [
        name for name in spikes if blocks[name] is not None and bool(posterior[name].kept.any())
    ]
    if not joint or (kept is not None and len(spikes) < len(results)):
        return {}
    if labels is None and kept is None:
        return {
            name: _search({name: blocks[name]}, posterior, results, threshold, kept, search)[name]
            for name in joint
        }
    return _search(blocks, posterior, results, threshold, kept, search, labels)


def _search(
    blocks: Mapping[str, Correlated | None],
    posterior: Posterior,
    results: Results,
    threshold: float,
    kept: float | None,
    search: SearchMethod,
    labels: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    used: dict[str, Correlated] = {}
    first = 0
    for name, block in blocks.items():
        one = block or independent(posterior[name], None if labels is None else labels[name])
        assert one is not None  # its prior is Gaussian
        used[name] = (
            one
            if labels is not None
            else replace(one, labels=torch.arange(len(one.labels)) + first)
        )
        first += len(one.labels)
    left = sum(r.site.kept_count for name, r in results.items() if name in used)
    if kept is not None:
        kept = min(
            1.0, kept * sum(results[name].drop_log_odds.numel() for name in used) / max(left, 1)
        )
    found = search(
        [b.structure for b in used.values()],
        [b.prior for b in used.values()],
        [b.labels for b in used.values()],
        threshold=threshold,
        kept=kept,
    )
    masks = {}
    for (name, block), unit_mask in zip(used.items(), found.masks, strict=True):
        masks[name] = (block.units >= 0) & unit_mask.to(block.units.device)[block.units]
    return masks
