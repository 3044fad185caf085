"""Empirical-Bayes scales: the state that `Gaussian("empirical")` needs during a fit, kept outside the program.

Owns `EmpiricalScales`, an effect handler. A prior is a frozen value and a program is a function; the scale in force is held here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_bmr.priors.gaussian import Gaussian


class EmpiricalScales(Messenger):
    """Gives each site declared `Gaussian(scale="empirical")` the scale held in `scales` (site → 0-d tensor); a site with none keeps its start.

    Use as a decorator of a program: `EmpiricalScales()(program)`.
    """

    def __init__(self, scales: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.scales: dict[str, Tensor] = dict(scales or {})

    def _pyro_sample(self, msg: Any) -> None:
        prior = msg["infer"].get("prior")
        if msg["name"] in self.scales and isinstance(prior, Gaussian):
            shape = msg["fn"].shape()
            scale = self.scales[msg["name"]]
            msg["fn"] = dist.Normal(torch.full_like(scale, prior.mean), scale).expand(shape).to_event(len(shape))

    @torch.no_grad()
    def update(self, name: str, prior: Gaussian, mean: Tensor, var: Tensor, mask: Tensor | None) -> None:
        """The M-step s² ← mean of (μ − mean)² + σ² over the entries that survive `mask`; it never lowers the evidence bound."""
        second_moment = (mean - prior.mean).square() + var
        kept = second_moment if mask is None else second_moment[mask]
        if kept.numel():
            self.scales[name] = kept.mean().sqrt()
