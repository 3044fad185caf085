"""The evidence of groups over all sites of a reduction, and which of them a target size prunes.

Owns `Groups`, and what single weights and groups share. Next: `decisions.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.conditioning import initial_state
from pyro_bmr.formulas.structure import Correlated
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.priors import Prior, SpikeAndSlab
from pyro_bmr.reduction.correlations import correlated
from pyro_bmr.reduction.label_sums import label_counts, label_sums, moved, varying
from pyro_bmr.reduction.reduced_site import SiteReduction
from pyro_bmr.reduction.rules import is_point_spike
from pyro_bmr.reduction.slabs import inclusion, spike_odds

Results = Mapping[str, SiteReduction]


def has_width(prior: Prior | None) -> bool:
    """Whether a reduced prior is a spike and slab other than the point against the prior of the
    fit: its groups count by their marginals.
    """
    return isinstance(prior, SpikeAndSlab) and bool(prior.spike_scale or prior.slab_scale)


class Groups(NamedTuple):
    """All groups of a reduction, with tensors of one value per group."""

    labels: dict[str, Tensor]
    size: Tensor  # kept entries
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
    ) -> Groups:
        own = {name: moved(labels[name], r.drop_log_odds.device) for name, r in results.items()}
        count = max(int(varying(o).max()) if o.numel() else -1 for o in own.values()) + 1
        like = next(iter(results.values())).drop_log_odds
        size, spike = (
            torch.zeros(count, dtype=torch.float64, device=like.device) for _ in range(2)
        )
        home = torch.full((count,), len(results), device=like.device)
        for k, (name, result) in enumerate(results.items()):
            entries = label_counts(own[name], count, result.site.mask)
            size += entries
            home = home.where(entries == 0, home.clamp(max=k))
            block = None if has_width(targets[name]) else correlated(posterior[name], own[name])
            if block is None:
                spike += label_sums(own[name], result.spike_delta_f, count, result.site.mask)
            else:
                _add_joint(spike, block)
        numel = {name: r.drop_log_odds.numel() for name, r in results.items()}
        return cls(own, size, spike, home, list(results), numel)

    def drop(
        self,
        posterior: Posterior,
        results: dict[str, SiteReduction],
        targets: Mapping[str, Prior | None],
    ) -> Tensor:
        """The log odds of pruning each group: ΔF for a point spike, those of one indicator per
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
                total += self._sums(name, result, result.drop_log_odds)
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
                spike, present = result.spike_delta_f, result.site.kept
                more = torch.zeros_like(spike).masked_scatter(present, each - spike[present])
                total += self._sums(name, result, more)
        return total, base

    def _sums(self, name: str, result: SiteReduction, each: Tensor) -> Tensor:
        """The sum over the kept entries of a site in each group."""
        return label_sums(self.labels[name], each, len(self.size), result.site.mask)

    def beyond(self, kept: float | Mapping[str, float], by_evidence: Tensor) -> Tensor:
        """The groups to prune so that no less than `kept` of all entries is kept: those with the
        largest ΔF per kept entry. A target of a site counts all entries of its groups, in whatever
        site. Sites that no pattern of a mapping names leave the decision on their groups to the
        evidence.
        """
        density = self.spike / self.size.clamp(min=1)
        check_ranks(density)
        if not isinstance(kept, Mapping):
            return self._largest(
                density, torch.ones_like(self.home, dtype=torch.bool), kept, self.sites
            )
        pruned = by_evidence.clone()
        for name, fraction in fractions(dict.fromkeys(self.sites), kept).items():  # type: ignore[arg-type]
            here = self.home == self.sites.index(name)
            pruned[here] = self._largest(density, here, fraction, [name])[here]
        return pruned

    def _largest(self, density: Tensor, here: Tensor, kept: float, sites: list[str]) -> Tensor:
        order = density.masked_fill(~here | (self.size == 0), -torch.inf).argsort(
            descending=True, stable=True
        )
        counts = {name: label_counts(self.labels[name], len(here)) for name in self.sites}
        in_none = sum(self.entries[name] - float(counts[name].sum()) for name in sites)
        # with the entries that the groups of these sites have elsewhere, such as biases
        own = torch.stack([counts[name] > 0 for name in sites]).any(0)
        own &= here | (self.home == len(self.sites))
        whole = in_none + sum(float(count[own].sum()) for count in counts.values())
        spare = float(self.size[here].sum()) + in_none - kept * whole
        pruned = torch.zeros_like(here)
        pruned[order] = (self.size * here)[order].cumsum(0) <= spare + 0.5
        return pruned & here


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


def check_ranks(ranks: Tensor) -> None:
    """ReductionError unless every entry has a spike ΔF."""
    if bool(ranks.isnan().any()):
        raise ReductionError(
            "kept= ranks by the point spike's ΔF, which sites without a Gaussian prior do not have;"
            " use threshold="
        )


def fractions(results: Results, kept: Mapping[str, float]) -> dict[str, float]:
    """Site → its own target, for the sites that a pattern names."""
    for pattern in kept:
        if not any(fnmatchcase(name, pattern) for name in results):
            raise ReductionError(
                f"kept: pattern '{pattern}' matches no reduced site; the reduced sites are:"
                f" {', '.join(results)}"
            )
    chosen = {name: next((p for p in kept if fnmatchcase(name, p)), None) for name in results}
    return {name: kept[pattern] for name, pattern in chosen.items() if pattern is not None}
