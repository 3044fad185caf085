r"""Decisions that go on to the smallest model of those that are nearly as probable as the best, for
any reduced prior.

Owns `windowed` and `windowed_groups`. How wide the window is, and why, is in `occams_window.py`.
Next: `decisions.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_bmr.formulas.occams_window import window_shift
from pyro_bmr.priors import Horseshoe, Prior
from pyro_bmr.reduction.group_evidence import Groups, Results
from pyro_bmr.reduction.label_sums import label_counts
from pyro_bmr.reduction.reduced_site import SiteReduction

Targets = Mapping[str, Prior | None]


def windowed(results: Results, targets: Targets, threshold: float) -> dict[str, SiteReduction]:
    r"""The sites with `drop_log_odds` above `threshold` where Occam's window prunes as well.

    With gᵢ the log odds of pruning weight i above the threshold, and n the weights of all sites,
    those pruned before included, the weights of least evidence go while

    .. math:: \sum_i -g_i \le \log n.

    It is one window, since the sites are one model. Without it, of n weights that are zero about
    n·P(Bayes factor > 1) are kept: under the point spike each weight is kept with a probability of
    ½ before the data, whatever their number (Scott & Berger 2010, Annals of Statistics 38(5)). A
    horseshoe has a window in its own rule, and stays as it is. So does the decision of the prior of
    the fit, which is no evidence of zero: a fitted spike has a width.
    """
    own = {n: r for n, r in results.items() if not _has_rule(targets[n])}
    if not own:
        return dict(results)
    odds = [r.drop_log_odds.where(r.site.kept, torch.inf) for r in own.values()]
    parts = _moved(torch.cat([each.flatten() for each in odds]), threshold)
    moved = dict(results)
    split = parts.split([each.numel() for each in odds])
    for (name, result), part in zip(own.items(), split, strict=True):
        drop = part.view_as(result.drop_log_odds).where(result.site.kept, result.drop_log_odds)
        moved[name] = replace(result, drop_log_odds=drop)
    return moved


def windowed_groups(drop: Tensor, groups: Groups, targets: Targets, threshold: float) -> Tensor:
    """The same for the log odds of groups, of which those that were pruned before are decisions
    too.
    """
    own = torch.zeros_like(drop, dtype=torch.bool)
    for k, name in enumerate(groups.sites):
        if not _has_rule(targets[name]):
            own |= groups.home == k
    gone = groups.home == len(groups.sites)
    used = torch.stack([label_counts(label, len(gone)) for label in groups.labels.values()])
    gone &= used.sum(0) > 0
    moved = drop.clone()
    moved[own] = _moved(drop[own], threshold, int(own.sum()) + int(gone.sum()))
    return moved


def _has_rule(to: Prior | None) -> bool:
    return to is None or isinstance(to, Horseshoe)


def _moved(drop: Tensor, threshold: float, decisions: int | None = None) -> Tensor:
    """`drop`, moved above the threshold where the window prunes."""
    above = drop - threshold
    count = drop.numel() if decisions is None else decisions
    shifted = above + window_shift(above.masked_fill(above > 0, torch.inf), count)
    return torch.where((above <= 0) & (shifted > 0), shifted + threshold, drop)
