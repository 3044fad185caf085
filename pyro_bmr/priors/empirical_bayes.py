"""Empirical-Bayes scales: the state that `Gaussian("empirical")` needs during a fit.

Owns `EmpiricalScales`, an effect handler. A prior is a frozen value and a program is a function, so
the handler holds the scales. Next: `names.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_bmr.priors.gaussian import Gaussian
from pyro_bmr.priors.tiers import spread, tier_parts


class EmpiricalScales(Messenger):
    """Gives each site declared `Gaussian(scale="empirical")` its scales in `scales`; a site that is
    not in it has its start scale.

    `scales`: site → a number (0-d), or one per unit, input or weight, in the shape that
    `tiers.tier_shape` says. Use as a decorator of a program: `EmpiricalScales()(program)`.
    """

    def __init__(self, scales: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.scales: dict[str, Tensor] = dict(scales or {})
        self.means: dict[str, Tensor] = {}  # site → prior mean, as the program last declared it

    def _pyro_sample(self, msg: Any) -> None:
        prior = msg["infer"].get("prior")
        if not (isinstance(prior, Gaussian) and prior.scale == "empirical"):
            return
        loc = msg["fn"]
        while isinstance(loc, torch.distributions.Independent):
            loc = loc.base_dist
        loc = self.means[msg["name"]] = loc.loc
        if msg["name"] in self.scales:
            shape = msg["fn"].shape()
            scale = spread(self.scales[msg["name"]], prior.per, prior.block)
            msg["fn"] = dist.Normal(loc, scale).expand(shape).to_event(len(shape))

    @torch.no_grad()
    def update(
        self, name: str, prior: Gaussian, mean: Tensor, var: Tensor, mask: Tensor | None
    ) -> None:
        """Sets the scales by the M-step s² ← mean of (μ − mean)² + σ² over the kept entries that
        share s; it never lowers the evidence bound.

        Scales without a kept entry do not change.
        """
        prior_mean = self.means.get(name, prior.mean)
        assert not isinstance(prior_mean, str), "the program has run"
        second_moment = (mean - prior_mean).square_().add_(var)
        kept = mean.new_ones(()).expand_as(mean)
        if mask is not None:
            kept = mask.to(mean.dtype)
            second_moment.mul_(kept)
        total, count = (
            tier_parts(t, prior.per, prior.block).sum(-1) for t in (second_moment, kept)
        )
        updated = (total / count.clamp_min(1)).sqrt()
        self.scales[name] = updated.where(
            count > 0, self.scales.get(name, torch.ones_like(updated))
        )
