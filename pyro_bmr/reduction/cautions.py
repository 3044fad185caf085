"""What may mislead in a reduction, one sentence each.

Owns `cautions`: layers that are emptied, sums over weights taken as independent, and sites with
correlations. Next: `reduction_file.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pyro_bmr.formulas.gaussian import total
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
        for words in _of_correlations(name, before[name], result)
    ]
    return (*([emptied] if emptied else []), *wide_sum(before, results), *held)


def _of_correlations(name: str, before: Site, result: SiteReduction) -> Iterator[str]:
    """What to say of a site with correlations whose entries are held at zero."""
    joint = result.site.joint
    if isinstance(joint, HeldMatrixNormal) and (words := not_converged(joint)):
        yield f"site '{name}': {words}"
    pruned = None if joint is None or result.terms != 1 else before.kept & ~result.site.kept
    if pruned is not None and bool(pruned.any()):
        alone = total(result.spike_delta_f, pruned)
        together = result.delta_f if result.upper is None else result.upper
        # each by itself says that it can go
        if together < 0 and bool((result.drop_log_odds[pruned] > 0).all()):
            yield (
                f"site '{name}': ΔF is {alone:+.4g} nats as a sum over the"
                f" {int(pruned.count_nonzero()):,} weights that are pruned, and no more than"
                f" {together:+.4g} together: they can replace each other. Reduce in rounds, as to"
                " kept=0.8 and then 0.6 of the posterior that this gives, or prune less"
            )
    if joint is None and isinstance(before.joint, HeldMatrixNormal):
        yield (
            f"site '{name}': under another prior than that of the fit, or the spike, a matrix"
            " normal with entries held at zero has no closed form; its kept entries have the"
            " moments of their marginals, without correlations"
        )
