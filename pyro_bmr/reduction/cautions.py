"""What may mislead in a reduction, one sentence each.

Owns `cautions`: layers that are emptied, sums over weights taken as independent, and matrix normals
with entries held at zero. Next: `reduction_file.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from pyro_bmr.formulas.held_matrix_normal import HeldMatrixNormal, not_converged
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.site import Site
from pyro_bmr.reduction.collapse import collapse
from pyro_bmr.reduction.reduced_site import SiteReduction
from pyro_bmr.reduction.wide_sums import wide_sum


def cautions(before: Posterior, results: Mapping[str, SiteReduction]) -> tuple[str, ...]:
    """What may mislead in a reduction of `before`: layers that it empties, sums that take too many
    weights as independent, and means that have not converged or correlations that are lost.
    """
    masks = {name: site.kept for name, site in before.sites.items() if site.support == "real"}
    emptied = collapse(masks | {name: result.site.kept for name, result in results.items()}, masks)
    held = [
        words
        for name, result in results.items()
        if (words := _of_held_entries(name, before[name], result.site))
    ]
    return (*([emptied] if emptied else []), *wide_sum(before, results), *held)


def _of_held_entries(name: str, before: Site, after: Site) -> str | None:
    """What to say of a matrix normal with entries held at zero, or None."""
    joint = after.joint
    if isinstance(joint, HeldMatrixNormal) and (words := not_converged(joint)):
        return f"site '{name}': {words}"
    if joint is None and isinstance(before.joint, HeldMatrixNormal):
        return (
            f"site '{name}': under another prior than that of the fit, or the spike, a matrix"
            " normal with entries held at zero has no closed form; its kept entries have the"
            " moments of their marginals, without correlations"
        )
    return None
