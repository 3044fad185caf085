"""A fit that begins at a posterior.

Owns `begin_at`. Next: `run.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import FitError
from pyro_bmr.guides import MeanField
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.priors.gaussian import Gaussian
from pyro_bmr.tracing import collapsed


@torch.no_grad()
def begin_at(start: Posterior, guide: Any) -> dict[str, Tensor]:
    """Gives the guide the moments of `start`; returns the scales of its Gaussian priors.

    Raises:
        FitError: the guide is not `MeanField`, or has other sites.
    """
    if not isinstance(guide, MeanField):
        raise FitError(
            f"start: only MeanField can begin at a posterior, the guide is {type(guide).__name__}"
        )
    locs, log_scales = guide.views(guide.loc), guide.views(guide.log_scale)
    if {name: tuple(loc.shape) for name, loc in locs.items()} != {
        name: tuple(site.mean.shape) for name, site in start.sites.items()
    }:
        raise FitError(
            f"start: its sites ({', '.join(start)}) and their shapes must be those of the program"
            f" ({', '.join(locs)})"
        )
    for name, site in start.sites.items():
        uncertain = site.kept & (site.var > 0)
        locs[name].copy_(site.mean)
        log_scales[name].copy_((0.5 * site.var.log()).where(uncertain, log_scales[name]))
    return {
        name: collapsed(site.prior.var).sqrt()
        for name, site in start.sites.items()
        if isinstance(site.declared, Gaussian) and site.prior is not None
    }
