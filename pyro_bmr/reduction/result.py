"""`Reduction`: what a reduction says of each site and of the whole; looked at, partly taken, put
after another, saved and loaded.

Owns `Reduction`. Next: `decisions.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.files import check_digests, digests, read_json, reading, replacing, write_atomically
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.reduction.collapse import collapse
from pyro_bmr.reduction.correlations import spike_gain
from pyro_bmr.reduction.multiplied import multiplied
from pyro_bmr.reduction.rules import SiteReduction
from pyro_bmr.reduction.wide_sums import wide_sum

if TYPE_CHECKING:
    import pandas as pd

_FORMAT = "pyro_bmr reduction 1"


@dataclass(frozen=True)
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

    @property
    def masks(self) -> dict[str, Tensor]:
        """Site → bool tensor, True where the weight lives; for reduced sites."""
        return {name: result.site.alive for name, result in self.sites.items()}

    @property
    def delta_f(self) -> float:
        """Gain in log evidence over all sites, nats."""
        return sum(result.delta_f for result in self.sites.values())

    @property
    def kept(self) -> float:
        """The fraction of the reduced sites' weights that live."""
        masks = self.masks.values()
        return sum(int(mask.count_nonzero()) for mask in masks) / sum(
            mask.numel() for mask in masks
        )

    def table(self) -> pd.DataFrame:
        """One row per site: site, size, kept (fraction), delta_f (nats), wider, scale, given (sites
        at whose median the prior was taken).
        """
        import pandas as pd

        rows = [
            (
                name,
                r.drop.numel(),
                float(r.site.alive.double().mean()),
                r.delta_f,
                r.wider,
                r.scale,
                ", ".join(r.site.given),
            )
            for name, r in self.sites.items()
        ]
        return pd.DataFrame(
            rows, columns=["site", "size", "kept", "delta_f", "wider", "scale", "given"]
        )

    def curve(self, points: int = 100) -> pd.DataFrame:
        """ΔF over the number of weights pruned: the columns pruned, kept (fraction) and delta_f
        (nats), `points` rows from nothing to everything.

        The weights, or groups, go in the order of their spike ΔF per weight; each row is the ΔF of
        all that went so far together, jointly where the posterior has correlations. Weights that
        were dead before the reduction count as pruned in each row.

        Raises:
            ReductionError: a site has no spike ΔF, since its prior in the fit was not Gaussian.
        """
        import pandas as pd

        ranks = self._ranks()
        pooled = torch.cat(
            [rank[self.before[name].alive].flatten() for name, rank in ranks.items()]
        )
        if bool(pooled.isnan().any()):
            raise ReductionError(
                "the curve needs the point spike's ΔF, which sites without a Gaussian prior do not"
                " have; take the others with only()"
            )
        size = sum(rank.numel() for rank in ranks.values())
        dead = size - pooled.numel()
        order = pooled.sort(descending=True).values
        rows = []
        for count in sorted({round(k * len(order) / (points - 1)) for k in range(points)}):
            limit = order[count - 1] if count else torch.tensor(torch.inf)
            gain, gone = 0.0, 0
            for name, rank in ranks.items():
                site = self.before[name]
                mask = site.alive & ~(rank >= limit)
                gain += spike_gain(site, mask, self.sites[name].spike_delta_f)
                gone += int((site.alive & ~mask).sum())
            rows.append((dead + gone, 1 - (dead + gone) / size, gain))
        return pd.DataFrame(rows, columns=["pruned", "kept", "delta_f"]).drop_duplicates(
            "pruned", ignore_index=True
        )

    def plot(self, axes: Any = None, points: int = 100) -> Any:
        """Draws `curve` into `axes`, or into a new figure, with the reduction itself as a dot;
        returns the axes.
        """
        curve = self.curve(points)
        axes = curve.plot(
            x="pruned",
            y="delta_f",
            ax=axes,
            legend=False,
            grid=True,
            xlabel="weights pruned",
            ylabel="ΔF (nats)",
        )
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
        more = [message for message in self._of_no_site if message not in apart]
        return self._of(
            taken,
            groups,
            (
                *more,
                *(multiplied(self.before, taken, groups) if {*apart} & {*self.warnings} else ()),
            ),
        )

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
                first = self.sites[name]
                result = replace(
                    result, delta_f=first.delta_f + result.delta_f, terms=first.terms + result.terms
                )
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
        tensors: dict[str, Tensor] = {
            f"{name}/groups": group for name, group in (self.groups or {}).items()
        }
        about: dict[str, dict[str, Any]] = {}
        for name, result in self.sites.items():
            parts = {f.name: getattr(result, f.name) for f in fields(result) if f.name != "site"}
            tensors |= {
                f"{name}/{part}": value
                for part, value in parts.items()
                if isinstance(value, Tensor)
            }
            about[name] = {
                part: value for part, value in parts.items() if not isinstance(value, Tensor)
            }
        with replacing(Path(folder), "reduction.json") as stage:
            self.before.save(stage / "before.safetensors")
            self.posterior.save(stage / "after.safetensors")
            write_atomically(
                stage / "sites.safetensors",
                lambda path: save_file(
                    {k: t.detach().contiguous().clone() for k, t in tensors.items()}, path
                ),
            )
            content = json.dumps(
                {
                    "format": _FORMAT,
                    "groups": self.groups is not None,
                    "warnings": self.warnings,
                    "sites": about,
                    "files": digests(stage),
                }
            )  # with NaN, as they are
            write_atomically(
                stage / "reduction.json", lambda path: path.write_text(content, encoding="utf-8")
            )

    @classmethod
    def load(cls, folder: str | Path) -> Reduction:
        """A reduction saved by `save`; nothing is unpickled.

        Raises:
            ReductionError: the folder does not hold one, or a file of it is damaged, or of another
                reduction than the rest.
        """
        folder = Path(folder)
        head, fault, mend = (
            folder / "reduction.json",
            f"{folder}: not a saved reduction",
            "give the folder that Reduction.save wrote, or reduce and save again",
        )
        about = read_json(head, fault, ReductionError, mend)
        if about.get("format") != _FORMAT:
            raise ReductionError(f"{fault} of format {_FORMAT!r}; {mend}")
        parts: dict[str, dict[str, Any]] = {}
        with reading(fault, ReductionError, mend):
            for key, tensor in load_file(folder / "sites.safetensors").items():
                name, _, part = key.rpartition("/")
                parts.setdefault(name, {})[part] = tensor
        before, after = (
            Posterior.load(folder / f"{part}.safetensors") for part in ("before", "after")
        )
        check_digests(head, about.get("files"), ReductionError, "reduce and save again")
        sites = {}
        with reading(f"{folder}: a damaged reduction", ReductionError, "reduce and save again"):
            groups = (
                {name: parts[name].pop("groups") for name in about["sites"]}
                if about["groups"]
                else None
            )
            for name, numbers in about["sites"].items():
                own = {
                    part: tensor for part, tensor in parts.get(name, {}).items() if part != "groups"
                }
                sites[name] = SiteReduction(**numbers, **own, site=after[name])
                numeric = all(
                    isinstance(sites[name].__dict__[part], (int, float))
                    for part in ("delta_f", "wider")
                )
                if not numeric or any(
                    t.shape != after[name].mean.shape
                    for t in (sites[name].drop, sites[name].spike_delta_f)
                ):
                    raise ValueError(f"site '{name}': its decisions do not fit its moments")
            warned = tuple(map(str, about.get("warnings", ())))
        return cls(sites, after, before, groups, warned)

    def _ranks(self) -> dict[str, Tensor]:
        """Per entry the spike ΔF, or of groups the mean over the group; entries in no group
        −inf.
        """
        spikes = {name: result.spike_delta_f for name, result in self.sites.items()}
        if self.groups is None:
            return spikes
        groups = {name: self.groups[name].to(spike.device) for name, spike in spikes.items()}
        count = max(int(group.max()) for group in groups.values()) + 1
        like = next(iter(spikes.values()))
        total, size = (
            torch.zeros(count, dtype=torch.float64, device=like.device) for _ in range(2)
        )
        for name, spike in spikes.items():
            inside = (groups[name] >= 0) & self.before[name].alive
            total.index_add_(0, groups[name][inside], spike[inside].double())
            size.index_add_(
                0, groups[name][inside], torch.ones_like(spike[inside], dtype=torch.float64)
            )
        mean = total / size.clamp(min=1)
        return {
            name: torch.where(group >= 0, mean[group], -torch.inf) for name, group in groups.items()
        }


def cautions(before: Posterior, results: Mapping[str, SiteReduction]) -> tuple[str, ...]:
    """What may mislead in a reduction of `before`: layers that it empties, and sums that take too
    many weights as independent.
    """
    masks = {name: site.alive for name, site in before.sites.items() if site.support == "real"}
    emptied = collapse(masks | {name: result.site.alive for name, result in results.items()}, masks)
    return tuple([emptied] if emptied else []) + tuple(wide_sum(before, results))


def _same(a: Any, b: Any) -> bool:
    return a is b or (
        a is not None
        and b is not None
        and torch.equal(a.mean, b.mean)
        and torch.equal(a.var, b.var)
        and torch.equal(a.alive, b.alive)
    )
