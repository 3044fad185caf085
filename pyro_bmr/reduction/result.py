"""`Reduction`: what a reduction says of each site and of the whole; looked at, partly taken, put
after another, saved and loaded.

Owns `Reduction`. Next: `group_evidence.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.reduction.cautions import cautions
from pyro_bmr.reduction.correlations import gain_of_both, spike_gains
from pyro_bmr.reduction.label_sums import at_labels, label_counts, label_sums, moved, varying
from pyro_bmr.reduction.multiplied import multiplied
from pyro_bmr.reduction.reduced_site import SiteReduction
from pyro_bmr.reduction.reduction_file import read_reduction, write_reduction

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Reduction:
    """Site → `SiteReduction`, the whole posterior after the reduction, sites that were not reduced
    included, and the one `before` it.

    `groups`: site → number of each entry's group where groups were decided on; None for single
    weights. `warnings`: what may mislead in it, one sentence each, as `reduce` warned of it.
    """

    sites: Mapping[str, SiteReduction]
    posterior: Posterior
    before: Posterior
    groups: Mapping[str, Tensor] | None = None
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        size = sum(mask.numel() for mask in self.masks.values())
        said = [f"{len(self.sites)} sites", f"{self.kept:.1%} of {size:,} entries kept"]
        said += [f"ΔF {self.delta_f:.1f} nats"]
        said += [f"{len(self.warnings)} warnings"] if self.warnings else []
        return f"Reduction({', '.join(said)})"

    @property
    def masks(self) -> dict[str, Tensor]:
        """Site → bool tensor, True where the weight is kept; for reduced sites."""
        return {name: result.site.kept for name, result in self.sites.items()}

    @property
    def delta_f(self) -> float:
        """Gain in log evidence over all sites, nats; a lower bound if it is one for a site."""
        return sum(result.delta_f for result in self.sites.values())

    @property
    def kept(self) -> float:
        """The fraction of the reduced sites' weights that are kept."""
        masks = self.masks.values()
        return sum(int(mask.count_nonzero()) for mask in masks) / sum(
            mask.numel() for mask in masks
        )

    def table(self, *, entries: bool = False) -> pd.DataFrame:
        """One row per site: site, size, kept (fraction), delta_f (nats), wider, scale, given (sites
        at whose median the prior was taken); and `upper`, above which no ΔF is, if `delta_f` is a
        lower bound for a site (`SiteReduction.upper`).

        With `entries` one row per entry: site, index (a tuple), mean and sd before and after the
        reduction (mean_after, sd_after; as those of `Site`), spike_delta_f and drop_log_odds
        (nats), kept.
        """
        import pandas as pd

        if entries:
            return pd.concat([self._entries(name) for name in self.sites], ignore_index=True)
        columns = ["site", "size", "kept", "delta_f", "wider", "scale", "given"]
        rows = []
        for name, r in self.sites.items():
            kept, given = float(r.site.kept.double().mean()), ", ".join(r.site.given)
            rows.append((name, r.drop_log_odds.numel(), kept, r.delta_f, r.wider, r.scale, given))
        table = pd.DataFrame(rows, columns=columns)
        if any(r.upper is not None for r in self.sites.values()):
            both = [r.delta_f if r.upper is None else r.upper for r in self.sites.values()]
            table.insert(4, "upper", both)
        return table

    def _entries(self, name: str) -> pd.DataFrame:
        """The rows of `table` for the entries of one site."""
        import pandas as pd

        result, before = self.sites[name], self.before[name]
        columns = {
            "mean": before.mean,
            "sd": before.var.sqrt(),
            "mean_after": result.site.mean,
            "sd_after": result.site.var.sqrt(),
            "spike_delta_f": result.spike_delta_f,
            "drop_log_odds": result.drop_log_odds,
            "kept": result.site.kept,
        }
        index = list(np.ndindex(tuple(before.mean.shape)))
        numbers = {key: t.detach().cpu().reshape(-1).numpy() for key, t in columns.items()}
        return pd.DataFrame({"site": name, "index": pd.Series(index, dtype=object), **numbers})

    def curve(self, points: int = 100) -> pd.DataFrame:
        """ΔF over the number of weights pruned: the columns pruned, kept (fraction) and delta_f
        (nats), `points` rows from nothing to everything.

        The weights, or groups, are pruned in the order of their spike ΔF per weight; each row is
        the ΔF of all that are pruned so far together, jointly where the posterior has correlations.
        Weights that were pruned before the reduction count as pruned in each row.

        Raises:
            ReductionError: a site has no spike ΔF, since its prior in the fit was not Gaussian.
        """
        import pandas as pd

        ranks = self._ranks()
        pooled = torch.cat([rank[self.before[name].kept].flatten() for name, rank in ranks.items()])
        if bool(pooled.isnan().any()):
            raise ReductionError(
                "the curve needs the point spike's ΔF, which sites without a Gaussian prior do not"
                " have; take the others with only()"
            )
        size = sum(rank.numel() for rank in ranks.values())
        before = size - pooled.numel()
        order = pooled.sort(descending=True).values
        limits = [
            order[count - 1] if count else torch.tensor(torch.inf)
            for count in sorted({round(k * len(order) / (points - 1)) for k in range(points)})
        ]
        gains, pruned = [0.0] * len(limits), [before] * len(limits)
        for name, rank in ranks.items():
            site = self.before[name]
            masks = [site.kept & ~(rank >= limit) for limit in limits]
            own = spike_gains(site, masks, self.sites[name].spike_delta_f)
            gains = [a + b for a, b in zip(gains, own, strict=True)]
            pruned = [
                n + site.kept_count - int(m.sum()) for n, m in zip(pruned, masks, strict=True)
            ]
        rows = [(n, 1 - n / size, gain) for n, gain in zip(pruned, gains, strict=True)]
        return pd.DataFrame(rows, columns=["pruned", "kept", "delta_f"]).drop_duplicates(
            "pruned", ignore_index=True
        )

    def plot(self, axes: Any = None, points: int = 100) -> Any:
        """Draws `curve` into `axes`, or into a new figure, with the reduction itself as a dot;
        returns the axes.
        """
        curve = self.curve(points)
        axes = curve.plot(x="pruned", y="delta_f", ax=axes, legend=False, grid=True)
        axes.set(xlabel="weights pruned", ylabel="ΔF (nats)")
        pruned = sum(int((~mask).sum()) for mask in self.masks.values())
        axes.plot([pruned], [self.delta_f], marker="o")
        return axes

    def only(self, *patterns: str) -> Reduction:
        """The same reduction of the sites that a pattern names (shell style, such as "fc1.*"), all
        other sites left as they were before.

        Raises:
            ReductionError: a pattern matches no reduced site.
        """
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in self.sites):
                raise ReductionError(
                    f"pattern '{pattern}' matches no reduced site; the reduced sites are:"
                    f" {', '.join(self.sites)}"
                )
        taken = {
            name: result
            for name, result in self.sites.items()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        groups = None if self.groups is None else {name: self.groups[name] for name in taken}
        # said again of the sites that were taken
        apart = multiplied(self.before, self.sites, self.groups)
        said = [message for message in self._of_no_site if message not in apart]
        if {*apart} & {*self.warnings}:
            said += multiplied(self.before, taken, groups)
        return self._of(taken, groups, tuple(said))

    def then(self, second: Reduction) -> Reduction:
        """Both reductions as one, from the posterior before the first: gains add up, the masks are
        those after the second.

        Of a site that both reduce, the second must have started from where the first ended. Sites
        that only one reduces are taken from it, so that two parts of one reduction, or reductions
        of different sites of one posterior, go together too.

        Raises:
            ReductionError: the second did not start there, or the two are of different posteriors.
        """
        for name in dict.fromkeys([*self.before, *second.before]):
            start = (
                self.posterior if name in self.sites and name in second.sites else self.before
            ).sites.get(name)
            if not _same(start, second.before.sites.get(name)) and not (
                name not in second.sites
                and _same(self.posterior.sites.get(name), second.before.sites.get(name))
            ):
                raise ReductionError(
                    f"site '{name}': the second reduction did not start from the first's posterior;"
                    " reduce first.posterior, or different sites"
                )
        sites = dict(self.sites)
        for name, result in second.sites.items():
            if name in self.sites:
                result = gain_of_both(self.before[name], self.sites[name], result)
            sites[name] = result
        return self._of(sites, None, tuple(dict.fromkeys(self._of_no_site + second._of_no_site)))

    def _of(
        self,
        sites: Mapping[str, SiteReduction],
        groups: Mapping[str, Tensor] | None,
        more: tuple[str, ...],
    ) -> Reduction:
        """From the same posterior with these sites, with the warnings that are true of them and
        `more`.
        """
        after = replace(
            self.before,
            sites={**self.before.sites, **{name: result.site for name, result in sites.items()}},
        )
        return Reduction(sites, after, self.before, groups, more + cautions(self.before, sites))

    @property
    def _of_no_site(self) -> tuple[str, ...]:
        """The warnings that do not come from the sites, such as of those that a pattern left
        out.
        """
        own = cautions(self.before, self.sites)
        return tuple(message for message in self.warnings if message not in own)

    def save(self, folder: str | Path) -> None:
        """Writes `before.safetensors`, `after.safetensors` (two posteriors), `sites.safetensors`
        and `reduction.json` to `folder`, all four or none.
        """
        write_reduction(
            Path(folder), self.sites, self.posterior, self.before, self.groups, self.warnings
        )

    @classmethod
    def load(cls, folder: str | Path) -> Reduction:
        """A reduction saved by `save`; nothing is unpickled.

        Raises:
            ReductionError: the folder does not hold one, or a file of it is damaged, or of another
                reduction than the rest.
        """
        return cls(*read_reduction(Path(folder)))

    def _ranks(self) -> dict[str, Tensor]:
        """Per entry the spike ΔF, or of groups the mean over the group; entries in no group
        −inf.
        """
        spikes = {name: result.spike_delta_f for name, result in self.sites.items()}
        if self.groups is None:
            return spikes
        groups = {name: moved(self.groups[name], spike.device) for name, spike in spikes.items()}
        count = max(int(varying(group).max()) for group in groups.values()) + 1
        like = next(iter(spikes.values()))
        total, size = torch.zeros(2, count, dtype=torch.float64, device=like.device)
        for name, spike in spikes.items():
            total += label_sums(groups[name], spike, count, self.before[name].mask)
            size += label_counts(groups[name], count, self.before[name].mask)
        mean = total / size.clamp(min=1)
        return {name: at_labels(group, mean, -torch.inf) for name, group in groups.items()}


def _same(a: Any, b: Any) -> bool:
    return a is b or (
        a is not None
        and b is not None
        and torch.equal(a.mean, b.mean)
        and torch.equal(a.var, b.var)
        and torch.equal(a.kept, b.kept)
    )
