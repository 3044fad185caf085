r"""Where a search over subsets stands: what each group gains by going or coming back, and the
moves.

Owns `SearchPath`, and `start` and `without`, with which every search begins and goes on. The
candidates of a step are compared through a state that a rank-one change updates
(`formulas/conditioning.py`), so none needs a factorisation of its own. Imports torch only. Next:
`search.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.conditioning import Members, State, initial_state
from pyro_bmr.formulas.diagonal import as_structure
from pyro_bmr.reduction.visited_models import Given

SMALL = 64  # groups: up to here the models one step off the path count, and pairs are tried
RISE = 1e-9  # nats, above rounding
_LOSS = 1e-10  # nats that all releasing since the last fresh start may cost
_ROUNDINGS = 8 * torch.finfo(torch.float64).eps


def start(posterior: Any, prior: Any, groups: Any) -> tuple[list[State], Members, Given]:
    """The states with nothing at zero, the groups, and what is searched, as tuples."""
    many = isinstance(posterior, Sequence) and not hasattr(posterior, "mean")
    given, priors = (tuple(posterior), tuple(prior)) if many else ((posterior,), (prior,))
    posteriors = tuple(as_structure(q) for q in given)
    labels: list[Tensor] = []
    used = 0
    for k, q in enumerate(posteriors):
        own = (
            torch.arange(q.unit_count) + used
            if groups is None
            else torch.as_tensor(groups[k] if many else groups).cpu()
        )
        if tuple(own.shape) != (q.unit_count,) or own.is_floating_point():
            raise ReductionError(
                f"groups: expected one integer for each of the {q.unit_count} entries, got"
                f" {own.dtype} of shape {tuple(own.shape)}"
            )
        labels.append(own)
        used += q.unit_count
    found: dict[int, list[tuple[int, Tensor]]] = {}
    for k, own in enumerate(labels):
        order = own.argsort(stable=True)
        names, counts = own[order].unique_consecutive(return_counts=True)
        for name, index in zip(names.tolist(), order.split(counts.tolist()), strict=True):
            if name >= 0:
                found.setdefault(name, []).append((k, index))
    if not found:
        raise ReductionError(
            "groups: every entry is in no group (−1), so there is nothing to search"
        )
    members = [found[name] for name in sorted(found)]
    return (
        [initial_state(q, p) for q, p in zip(posteriors, priors, strict=True)],
        members,
        (posteriors, priors),
    )


def without(states: Sequence[State], member: list[tuple[int, Tensor]]) -> tuple[list[State], float]:
    """The states with a group set to zero, and the ΔF of that."""
    return _flipped(states, member, True), _drop_gain(states, member, True)


class SearchPath:
    """Where a greedy search stands, and the models it has seen."""

    def __init__(self, states: list[State], members: Members, threshold: float) -> None:
        self.states, self.start, self.members, self.threshold = states, states, members, threshold
        self.kept, self.total = torch.ones(len(members), dtype=torch.bool), 0.0
        self.models, self.totals = [self.kept[None]], [torch.zeros(1, dtype=torch.float64)]
        self.stood = {bytes(self.kept.tolist())}
        self.singles = _Singles.of(members, len(states))
        self.drop = torch.empty(0)
        self.lost = 0.0  # nats, an upper bound

    def drop_gains(self) -> Tensor:
        """ΔF of setting each group to zero, given the others that are."""
        self.drop = _drop_gains(self.states, self.members, self.kept, self.singles)
        if len(self.members) <= SMALL:
            total = torch.tensor([self.total], dtype=torch.float64)
            self.see(self.kept[None], total, self.drop[None])
        return self.drop

    def see(self, kept: Tensor, total: Tensor, drop: Tensor) -> None:
        """Counts the neighbours of models, one group away, as visited."""
        count = kept.shape[1]
        self.models.append((kept[:, None] ^ torch.eye(count, dtype=torch.bool)).view(-1, count))
        self.totals.append((total[:, None] + torch.where(kept, drop, -drop)).flatten())

    def loss(self) -> float:
        """Nats that rounding may cost when a group is released: the roundings of all that is at
        zero grow with the largest variance inflation there."""
        nats = 1 + abs(self.total) + float(self.drop.abs().max())
        return _ROUNDINGS * max(state.inflation() for state in self.states) * nats

    def move(self, chosen: Tensor, only_up: bool = False) -> bool:
        """Flips the groups one after the other; with `only_up` not at all if the evidence does not
        rise, and never back to a model where the search has stood: gains that are rounding alone
        would lead it in circles. Where releasing would cost digits, all is set to zero afresh."""
        kept = self.kept.clone()
        kept[chosen] = ~kept[chosen]
        if bytes(kept.tolist()) in self.stood:
            return False
        states, total, lost = self.states, self.total, self.lost
        pruned, back = chosen[self.kept[chosen]], chosen[~self.kept[chosen]]
        if len(back):
            lost += len(back) * self.loss()
            if not lost <= _LOSS:
                states, total, lost = list(self.start), 0.0, 0.0
                pruned, back = (~kept).nonzero()[:, 0], back[:0]
        for g, kept_now in [(g, False) for g in back.tolist()] + [
            (g, True) for g in pruned.tolist()
        ]:
            here = states is self.states
            gained = float(self.drop[g]) if here else _drop_gain(states, self.members[g], kept_now)
            states = _flipped(states, self.members[g], kept_now)
            total += gained if kept_now else -gained
        fewer = float((~kept).sum() - (~self.kept).sum())
        if only_up and total - self.total - self.threshold * fewer <= RISE:
            return False
        self.states, self.kept, self.total, self.lost = states, kept, total, lost
        self.stood.add(bytes(kept.tolist()))
        self.models.append(kept[None])
        self.totals.append(torch.tensor([total], dtype=torch.float64))
        return True

    def neighbours(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every group once, the ΔF of the model in which it alone has flipped, and the gains
        there.
        """
        easy = self.lost + self.loss() <= _LOSS
        groups = (self.kept | easy).nonzero()[:, 0]
        totals = self.total + torch.where(self.kept, self.drop, -self.drop)[groups]
        table = _gains_after_each(self.states, self.drop, self.singles)
        if table is None:
            table = self.drop.expand(len(self.drop), -1).clone()
            for g in groups.tolist():
                kept_now = bool(self.kept[g])
                table[g] = self._drops(g, _flipped(self.states, self.members[g], kept_now))
        parts = [(groups, totals, table[groups])]
        rest = [] if easy else (~self.kept).nonzero()[:, 0].tolist()
        for g, fewer, total in self.left_out(self.start, 0.0, rest):
            one = torch.tensor([g]), torch.tensor([total], dtype=torch.float64)
            parts.append((*one, self._drops(g, fewer)[None]))
        chosen, totals, table = (torch.cat(column) for column in zip(*parts, strict=True))
        return chosen, totals, table

    def left_out(
        self, states: list[State], total: float, pruned: list[int]
    ) -> Iterator[tuple[int, list[State], float]]:
        """Each of the groups `pruned` with the state in which all of them but this one are set to
        zero, by halves: none is released, which loses digits."""
        if len(pruned) == 1:
            yield pruned[0], states, total
        halves = (
            ((pruned[::2], pruned[1::2]), (pruned[1::2], pruned[::2])) if len(pruned) > 1 else ()
        )
        for one, other in halves:
            fewer, so_far = states, total
            for g in other:
                fewer, gained = without(fewer, self.members[g])
                so_far += gained
            yield from self.left_out(fewer, so_far, one)

    def _drops(self, g: int, states: list[State]) -> Tensor:
        """The gains where g alone has flipped."""
        kept = self.kept.clone()
        kept[g] = ~kept[g]
        return _drop_gains(states, self.members, kept, self.singles)

    def pair(self) -> bool:
        """Flips the best pair of groups, if that raises the evidence where no single group does: an
        exchange of two correlated ones, as a rule."""
        chosen, totals, drop = self.neighbours()
        kept = self.kept ^ torch.eye(len(self.kept), dtype=torch.bool)[chosen]
        self.see(kept, totals, drop)
        price = self.threshold * torch.where(self.kept[chosen], 1.0, -1.0).to(totals)
        second = torch.where(kept, drop - self.threshold, self.threshold - drop)
        gain = (totals - self.total - price)[:, None] + second
        # back again is no pair; of a cost of 1e8 nats and its return rounding alone would be left
        gain.scatter_(1, chosen[:, None], -torch.inf)
        row, other = divmod(int(gain.nan_to_num(nan=-torch.inf).argmax()), gain.shape[1])
        return bool(gain[row, other] > RISE) and self.move(torch.tensor([int(chosen[row]), other]))


class _Singles(NamedTuple):
    """The groups of one entry: per structure their numbers and their entries. The numbers of all
    others.
    """

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
        groups, index = (
            [torch.tensor([pair[part] for pair in own], dtype=torch.long) for own in pairs]
            for part in (0, 1)
        )
        return cls(groups, index, others)


def _drop_gains(
    states: Sequence[State], members: Members, kept: Tensor, singles: _Singles
) -> Tensor:
    """Per group: log q − log p of the group at zero, given the other groups that are pruned."""
    gains = torch.empty(len(members), dtype=torch.float64)
    for state, groups, index in zip(states, singles.groups, singles.positions, strict=True):
        if len(groups):
            gains[groups] = state.log_ratios()[index].cpu()
    for g in singles.others:
        gains[g] = _drop_gain(states, members[g], bool(kept[g]))
    return gains


def _gains_after_each(states: Sequence[State], drop: Tensor, singles: _Singles) -> Tensor | None:
    """Row g: `_drop_gains` where group g alone has flipped; None where that needs the states."""
    if singles.others:
        return None
    table = drop.expand(len(drop), -1).clone()
    for state, groups, index in zip(states, singles.groups, singles.positions, strict=True):
        after = state.log_ratios_after_each(index)
        if after is None:
            return None
        table[groups[:, None], groups] = after.cpu()
    return table


def _drop_gain(states: Sequence[State], member: list[tuple[int, Tensor]], kept: bool) -> float:
    return sum(float(states[k].log_ratio(index, kept)) for k, index in member)


def _flipped(states: Sequence[State], member: list[tuple[int, Tensor]], kept: bool) -> list[State]:
    """The states with a kept group set to zero, or one at zero released."""
    flipped = list(states)
    for k, index in member:
        flipped[k] = flipped[k].flipped(index, kept)
    return flipped
