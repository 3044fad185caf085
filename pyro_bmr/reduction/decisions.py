"""Which weights and groups go, given what each site says: by the evidence, to a target size, in a
fixed pattern, or by a search over correlated posteriors.

Owns `decide`, which returns masks. Next: `reduce.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.conditioning import initial_state
from pyro_bmr.formulas.structure import Correlated
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.priors import Gaussian, Prior, SpikeAndSlab
from pyro_bmr.reduction.correlations import correlated, independent
from pyro_bmr.reduction.groups import NofM
from pyro_bmr.reduction.rules import SiteReduction
from pyro_bmr.reduction.search import Search
from pyro_bmr.reduction.slabs import inclusion, spike_odds

Results = Mapping[str, SiteReduction]
Kept = float | Mapping[str, float] | None
SearchMethod = Callable[..., Search]


def is_point_spike(prior: Prior | None) -> bool:
    """Whether a reduced prior is the point zero, so that ΔF is all that decides."""
    return isinstance(prior, Gaussian) and prior.scale == 0


def has_width(prior: Prior | None) -> bool:
    """Whether a reduced prior is a spike and slab other than the point against the prior of the
    fit: its groups count by their marginals.
    """
    return isinstance(prior, SpikeAndSlab) and bool(prior.spike_scale or prior.slab_scale)


class Decision(NamedTuple):
    """`masks`: site → True where the weight lives. `results`: with `drop` as it was for the
    decision, the same for all entries of a group.
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
        # a weight is kept if ΔF ≤ threshold
        masks = {name: result.drop <= threshold for name, result in results.items()}
        if kept is not None:
            masks |= _by_size(results, kept)
        return Decision({**masks, **found}, dict(results))
    groups = _Groups.of(posterior, results, targets, labels)
    results = dict(results)
    drop = groups.drop(posterior, results, targets)
    goes = drop > threshold if kept is None else groups.beyond(kept, drop > threshold)
    spread = {
        name: torch.where(
            groups.labels[name] >= 0, drop.to(r.drop)[groups.labels[name]], -torch.inf
        )
        for name, r in results.items()
    }
    dropped = {
        name: replace(r, drop=spread[name].to(r.drop).masked_fill(~r.site.alive, torch.inf))
        for name, r in results.items()
    }
    masks = {
        name: r.site.alive & ~((groups.labels[name] >= 0) & goes[groups.labels[name]])
        for name, r in results.items()
    }
    return Decision({**masks, **found}, dropped)


def pattern_masks(results: Results, pattern: NofM) -> dict[str, Tensor]:
    """The masks of an n:m pattern, site by site; sites that it does not divide stay as they are.

    Raises:
        ReductionError: it divides none.
    """
    shapes = {name: tuple(result.drop.shape) for name, result in results.items()}
    whole = pattern.undivided(shapes)
    if whole and not any(
        result.drop.ndim > 1 for name, result in results.items() if name not in whole
    ):
        raise ReductionError(
            f"{pattern.left_out(shapes)}; no other site has inputs, so there is nothing to reduce:"
            " take another m"
        )
    return {
        name: result.site.alive if name in whole else pattern.mask(result.drop) & result.site.alive
        for name, result in results.items()
    }


def _by_size(results: Results, kept: float | Mapping[str, float]) -> dict[str, Tensor]:
    """The weights with the smallest spike ΔF: of all sites together, or of each site to the
    fraction of the pattern that names it.
    """
    if isinstance(kept, Mapping):
        parts = (
            _by_size({name: results[name]}, fraction)
            for name, fraction in _fractions(results, kept).items()
        )
        return {name: mask for part in parts for name, mask in part.items()}
    ranks = {
        name: result.spike_delta_f.masked_fill(~result.site.alive, torch.inf)
        for name, result in results.items()
    }
    pooled = torch.cat([rank.flatten() for rank in ranks.values()])
    _check_ranks(pooled)
    count = round(kept * pooled.numel())
    parts = (lowest(pooled, count) & pooled.isfinite()).split(
        [rank.numel() for rank in ranks.values()]
    )
    return {
        name: part.view_as(rank) for (name, rank), part in zip(ranks.items(), parts, strict=True)
    }


def lowest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` least of flat `scores` are, as bools; of equal ones, such as those of
    weights that the data say nothing of, the first.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count).values
    chosen = scores <= limit
    if spare := int(chosen.sum()) - count:
        chosen[(scores == limit).nonzero()[-spare:, 0]] = False
    return chosen


def _check_ranks(ranks: Tensor) -> None:
    if bool(ranks.isnan().any()):
        raise ReductionError(
            "kept= ranks by the point spike's ΔF, which sites without a Gaussian prior do not have;"
            " use threshold="
        )


def _fractions(results: Results, kept: Mapping[str, float]) -> dict[str, float]:
    """Site → its own target, for the sites that a pattern names."""
    for pattern in kept:
        if not any(fnmatchcase(name, pattern) for name in results):
            raise ReductionError(
                f"kept: pattern '{pattern}' matches no reduced site; the reduced sites are:"
                f" {', '.join(results)}"
            )
    chosen = {name: next((p for p in kept if fnmatchcase(name, p)), None) for name in results}
    return {name: kept[pattern] for name, pattern in chosen.items() if pattern is not None}


class _Groups(NamedTuple):
    """All groups of a reduction, with tensors of one value per group."""

    labels: dict[str, Tensor]
    size: Tensor  # living entries
    spike: Tensor  # ΔF of setting the whole group to zero
    home: Tensor  # number of the first site with entries in it
    sites: list[str]
    entries: dict[str, int]

    @classmethod
    def of(
        cls,
        posterior: Posterior,
        results: Results,
        targets: Mapping[str, Prior | None],
        labels: Mapping[str, Tensor],
    ) -> _Groups:
        own = {name: labels[name].to(r.drop.device) for name, r in results.items()}
        count = max(int(label.max()) if label.numel() else -1 for label in own.values()) + 1
        like = next(iter(results.values())).drop
        size, spike = (
            torch.zeros(count, dtype=torch.float64, device=like.device) for _ in range(2)
        )
        home = torch.full((count,), len(results), device=like.device)
        for k, (name, result) in enumerate(results.items()):
            inside = (own[name] >= 0) & result.site.alive
            index = own[name][inside]
            size.index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
            home.index_fill_(0, index[home[index] > k], k)
            block = None if has_width(targets[name]) else correlated(posterior[name], own[name])
            if block is None:
                spike.index_add_(0, index, result.spike_delta_f[inside].double())
            else:
                _add_joint(spike, block)
        return cls(
            own,
            size,
            spike,
            home,
            list(results),
            {name: r.drop.numel() for name, r in results.items()},
        )

    def drop(
        self,
        posterior: Posterior,
        results: dict[str, SiteReduction],
        targets: Mapping[str, Prior | None],
    ) -> Tensor:
        """The log odds by which each group goes: ΔF for a point spike, those of one indicator per
        group for a spike and slab, else the sum over its entries.

        Of a spike and slab, `results` gets the gain in evidence and the log odds ζ of the groups,
        booked to their first site.
        """
        total, odds, base = torch.zeros_like(self.spike), *self._odds(posterior, results, targets)
        for k, name in enumerate(self.sites):
            prior, result = targets[name], results[name]
            here = self.home == k
            if is_point_spike(prior):
                total[here] = self.spike[here]
            elif isinstance(prior, SpikeAndSlab) and not bool(here.any()):
                results[name] = replace(result, delta_f=base[name], scale=None)
            elif isinstance(prior, SpikeAndSlab):
                total[here], gain, zeta = inclusion(prior, odds[here])
                results[name] = replace(result, delta_f=gain + base[name], scale=zeta)
            else:
                self._add(total, name, result, result.drop)
        return total

    def _odds(
        self, posterior: Posterior, results: Results, targets: Mapping[str, Prior | None]
    ) -> tuple[Tensor, dict[str, float]]:
        """log p(y | spike)/p(y | slab) per group, and for each site the gain of all slab over the
        prior of the fit.
        """
        total, base = self.spike.clone(), dict.fromkeys(results, 0.0)
        for name, result in results.items():
            prior = targets[name]
            if isinstance(prior, SpikeAndSlab) and has_width(prior):
                each, base[name] = spike_odds(posterior, name, prior)
                alive = result.site.alive
                self._add(
                    total,
                    name,
                    result,
                    torch.zeros_like(result.spike_delta_f).masked_scatter(
                        alive, each - result.spike_delta_f[alive]
                    ),
                )
        return total, base

    def _add(self, total: Tensor, name: str, result: SiteReduction, each: Tensor) -> None:
        """Adds the living entries of a site to the number of each group."""
        inside = (self.labels[name] >= 0) & result.site.alive
        total.index_add_(0, self.labels[name][inside], each[inside].double())

    def beyond(self, kept: float | Mapping[str, float], by_evidence: Tensor) -> Tensor:
        """The groups that go so that no less than `kept` of all entries lives: those with the
        largest ΔF per living entry. Sites that no pattern of a mapping names leave the decision on
        their groups to the evidence.
        """
        density = self.spike / self.size.clamp(min=1)
        _check_ranks(density)
        if not isinstance(kept, Mapping):
            return self._largest(
                density, torch.ones_like(self.home, dtype=torch.bool), kept, self.sites
            )
        goes = by_evidence.clone()
        for name, fraction in _fractions(dict.fromkeys(self.sites), kept).items():  # type: ignore[arg-type]
            here = self.home == self.sites.index(name)
            goes[here] = self._largest(density, here, fraction, [name])[here]
        return goes

    def _largest(self, density: Tensor, here: Tensor, kept: float, sites: list[str]) -> Tensor:
        order = density.masked_fill(~here | (self.size == 0), -torch.inf).argsort(
            descending=True, stable=True
        )
        alive = float(self.size[here].sum()) + sum(
            int((self.labels[name] < 0).sum()) for name in sites
        )
        spare = alive - kept * sum(self.entries[name] for name in sites)
        goes = torch.zeros_like(here)
        goes[order] = (self.size * here)[order].cumsum(0) <= spare + 0.5
        return goes & here


def _add_joint(spike: Tensor, block: Correlated) -> None:
    """Adds to each group the joint Savage–Dickey ratio of its units."""
    state = initial_state(block.structure, block.prior)
    order = block.labels.argsort(stable=True)
    names, counts = block.labels[order].unique_consecutive(return_counts=True)
    if bool((counts == 1).all()):
        inside = names >= 0
        spike[names[inside]] += state.log_ratios()[order][inside]
        return
    for name, index in zip(names.tolist(), order.split(counts.tolist()), strict=True):
        if name >= 0:
            spike[name] += state.log_ratio(index, True)


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
        name for name in spikes if blocks[name] is not None and bool(posterior[name].alive.any())
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
    living = sum(r.site.living for name, r in results.items() if name in used)
    if kept is not None:
        kept = min(1.0, kept * sum(results[name].drop.numel() for name in used) / max(living, 1))
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
