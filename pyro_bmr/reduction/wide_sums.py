r"""Gains in evidence that are sums over weights taken as independent, and when such a sum is not to
be trusted.

Owns `wide_sum`. Of a posterior with independent entries, ΔF of a set S is :math:`\sum_{i \in S}
[\log q(w_i = 0) - \log p(w_i = 0)]`. In a linear-Gaussian model the exact gain has the posterior's
correlations in it. They are weak while rows outnumber parameters; with n rows and p > n parameters
the rows leave p − n directions undetermined, and the correlations are large. Diagonal moments
cannot show that: the number of rows has to be known. Next: `correlations.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.reduction.reduced_site import SiteReduction

_MANY = 100  # independent terms; fewer rows than that are rare
_MEND = (
    "Check it with refit, reduce in rounds during the fit (Every), or take a joint posterior:"
    " FullRank, or from_curvature with a (d, d) matrix"
)


def wide_sum(before: Posterior, results: Mapping[str, SiteReduction]) -> list[str]:
    """What to say of a ΔF that sums over many independent terms (`SiteReduction.terms`); mostly
    nothing.

    With `Posterior.rows`: if the reduced sites have more kept parameters than that before the
    reduction, and there is more than one term. Without: if there are more than 100 terms. And
    whatever the rows, if a site has correlations that its ΔF leaves out.
    """
    said = []
    terms = sum(result.terms for result in results.values())
    kept = sum(before[name].kept_count for name in results)
    what = (
        f"ΔF = {sum(result.delta_f for result in results.values()):+.4g} nats is a sum over"
        f" {terms:,} terms taken as independent"
    )
    if before.rows is None and terms > _MANY:
        unknown = (
            "how many rows of data it had is not known. With fewer rows than parameters the sum can"
            " be far off; give the posterior rows="
        )
        said.append(f"{what}, of a posterior with {kept:,} parameters; {unknown}. {_MEND}")
    if before.rows is not None and terms > 1 and kept > before.rows:
        said.append(
            f"{what}, with parameters > rows ({kept:,} > {before.rows:,}): the sum can be far"
            f" off. {_MEND}"
        )
    left = [
        name
        for name, result in results.items()
        if result.terms > 1 and before[name].joint is not None
    ]
    if left:
        count = sum(results[name].terms for name in left)
        said.append(
            f"site '{left[0]}'{f' and {len(left) - 1} more' if len(left) > 1 else ''}: the"
            f" posterior has correlations, but ΔF is a sum over {count:,} terms taken as"
            " independent. The point spike, Gaussian(scale=0), is joint"
        )
    return said
