r"""Sites that the program multiplies, and what is wrong with pruning them entry by entry.

Owns `multiplied`. In a product w = Σₖ bₖaₖ, as a low-rank update or the queries and keys of
attention have it, several k stand for one weight, and what is left of aₖ is worth nothing where bₖ
is pruned. A posterior with independent entries knows neither, and the ΔF of single entries promise
too much. Where slice k of both is pruned or kept together they do not. Next: `wide_sums.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.reduction.reduced_site import SiteReduction

_NAMED = 3  # pairs


def multiplied(
    before: Posterior, results: Mapping[str, SiteReduction], groups: Mapping[str, Tensor] | None
) -> list[str]:
    """What to say of sites that are multiplied (`Site.multiplies`) and lost entries one by one, or
    both in groups that are not the same; mostly nothing.
    """
    factors = {name: result for name, result in results.items() if before[name].multiplies}
    lost = {
        name
        for name, result in factors.items()
        if bool((before[name].kept & ~result.site.kept).any())
    }
    pairs = sorted(
        {(min(name, other), max(name, other)) for name in lost for other in before[name].multiplies}
    )
    apart = [
        (a, b) for a, b in pairs if groups is None or ({a, b} <= lost and not _tied(a, b, groups))
    ]
    if not apart:
        return []
    named = ", ".join(
        f"'{a}' × '{b}'" if a != b else f"two parts of '{a}'" for a, b in apart[:_NAMED]
    )
    more = f" and {len(apart) - _NAMED} more" if len(apart) > _NAMED else ""
    return [
        f"the program multiplies {named}{more}, and their entries are pruned apart: several"
        " products stand for one weight, and a factor is worth nothing without the other, so that"
        " ΔF promises too much. Make slice k of both factors one group with per={'<site>':"
        " labels, ...} (docs/gotchas.md has the recipe; per='head' does it for attention), or"
        " look at the observed change with refit"
    ]


def _tied(name: str, other: str, groups: Mapping[str, Tensor]) -> bool:
    """Whether a group has entries in both sites, or in two thirds or halves of the rows of one."""
    a, b = groups[name], groups[other]
    if name == other:
        parts = a.chunk(3 if len(a) % 3 == 0 else 2) if a.ndim else (a,)
        a, b = parts[0], parts[-1] if len(parts) < 3 else parts[1]
    a, b = a[a >= 0].unique(), b[b >= 0].unique()
    return bool(torch.isin(a, b).any())
