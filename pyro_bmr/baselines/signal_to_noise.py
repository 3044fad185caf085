"""Pruning by signal-to-noise ratio: the weights of a mean-field posterior with the least |μ|/σ go
(Graves 2011; Blundell et al. 2015).

Owns `EverySignalToNoise`, which a fit takes in the place of `Every`. Next: `experiments/models.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from pyro_bmr.errors import FitError, described
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.pruning import Every
from pyro_bmr.reduction.decisions import lowest
from pyro_bmr.reduction.reduce import quiet_reduction
from pyro_bmr.reduction.result import Reduction


@dataclass(frozen=True)
class EverySignalToNoise(Every):
    """The reductions of a fit on the schedule of `Every` with a target `kept`, decided by |μ|/σ in
    place of the evidence.

    All sites are ranked together. ΔF is reported as for `Every`: it is the ΔF of the pruned
    weights, although it did not decide. Sources: Graves 2011 (NeurIPS, "Practical variational
    inference for neural networks"); Blundell et al. 2015, arXiv 1505.05424, section 5.1.

    Raises:
        FitError: there is no `kept`, or `per` is not ``"weight"``.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept is None or self.per != "weight":
            raise FitError(
                "EverySignalToNoise: expected kept between 0 and 1 and per='weight', got"
                f" kept={described(self.kept)}, per={described(self.per)}"
            )

    def reduce(self, posterior: Posterior, done: float) -> Reduction:
        # all kept weights, with their spike ΔF
        every = quiet_reduction(posterior, self.to, threshold=math.inf)
        target = self.target(done)
        assert target is not None
        ratios = {}
        for name in every.sites:
            site = posterior[name]
            ratios[name] = (
                site.mean.abs() / site.var.clamp_min(torch.finfo(site.var.dtype).tiny).sqrt()
            ).masked_fill(~site.kept, -1.0)
        pooled = torch.cat([ratio.flatten() for ratio in ratios.values()])
        parts = (~lowest(pooled, pooled.numel() - round(target * pooled.numel()))).split(
            [ratio.numel() for ratio in ratios.values()]
        )
        sites = {}
        for part, (name, result) in zip(parts, every.sites.items(), strict=True):
            mask = part.view_as(ratios[name]) & result.site.kept
            pruned = result.site.kept & ~mask
            sites[name] = replace(
                result,
                site=posterior[name].masked(mask),
                delta_f=float(result.spike_delta_f[pruned].sum()),
            )
        return Reduction(
            sites,
            replace(
                posterior, sites={**posterior.sites, **{name: r.site for name, r in sites.items()}}
            ),
            posterior,
        )
