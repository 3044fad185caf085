"""The mean-field guide: independent Gaussians over the unconstrained latent sites of any Pyro
program.

Owns `MeanField`. The step that uses its flat parameters directly is in `mean_field_step.py`. Next:
`point.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bmr.guides.latent_sites import (
    Latent,
    in_plates,
    latent_sites,
    site_table,
    start_scale,
)
from pyro_bmr.guides.row_noise import PER_STEP, check_estimator
from pyro_bmr.guides.site_normal import Independent

if TYPE_CHECKING:
    import pandas as pd


class MeanField(nn.Module):
    r"""q(θ) = ∏ᵢ N(θᵢ; μᵢ, σᵢ²) on the unconstrained scale: a Normal per real site, a log-normal
    per positive site, a logit-normal on (0, 1).

    A Pyro guide: call it inside any SVI loop. Its parameters are two flat vectors, `loc` and
    `log_scale`, created here, on the program's device and dtype, so that any `torch.optim`
    optimiser takes `guide.parameters()`.

    Args:
        program: any Pyro program with global continuous latents.
        args, kwargs: one batch, to find the sites.
        init_scale: the standard deviations at the start, relative to the root mean square of the
            start values that the program gives (the weights of a network). Sites without such
            values start at a tenth of the prior's scale. It is small, so that a network first
            learns as a plain one would.
        estimator: where noise is drawn in a step. ``"weight"``: once for all rows of a batch.
            ``"local"``, ``"flipout"``: for each row, in the linear maps and convolutions that use
            the weights (`row_noise.RowNoise`). ``"antithetic"``: once for all rows, and used twice
            in each step of `fit`, with either sign. All but the first lower the variance of the
            gradient; the bound is the same. docs/choose_a_guide.md has the cost of each.

    Raises:
        ModelError: as `latent_sites`.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        *args: Any,
        init_scale: float = 0.3,
        estimator: str = "weight",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._begin(latent_sites(program, *args, **kwargs), init_scale, estimator)

    @classmethod
    def of_latents(
        cls, latents: Sequence[Latent], init_scale: float = 0.3, estimator: str = "weight"
    ) -> MeanField:
        """The guide of these sites, such as the parts of sites that one process has; the other
        arguments are those of the class.
        """
        guide = cls.__new__(cls)
        nn.Module.__init__(guide)
        guide._begin(latents, init_scale, estimator)
        return guide

    def _begin(self, latents: Sequence[Latent], init_scale: float, estimator: str) -> None:
        """Makes the flat vectors, at the start values of the sites."""
        self.estimator = check_estimator(estimator, *PER_STEP)
        self.latents = list(latents)
        self.sizes = [latent.start.numel() for latent in self.latents]
        self.loc = nn.Parameter(torch.cat([latent.start.flatten() for latent in self.latents]))
        scales = [start_scale(latent, init_scale) for latent in self.latents]
        self.log_scale = nn.Parameter(
            torch.cat(
                [scale.log().expand(size) for scale, size in zip(scales, self.sizes, strict=True)]
            )
        )
        locs = self.views(self.loc.detach())
        # the start values are views of `loc`, not a second copy
        self.latents = [latent._replace(start=locs[latent.name]) for latent in self.latents]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Site name → its part of a flat vector, in the site's shape; no copy."""
        return {
            latent.name: part.view(latent.shape)
            for latent, part in zip(self.latents, flat.split(self.sizes), strict=True)
        }

    def conditionals(self) -> Callable[[str, Mapping[str, Tensor], Tensor | None], Independent]:
        """The function (name, values, mask) → Gaussian of a site with the entries that `mask`
        keeps. The views of the flat vectors are made once.
        """
        locs, log_scales = self.views(self.loc), self.views(self.log_scale)
        return lambda name, values, mask: Independent.of(locs[name], log_scales[name], mask)

    def table(self) -> pd.DataFrame:
        """One row per site: name, size, structure of its Gaussian, parameters, and whether its KL
        is in closed form or sampled.
        """
        return site_table(self.latents, [("independent", 2 * size) for size in self.sizes])

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """One draw: site name → value."""
        locs, scales = self.views(self.loc), self.views(self.log_scale.exp())
        values = {}
        for latent in self.latents:
            fn = dist.Normal(locs[latent.name], scales[latent.name])
            if latent.transform is not None:
                fn = dist.TransformedDistribution(fn, [latent.transform])
            with in_plates(latent):
                values[latent.name] = pyro.sample(latent.name, fn.to_event(latent.event_dim))
        return values
