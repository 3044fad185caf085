r"""Which entries of correlated posteriors are best pruned together: greedy and exhaustive search
over subsets.

Owns `greedy_search` and `exhaustive_search`; their result `Search` is in `visited_models.py`, the
steps of a search are in `search_path.py`. Imports torch only. Next: `collapse.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError, described
from pyro_bmr.formulas.conditioning import Members
from pyro_bmr.reduction.search_path import RISE, SMALL, SearchPath, start, without
from pyro_bmr.reduction.visited_models import Search as Search
from pyro_bmr.reduction.visited_models import search_result

_EXHAUSTIVE_UP_TO = 14  # groups: 16,384 models


def greedy_search(
    posterior: Any,
    prior: Any,
    groups: Any = None,
    *,
    threshold: float = 0.0,
    kept: float | None = None,
    batch: int | None = None,
) -> Search:
    r"""The best model found by dropping, or taking back, one group at a time, always the one that
    raises the evidence most, until none does.

    Up to 64 groups, pairs of groups are tried then (two correlated regressors change places), and
    the search goes on if one raises the evidence.

    The gain of dropping group g, given that the groups S are pruned, is the ratio of two Gaussian
    densities at zero,

    .. math:: \log q(\theta_g = 0 \mid \theta_S = 0) - \log p(\theta_g = 0 \mid \theta_S = 0),

    and taking it back gains minus that. In a linear-Gaussian model the gains are those of the exact
    evidence. Source: Friston & Penny 2011, section 2.4.

    Args:
        posterior: `Dense`, `LowRank`, `MatrixNormal` (whose entries are its rows) or `Diagonal`; or
            a list of such, independent of each other.
        prior: for `Dense` a `Dense` or anything with diagonal moments; for the others diagonal
            moments. A list if `posterior` is one.
        groups: the number of each entry's group, −1 for entries that are always kept; by default
            each entry is its own. A list if `posterior` is one; a group may have entries in
            several.
        threshold: nats; what pruning a group must gain, and what taking one back must gain.
        kept: instead of the evidence, a target: groups are pruned until no more than this fraction
            of all entries is kept.
        batch: how many groups may be pruned in one step, those with the largest gains. A step that
            does not raise the evidence is taken again with half as many. By default 1 for every 200
            groups.

    Raises:
        ReductionError: no group is given, groups do not fit, or a covariance is not positive
            definite.

    Example:
        >>> greedy_search(Dense(mean, cov), Gaussian(1.0)).mask  # the kept coefficients
    """
    states, members, given = start(posterior, prior, groups)
    count = len(members)
    batch = max(1, count // 200) if batch is None else batch
    path = SearchPath(states, members, threshold)
    excess = (
        None
        if kept is None
        else _Excess(_sizes(members), sum(q.unit_count for q in given[0]), kept)
    )
    while True:
        drop = path.drop_gains()  # ΔF of setting each group to zero, given the others that are
        if excess is not None:
            most = excess.groups(path.kept)
            if not most:
                break
            path.move(drop.masked_fill(~path.kept, -torch.inf).topk(min(batch, most)).indices)
            continue
        gain = torch.where(path.kept, drop - threshold, threshold - drop)
        best = gain.topk(min(batch, count)).indices
        best = best[gain[best] > RISE]
        if len(best) > 1:
            batch = batch if path.move(best, only_up=True) else max(1, batch // 2)
        elif not (len(best) and path.move(best)) and (count > SMALL or not path.pair()):
            break
    last = None if kept is None else path.kept
    return search_result(
        torch.cat(path.models), torch.cat(path.totals), threshold, given, members, last
    )


class _Excess(NamedTuple):
    """How far a model is above the target."""

    sizes: Tensor
    total: int
    kept: float

    def groups(self, left: Tensor) -> int:
        """How many of the largest groups the excess holds, at least 1; 0 if the target is met or
        nothing is left to go.
        """
        excess = self.total - int(self.sizes[~left].sum()) - round(self.kept * self.total)
        return (
            0
            if excess <= 0 or not bool(left.any())
            else max(1, min(excess // int(self.sizes.max()), int(left.sum())))
        )


def exhaustive_search(
    posterior: Any,
    prior: Any,
    groups: Any = None,
    *,
    threshold: float = 0.0,
    kept: float | None = None,
) -> Search:
    """All 2^groups models, for up to 14 groups; arguments as for `greedy_search`. With `kept`, the
    best of those that keep no more than this fraction.

    Raises:
        ReductionError: there are more groups, or none; or as `greedy_search`.

    Example:
        >>> # the probability of each, over all models
        >>> exhaustive_search(Dense(mean, cov), Gaussian(1.0)).inclusion
    """
    states, members, given = start(posterior, prior, groups)
    count = len(members)
    if count > _EXHAUSTIVE_UP_TO:
        raise ReductionError(
            f"{count} groups make 2^{count} models; up to {_EXHAUSTIVE_UP_TO} groups can be"
            " searched exhaustively: take greedy_search"
        )
    models, totals = [torch.ones(count, dtype=torch.bool)], [0.0]
    below = [(states, models[0], 0.0, 0)]
    # a model's children have one group less, of a higher number: nothing is ever let go, which
    # would lose digits
    while below:
        states, model, total, lowest = below.pop()
        for g in range(lowest, count):
            fewer, gained = without(states, members[g])
            rest = model.clone()
            rest[g] = False
            models.append(rest)
            totals.append(total + gained)
            if g + 1 < count:
                below.append((fewer, rest, total + gained, g + 1))
    table, gains = torch.stack(models), torch.tensor(totals, dtype=torch.float64)
    if kept is not None:
        sizes = _sizes(members)
        total_entries = sum(q.unit_count for q in given[0])
        fits = table.long() @ sizes + total_entries - sizes.sum() <= round(kept * total_entries)
        if not bool(fits.any()):
            raise ReductionError(
                f"kept={described(kept)}: expected at least the entries without a group, which are"
                " always kept, got fewer; raise kept or give them groups"
            )
        table, gains = table[fits], gains[fits]
    return search_result(table, gains, threshold, given, members)


def _sizes(members: Members) -> Tensor:
    return torch.tensor([sum(len(index) for _, index in member) for member in members])
