"""The point guide: a maximum-a-posteriori estimate of every latent site.

Owns `Point`. Next: `site_wise.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bmr.guides.latent_sites import in_plates, latent_sites


class Point(nn.Module):
    r"""q(θ) = δ(θ − θ̂), so that SVI maximises log p(y, θ). θ̂ is on the unconstrained scale; the
    density is that of the constrained value.

    Arguments and start values are those of `MeanField`; the only parameter is the flat vector
    `loc`.
    """

    def __init__(self, program: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.latents = latent_sites(program, *args, **kwargs)
        self.sizes = [latent.start.numel() for latent in self.latents]
        self.loc = nn.Parameter(torch.cat([latent.start.flatten() for latent in self.latents]))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Site name → value."""
        values = {}
        for latent, part in zip(self.latents, torch.split(self.loc, self.sizes), strict=True):
            value = part.view(latent.shape)
            if latent.transform is not None:
                value = latent.transform(value)
            with in_plates(latent):
                values[latent.name] = pyro.sample(
                    latent.name, dist.Delta(value, event_dim=latent.event_dim)
                )
        return values
