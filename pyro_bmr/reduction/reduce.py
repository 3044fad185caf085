"""`reduce`: which reduced prior for which site of a posterior, and the decision, weight by weight.

Owns `reduce`. What one prior says of one site is in `rules.py`, the decision over all in
`decisions.py`, the result in `result.py`. Next: `pruning.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError, described, holds, warn
from pyro_bmr.isolation import isolated, tensors_on_cpu
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.priors import Prior
from pyro_bmr.reduction.attention_heads import Heads
from pyro_bmr.reduction.cautions import cautions
from pyro_bmr.reduction.decisions import SearchMethod, decide, pattern_masks
from pyro_bmr.reduction.groups import Block, NofM, group_labels
from pyro_bmr.reduction.label_sums import varying
from pyro_bmr.reduction.multiplied import multiplied
from pyro_bmr.reduction.result import Reduction
from pyro_bmr.reduction.search import greedy_search
from pyro_bmr.reduction.site_results import pruned_result, site_results


@isolated()
def reduce(
    posterior: Posterior,
    to: Prior | Mapping[str, Prior | None] | None,
    per: str | Block | Heads | NofM | Mapping[str, Tensor] = "weight",
    *,
    threshold: float = 0.0,
    kept: float | Mapping[str, float] | None = None,
    heads: int | Mapping[str, int] | None = None,
    search: SearchMethod | None = greedy_search,
    window: bool = False,
) -> Reduction:
    r"""What the evidence, the posterior and the set of kept weights would be under the prior
    `to`; no new fit.

    Warns (`PyroBMRWarning`, and `Reduction.warnings`) where a layer loses its units, where factors
    of a product are pruned apart, and where ΔF is a sum over more weights than can be independent.

    Each weight's question is the point spike's: ΔF = ½ log(σ₀²/σ²) − ½ μ²/σ² for a prior N(0, σ₀²)
    and a posterior N(μ, σ²). The question of a group is whether to prune all of it: its ΔF is the
    sum over its weights, or where the posterior has correlations (`Site.joint`) the joint density
    ratio log q(0) − log p(0).

    The rest of a correlated posterior moves to its mean given the zeros. Single entries of a matrix
    normal, and groups that are no rows or columns of it, are chosen by their marginals, and held at
    zero together; ΔF is then the lower one of two bounds, `SiteReduction.upper` the other.

    Args:
        posterior: of a fit under Gaussian priors; entries that its masks have pruned are still
            pruned and count nowhere.
        to: the reduced prior, or patterns of site names → reduced prior (None leaves a site alone).
            A prior without patterns applies to every real site with a Gaussian prior.

            - ``Gaussian(scale=0)``, the point spike: a weight is pruned when its ΔF is
              above `threshold`; the site's ΔF is the sum over the pruned weights.
            - ``Gaussian(scale=s)``: new moments, nothing is pruned. ``Gaussian()``: s per site by
              its evidence.
            - ``SpikeAndSlab()``: a weight is pruned when ΔF − ζ is above `threshold`, with ζ the
              inclusion log odds of the site; a group has one indicator.
            - ``Horseshoe()``: new moments; a weight is pruned when logit κ is above `threshold`, or
              in Occam's window (`formulas/occams_window.py`); a group when its sum of logits is.
            - None: the decision of the priors under which the posterior was fitted (a horseshoe's,
              by the evidence given its scales; inclusion < ½; a Gaussian keeps all); ΔF is 0.

            Scales are in the units of the site: a standardised site (`Gaussian("layer")`) counts
                them in layer scales.
        per: what is pruned or kept together: ``"weight"``, ``"unit"``, ``"channel"``, ``"input"``,
            ``"head"`` or ``"layer"`` (see `groups.group_labels`), a tile ``Block(rows, columns)``,
            heads of projections with other names (`reduction.Heads`), or a mapping from sites to
            integer tensors, the number of each entry's group (negative: kept). ``NofM(2, 4)`` is a
            constraint instead: of every 4 neighbours along the inputs the 2 with the smallest ΔF
            are kept, whatever the evidence says.
        threshold: in nats, per weight or group.
        kept: instead of the threshold, prune the weights with the largest spike ΔF, or the groups
            with the largest per weight, until this fraction of all the sites' entries is kept. Of
            several layers the last one's units, the outputs of a network, are kept then (with
            ``"unit"`` and ``"channel"``; a mapping of your own for `per` says otherwise). Patterns
            of site names → fraction set a target for each site of its own; sites that none names
            follow the evidence.
        heads: the number of attention heads for ``per="head"`` and `Heads`, or module path →
            number.
        search: how sites with correlations are searched when they are reduced to the point spike:
            `greedy_search`, `exhaustive_search`, a `partial` of them, or None for one decision per
            weight or group without regard to the others. With a `kept` per site there is no search.
        window: whether to go on from the best model to the smallest that is nearly as probable
            (`reduction/window.py`): the weights, or groups, with the least evidence are pruned
            while together they cost at most log n nats, n their number. So n weights that are zero
            are not kept by chance. `Horseshoe()` always does so, site by site. With a `kept`, for
            sites that are searched, and for `to` None there is no window.

    Raises:
        ReductionError: no site can be reduced, a pattern matches none, the posterior is a point
            estimate, or an argument is out of range.

    Example:
        >>> reduce(posterior, to=Gaussian(scale=0)).table()  # the point spike, weight by weight
        >>> # half of the units of one layer, with their biases
        >>> reduce(posterior, to={"fc1.*": Gaussian(scale=0)}, per="unit", kept=0.5)
    """
    reduction = quiet_reduction(
        posterior,
        to,
        per,
        threshold=threshold,
        kept=kept,
        heads=heads,
        search=search,
        window=window,
    )
    for message in reduction.warnings:
        warn(message)
    return reduction


@tensors_on_cpu()
def quiet_reduction(
    posterior: Posterior,
    to: Prior | Mapping[str, Prior | None] | None,
    per: str | Block | Heads | NofM | Mapping[str, Tensor] = "weight",
    *,
    threshold: float = 0.0,
    kept: float | Mapping[str, float] | None = None,
    heads: int | Mapping[str, int] | None = None,
    search: SearchMethod | None = greedy_search,
    window: bool = False,
) -> Reduction:
    """As `reduce`, which has the arguments, without warning: for one of the many reductions of a
    fit. The warnings of `reduce` are in `Reduction.warnings`. `export` in
    `exporting/plain_network.py` puts the reduced posterior into a plain network.
    """
    if not isinstance(posterior, Posterior):
        raise ReductionError(
            f"reduce: expected a Posterior, such as fit.posterior, got {type(posterior).__name__}"
        )
    if any(isinstance(prior, type) for prior in (to.values() if isinstance(to, Mapping) else [to])):
        raise ReductionError(
            f"to: expected a prior, got its class, {described(to)}; call it, as in"
            " Gaussian(scale=0)"
        )
    if not holds(lambda t: not math.isnan(t), threshold):
        raise ReductionError(f"threshold: expected a number of nats, got {described(threshold)}")
    _check_arguments(per, kept, heads)
    window = window and kept is None
    targets = _targets(posterior, to)
    labels = _labels(posterior, targets, per, kept, heads)
    results = site_results(posterior, targets, labels)
    said: list[str] = []
    if isinstance(per, NofM):
        masks = pattern_masks(results, per)
        left_out = per.left_out({name: tuple(mask.shape) for name, mask in masks.items()})
        said += [left_out] if left_out else []
    else:
        masks, results = decide(
            posterior, results, targets, labels, threshold, kept, search, window
        )
    for name, result in results.items():
        own = None if labels is None else labels[name]
        results[name] = pruned_result(result, masks[name], targets[name], own)
    after = replace(
        posterior, sites={**posterior.sites, **{name: r.site for name, r in results.items()}}
    )
    return Reduction(
        results,
        after,
        posterior,
        labels,
        (*said, *multiplied(posterior, results, labels), *cautions(posterior, results)),
    )


def _labels(
    posterior: Posterior,
    targets: Mapping[str, Prior | None],
    per: str | Block | Heads | NofM | Mapping[str, Tensor],
    kept: float | Mapping[str, float] | None,
    heads: int | Mapping[str, int] | None,
) -> dict[str, Tensor] | None:
    """The group of each entry, None for single weights. For a target size over several layers the
    units of the network's last one are in no group.
    """
    if isinstance(per, NofM) or (isinstance(per, str) and per == "weight"):
        return None
    labels = group_labels({name: tuple(posterior[name].mean.shape) for name in targets}, per, heads)
    matrices = [
        name
        for name in posterior
        if posterior[name].support == "real" and posterior[name].mean.ndim > 1
    ]
    if (
        isinstance(per, str)
        and per in ("unit", "channel")
        and isinstance(kept, float | int)
        and matrices
        and {matrices[-1]} < set(matrices) & set(targets)
    ):
        outputs = varying(labels[matrices[-1]])
        for name, own in labels.items():
            few = varying(own)
            labels[name] = few.where(~torch.isin(few, outputs), -1).expand(own.shape)
    return labels


def _check_arguments(per: object, kept: float | Mapping[str, float] | None, heads: object) -> None:
    for fraction in kept.values() if isinstance(kept, Mapping) else [kept]:
        if fraction is not None and not holds(lambda x: 0 <= x <= 1, fraction):
            raise ReductionError(
                f"kept: expected a fraction between 0 and 1, got {described(kept)}"
            )
    of_heads = isinstance(per, Heads) or (isinstance(per, str) and per == "head")
    if heads is not None and not of_heads:
        raise ReductionError(
            f"heads={described(heads)}: only per='head' asks for the number of heads; got"
            f" per={described(per)}"
        )
    if isinstance(per, NofM) and kept is not None:
        raise ReductionError(
            f"kept={described(kept)}: {per} fixes the fraction itself; leave kept out"
        )


def _targets(
    posterior: Posterior, to: Prior | Mapping[str, Prior | None] | None
) -> dict[str, Prior | None]:
    if to is None:
        chosen: dict[str, Prior | None] = {
            name: None
            for name, site in posterior.sites.items()
            if site.support == "real" and site.declared is not None
        }
    elif isinstance(to, Mapping):
        chosen = {}
        for pattern in to:
            if not any(fnmatchcase(name, pattern) for name in posterior):
                raise ReductionError(
                    f"pattern '{pattern}' matches no site; the sites are: {', '.join(posterior)}"
                )
        for name in posterior:
            found = next((p for p in to if fnmatchcase(name, p)), None)
            reducible = posterior[name].support == "real" and posterior[name].prior is not None
            # an exact name that cannot be reduced is refused by name
            if found is not None and to[found] is not None and (reducible or found == name):
                chosen[name] = to[found]
    else:
        chosen = {
            name: to
            for name, site in posterior.sites.items()
            if site.support == "real" and site.prior is not None
        }
    if not chosen:
        raise ReductionError(
            "no site to reduce: none is real with a Gaussian prior; the sites are: "
            + ", ".join(f"{name} ({site.support})" for name, site in posterior.sites.items())
        )
    return chosen
