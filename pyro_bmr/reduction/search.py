r"""Which entries of correlated posteriors are best pruned together: greedy and exhaustive search over subsets, and averages over the models visited.

Owns `greedy_search`, `exhaustive_search` and their result `Search`. The candidates of a step are compared through a state that a rank-one change
updates (`states.py`), so none needs a factorisation of its own. Imports torch only. Next: `sites.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError, described
from pyro_bmr.reduction.gaussian import Diagonal, prune_subset
from pyro_bmr.reduction.states import Members, State, embedded, entries, initial_state

_EXHAUSTIVE_UP_TO = 14  # groups: 16,384 models
_SMALL = 64  # groups: up to here the models one step off the path count as visited, and pairs of groups are tried
_RISE = 1e-9  # nats, above rounding


@dataclass(frozen=True)
class Search:
    """The models that a search visited. A model is the set of groups that live; an entry without a group lives in all.

    `alive`: (models, groups) bool, the best first. `delta_f`: (models,) gain in log evidence over the full model, nats. `probability`: (models,) posterior
    probability among the models visited, ∝ exp(ΔF − threshold · number of groups pruned). `posterior`, `prior`, `members`: what was searched.
    """

    alive: Tensor
    delta_f: Tensor
    probability: Tensor
    posterior: tuple[Any, ...]
    prior: tuple[Any, ...]
    members: Members

    @property
    def inclusion(self) -> Tensor:
        """The posterior probability of each group, (groups,): the sum over the models it lives in."""
        return self.probability @ self.alive.to(self.probability)

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """Of the best model: one bool tensor per structure, True where an entry (of a matrix normal, a row) lives."""
        return self.masks_of(0)

    @property
    def mask(self) -> Tensor:
        """`masks` of a search over one structure."""
        if len(self.posterior) != 1:
            raise ReductionError(f"{len(self.posterior)} structures were searched; take masks")
        return self.masks[0]

    def masks_of(self, model: int) -> tuple[Tensor, ...]:
        """As `masks`, of another model: a row of `alive`."""
        masks = [torch.ones(entries(q), dtype=torch.bool, device=q.mean.device) for q in self.posterior]
        for group in (~self.alive[model]).nonzero()[:, 0].tolist():
            for block, index in self.members[group]:
                masks[block][index] = False
        return tuple(masks)

    def reduced(self, model: int = 0) -> tuple[Any, ...]:
        """The structures after the reduction to a model, the pruned entries 0 with variance 0."""
        return tuple(
            q if bool(mask.all()) else embedded(prune_subset(q, p, ~mask)[1], mask)
            for q, p, mask in zip(self.posterior, self.prior, self.masks_of(model), strict=True)
        )

    def average(self, window: float = 3.0) -> tuple[Diagonal, ...]:
        r"""Mean and variance of every entry under the average of the models within `window` nats of the best (Occam's window).

        .. math:: \bar\mu = \sum_k p_k \mu_k, \qquad \bar\sigma^2 = \sum_k p_k (\sigma_k^2 + \mu_k^2) - \bar\mu^2

        Source: Hoeting, Madigan, Raftery & Volinsky 1999; Penny et al. 2010 for nested dynamic models, whose window of odds 1:20 is 3 nats.
        """
        chosen = (self.probability >= self.probability[0] * math.exp(-window)).nonzero()[:, 0].tolist()
        weights = self.probability[chosen] / self.probability[chosen].sum()
        models = [self.reduced(model) for model in chosen]
        averages = []
        for k, q in enumerate(self.posterior):
            means, variances = (torch.stack([part(model[k]).double() for model in models]) for part in (lambda g: g.mean, marginal_var))
            share = weights.to(means).view(-1, *[1] * q.mean.ndim)
            mean = (share * means).sum(0)
            var = (share * (variances + (means - mean).square())).sum(0)  # Σ pσ² + Σ p(μ − μ̄)²: the second moments would cancel
            averages.append(Diagonal(mean.to(q.mean.dtype), var.to(q.mean.dtype)))
        return tuple(averages)


def marginal_var(structure: Any) -> Tensor:
    """The variances of a structure's entries, in the shape of its mean."""
    if hasattr(structure, "cov"):
        return structure.cov.diagonal()
    if hasattr(structure, "factor"):
        return structure.var + structure.factor.square().sum(-1)
    return structure.row_cov.diagonal()[:, None] * structure.col_cov.diagonal() if hasattr(structure, "row_cov") else structure.var


def greedy_search(posterior: Any, prior: Any, groups: Any = None, *, threshold: float = 0.0, kept: float | None = None, batch: int | None = None) -> Search:
    r"""The best model found by dropping, or taking back, one group at a time, always the one that raises the evidence most, until none does.

    Up to 64 groups, pairs of groups are tried then (two correlated regressors change places), and the search goes on if one raises the evidence.

    The gain of dropping group g, given that the groups S are gone, is the ratio of two Gaussian densities at zero,

    .. math:: \log q(\theta_g = 0 \mid \theta_S = 0) - \log p(\theta_g = 0 \mid \theta_S = 0),

    and taking it back gains minus that. In a linear-Gaussian model the gains are those of the exact evidence. Source: Friston & Penny 2011, section 2.4.

    Args:
        posterior: `Dense`, `LowRank`, `MatrixNormal` (whose entries are its rows) or `Diagonal`; or a list of such, independent of each other.
        prior: for `Dense` a `Dense` or anything with diagonal moments; for the others diagonal moments. A list if `posterior` is one.
        groups: the number of each entry's group, −1 for entries that stay; by default each entry is its own. A list if `posterior` is one; a group
            may have entries in several.
        threshold: nats; what a group must gain to go, and what one must lose to come back.
        kept: instead of the evidence, a target: groups go until no more than this fraction of all entries lives.
        batch: how many groups may go in one step, those with the largest gains. A step that does not raise the evidence is taken again with
            half as many. By default 1 for every 200 groups.

    Raises:
        ReductionError: no group is given, groups do not fit, or a covariance is not positive definite.

    Example:
        >>> greedy_search(Dense(mean, cov), Gaussian(1.0)).mask  # the coefficients that stay
    """
    states, members, given = _start(posterior, prior, groups)
    count = len(members)
    batch = max(1, count // 200) if batch is None else batch
    path = _Path(states, members, threshold)
    excess = None if kept is None else _Excess(_sizes(members), sum(entries(q) for q in given[0]), kept)
    while True:
        drop = path.drop_gains()  # ΔF of setting each group to zero, given the others that are
        if excess is not None:
            most = excess.groups(path.alive)
            if not most:
                break
            path.move(drop.masked_fill(~path.alive, -torch.inf).topk(min(batch, most)).indices)
            continue
        gain = torch.where(path.alive, drop - threshold, threshold - drop)
        best = gain.topk(min(batch, count)).indices
        best = best[gain[best] > _RISE]
        if len(best) > 1:
            batch = batch if path.move(best, only_up=True) else max(1, batch // 2)
        elif not (len(best) and path.move(best)) and (count > _SMALL or not path.pair()):
            break
    last = None if kept is None else path.alive
    return _result(torch.stack(path.models), torch.tensor(path.totals, dtype=torch.float64), threshold, given, members, last)


class _Excess(NamedTuple):
    """How far a model is above the target."""

    sizes: Tensor
    total: int
    kept: float

    def groups(self, alive: Tensor) -> int:
        """How many of the largest groups the excess holds, at least 1; 0 if the target is met or nothing is left to go."""
        excess = self.total - int(self.sizes[~alive].sum()) - round(self.kept * self.total)
        return 0 if excess <= 0 or not bool(alive.any()) else max(1, min(excess // int(self.sizes.max()), int(alive.sum())))


class _Path:
    """Where a greedy search stands, and the models it has seen."""

    def __init__(self, states: list[State], members: Members, threshold: float) -> None:
        self.states, self.start, self.members, self.threshold = states, states, members, threshold
        self.alive, self.total = torch.ones(len(members), dtype=torch.bool), 0.0
        self.models, self.totals = [self.alive], [0.0]
        self.stood = {bytes(self.alive.tolist())}
        self.singles = _Singles.of(members, len(states))

    def drop_gains(self) -> Tensor:
        drop = _drop_gains(self.states, self.members, self.alive, self.singles)
        if len(self.members) <= _SMALL:
            self.see(self.alive, self.total, drop)
        return drop

    def see(self, alive: Tensor, total: float, drop: Tensor) -> None:
        """Counts the neighbours of a model, one group away, as visited."""
        self.models += list(alive ^ torch.eye(len(alive), dtype=torch.bool))
        self.totals += (total + torch.where(alive, drop, -drop)).tolist()

    def move(self, chosen: Tensor, only_up: bool = False) -> bool:
        """Flips the groups one after the other; with `only_up` not at all if the evidence does not rise, and never back to a model where the search has
        stood: gains that are rounding alone would lead it in circles."""
        alive = self.alive.clone()
        alive[chosen] = ~alive[chosen]
        if bytes(alive.tolist()) in self.stood:
            return False
        states, total, gone = self.states, self.total, chosen[self.alive[chosen]]
        if len(gone) < len(chosen):  # letting go loses digits: set the rest to zero afresh
            states, total, gone = self.start, 0.0, (~alive).nonzero()[:, 0]
        for g in gone.tolist():
            states, gained = _without(states, self.members[g])
            total += gained
        if only_up and total - self.total - self.threshold * float((~alive).sum() - (~self.alive).sum()) <= _RISE:
            return False
        self.states, self.alive, self.total = states, alive, total
        self.stood.add(bytes(alive.tolist()))
        self.models.append(alive)
        self.totals.append(total)
        return True

    def neighbours(self) -> Iterator[tuple[int, list[State], float]]:
        """Each group with the state in which it alone has flipped, and the ΔF of that."""
        for g in self.alive.nonzero()[:, 0].tolist():
            states, gained = _without(self.states, self.members[g])
            yield g, states, self.total + gained
        yield from self.left_out(self.start, 0.0, (~self.alive).nonzero()[:, 0].tolist())

    def left_out(self, states: list[State], total: float, gone: list[int]) -> Iterator[tuple[int, list[State], float]]:
        """Each of the groups `gone` with the state in which all of them but this one are set to zero, by halves: none is let go, which loses digits."""
        if len(gone) == 1:
            yield gone[0], states, total
        for one, other in ((gone[::2], gone[1::2]), (gone[1::2], gone[::2])) if len(gone) > 1 else ():
            fewer, so_far = states, total
            for g in other:
                fewer, gained = _without(fewer, self.members[g])
                so_far += gained
            yield from self.left_out(fewer, so_far, one)

    def pair(self) -> bool:
        """Flips the best pair of groups, if that raises the evidence where no single group does: an exchange of two correlated ones, as a rule."""
        best, choice = _RISE, None
        for g, states, total in self.neighbours():
            alive = self.alive.clone()
            alive[g] = ~alive[g]
            drop = _drop_gains(states, self.members, alive, self.singles)
            self.see(alive, total, drop)
            gain = total - self.total - self.threshold * (1 if self.alive[g] else -1) + torch.where(alive, drop - self.threshold, self.threshold - drop)
            gain[g] = -torch.inf  # back again is no pair; of a cost of 1e8 nats and its return rounding alone would stay
            if float(gain.max()) > best:
                best, choice = float(gain.max()), torch.tensor([g, int(gain.argmax())])
        return choice is not None and self.move(choice)


def exhaustive_search(posterior: Any, prior: Any, groups: Any = None, *, threshold: float = 0.0, kept: float | None = None) -> Search:
    """All 2^groups models, for up to 14 groups; arguments as for `greedy_search`. With `kept`, the best of those that keep no more than this fraction.

    Raises:
        ReductionError: there are more groups, or none; or as `greedy_search`.

    Example:
        >>> exhaustive_search(Dense(mean, cov), Gaussian(1.0)).inclusion  # the probability of each, over all models
    """
    states, members, given = _start(posterior, prior, groups)
    count = len(members)
    if count > _EXHAUSTIVE_UP_TO:
        raise ReductionError(f"{count} groups make 2^{count} models; up to {_EXHAUSTIVE_UP_TO} groups can be searched exhaustively: take greedy_search")
    models, totals = [torch.ones(count, dtype=torch.bool)], [0.0]
    below = [(states, models[0], 0.0, 0)]
    while below:  # a model's children have one group less, of a higher number: nothing is ever let go, which would lose digits
        states, alive, total, lowest = below.pop()
        for g in range(lowest, count):
            fewer, gained = _without(states, members[g])
            without = alive.clone()
            without[g] = False
            models.append(without)
            totals.append(total + gained)
            if g + 1 < count:
                below.append((fewer, without, total + gained, g + 1))
    table, gains = torch.stack(models), torch.tensor(totals, dtype=torch.float64)
    if kept is not None:
        sizes = _sizes(members)
        total_entries = sum(entries(q) for q in given[0])
        fits = table.long() @ sizes + total_entries - sizes.sum() <= round(kept * total_entries)
        if not bool(fits.any()):
            raise ReductionError(f"kept={described(kept)}: entries without a group, which stay, are already more; raise kept or give them groups")
        table, gains = table[fits], gains[fits]
    return _result(table, gains, threshold, given, members, None)


Given = tuple[tuple[Any, ...], tuple[Any, ...]]


def _start(posterior: Any, prior: Any, groups: Any) -> tuple[list[State], Members, Given]:
    many = isinstance(posterior, Sequence) and not hasattr(posterior, "mean")
    posteriors, priors = (tuple(posterior), tuple(prior)) if many else ((posterior,), (prior,))
    labels: list[Tensor] = []
    used = 0
    for k, q in enumerate(posteriors):
        own = torch.arange(entries(q)) + used if groups is None else torch.as_tensor(groups[k] if many else groups).cpu()
        if tuple(own.shape) != (entries(q),) or own.is_floating_point():
            raise ReductionError(f"groups: one integer for each of the {entries(q)} entries is wanted, got {own.dtype} of shape {tuple(own.shape)}")
        labels.append(own)
        used += entries(q)
    found: dict[int, list[tuple[int, Tensor]]] = {}
    for k, own in enumerate(labels):
        order = own.argsort(stable=True)
        names, counts = own[order].unique_consecutive(return_counts=True)
        for name, index in zip(names.tolist(), order.split(counts.tolist()), strict=True):
            if name >= 0:
                found.setdefault(name, []).append((k, index))
    if not found:
        raise ReductionError("groups: every entry is in no group (−1), so there is nothing to search")
    members = [found[name] for name in sorted(found)]
    return [initial_state(q, p) for q, p in zip(posteriors, priors, strict=True)], members, (posteriors, priors)


class _Singles(NamedTuple):
    """The groups of one entry: per structure their numbers and their entries. The numbers of all others."""

    groups: list[Tensor]
    positions: list[Tensor]
    others: list[int]

    @classmethod
    def of(cls, members: Members, structures: int) -> _Singles:
        pairs: list[list[tuple[int, int]]] = [[] for _ in range(structures)]
        others = []
        for g, member in enumerate(members):
            if len(member) == 1 and len(member[0][1]) == 1:
                pairs[member[0][0]].append((g, int(member[0][1])))
            else:
                others.append(g)
        groups, index = ([torch.tensor([pair[part] for pair in own], dtype=torch.long) for own in pairs] for part in (0, 1))
        return cls(groups, index, others)


def _drop_gains(states: Sequence[State], members: Members, alive: Tensor, singles: _Singles) -> Tensor:
    """Per group: log q − log p of the group at zero, given the other groups that are gone."""
    gains = torch.empty(len(members), dtype=torch.float64)
    for state, groups, index in zip(states, singles.groups, singles.positions, strict=True):
        if len(groups):
            gains[groups] = state.log_ratios()[index].cpu()
    for g in singles.others:
        gains[g] = _drop_gain(states, members[g], bool(alive[g]))
    return gains


def _sizes(members: Members) -> Tensor:
    return torch.tensor([sum(len(index) for _, index in member) for member in members])


def _drop_gain(states: Sequence[State], member: list[tuple[int, Tensor]], alive: bool) -> float:
    return sum(float(states[k].log_ratio(index, alive)) for k, index in member)


def _without(states: Sequence[State], member: list[tuple[int, Tensor]]) -> tuple[list[State], float]:
    """The states with a group set to zero, and the ΔF of that."""
    drop = _drop_gain(states, member, True)
    fewer = list(states)
    for k, index in member:
        fewer[k] = fewer[k].flipped(index, True)
    return fewer, drop


def _result(models: Tensor, totals: Tensor, threshold: float, given: Given, members: Members, first: Tensor | None) -> Search:
    table, inverse = models.unique(dim=0, return_inverse=True)
    gains = torch.empty(len(table), dtype=torch.float64).scatter_(0, inverse, totals)
    score = gains - threshold * (~table).sum(1)
    order = score.argsort(descending=True, stable=True)
    if first is not None:  # the model of the target stands first, whatever its evidence
        at = (table == first).all(1).nonzero()[0]
        order = torch.cat([at, order[order != at]])
    probability = torch.softmax(score, 0)[order]
    return Search(table[order], gains[order], probability, *given, members)
