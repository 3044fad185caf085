"""The abstract guide with one Gaussian per site: sites, start values, draws, moments, and which KL
has a closed form.

Owns `SiteWise`. A guide derived from it only gives the Gaussian of a site (`site`); see
`full_rank.py`, `low_rank_plus_diagonal.py`, `matrix_variate.py`, `scale_coupled.py`. Next:
`full_rank.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bmr.errors import ModelError, described
from pyro_bmr.guides.latent_sites import Latent, in_plates, latent_sites, site_table, start_scale
from pyro_bmr.guides.row_noise import check_estimator
from pyro_bmr.guides.site_normal import Independent, SiteNormal, log_density

if TYPE_CHECKING:
    import pandas as pd


class SiteWise(nn.Module):
    r"""q(θ) = ∏ₛ N(zₛ; μₛ, Σₛ) over sites s, zₛ on the unconstrained scale; a site's Gaussian may
    depend on the values of sites before it.

    It is abstract: a derived guide has `site(latent, scale)`, the module with a site's parameters.

    Args:
        program: any Pyro program with global continuous latents.
        args, kwargs: one batch, to find the sites.
        sites: shell-style patterns of the names of the sites that get the structure; all others are
            independent Normals, as in `MeanField`.
        init_scale: as in `MeanField`.
        estimator: as in `MeanField`, without "antithetic"; it applies to the sites whose entries
            are independent.

    Raises:
        ModelError: as `latent_sites`; a pattern matches no site; a site is too large for the
            structure.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        *args: Any,
        sites: str | Sequence[str] = "*",
        init_scale: float = 0.3,
        estimator: str = "weight",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.estimator = check_estimator(estimator, "weight")
        self.latents = latent_sites(program, *args, **kwargs)
        patterns = (sites,) if isinstance(sites, str) else tuple(sites)
        for pattern in patterns:
            if not any(fnmatchcase(latent.name, pattern) for latent in self.latents):
                raise ModelError(
                    f"sites={described(pattern)} matches no site; the sites are:"
                    f" {', '.join(latent.name for latent in self.latents)}"
                )
        modules = []
        for latent in self.latents:
            chosen = any(fnmatchcase(latent.name, pattern) for pattern in patterns)
            scale = start_scale(latent, init_scale)
            module = self.site(latent, scale) if chosen else None
            modules.append(IndependentSite(latent, scale) if module is None else module)
        self.parts = nn.ModuleDict(
            {
                _key(latent.name): module
                for latent, module in zip(self.latents, modules, strict=True)
            }
        )

    def site(self, latent: Latent, scale: Tensor) -> nn.Module | None:
        """The module with the parameters of one site, called as `module(values, mask)` →
        `SiteNormal`; None if its entries are independent. `scale`: the standard deviations at the
        start.
        """
        raise NotImplementedError

    def conditional(
        self, name: str, values: Mapping[str, Tensor], mask: Tensor | None
    ) -> SiteNormal:
        """The Gaussian of a site given the (constrained) values of the sites before it, with the
        entries that `mask` keeps.
        """
        return self.parts[_key(name)](values, mask)

    @torch.no_grad()
    def at_point(self, masks: Mapping[str, Tensor]) -> dict[str, SiteNormal]:
        """Site → its Gaussian, given the medians of other sites if it depends on their values."""
        gaussians: dict[str, SiteNormal] = {}
        values: dict[str, Tensor] = {}
        for latent in self.latents:
            q = self.conditional(latent.name, values, masks.get(latent.name))
            gaussians[latent.name] = q
            values[latent.name] = q.mean if latent.transform is None else latent.transform(q.mean)
        return gaussians

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """One draw: site name → value. Each site has an auxiliary site `<name>_unconstrained` that
        carries its log density.
        """
        values: dict[str, Tensor] = {}
        for latent in self.latents:
            q = self.conditional(latent.name, values, latent.mask)
            noise = torch.randn(q.noise_size, dtype=q.mean.dtype, device=q.mean.device)
            fn = Drawn(partial(self.conditional, latent.name, dict(values)), noise, latent.mask)
            z = pyro.sample(f"{latent.name}_unconstrained", fn, infer={"is_auxiliary": True})
            value = z if latent.transform is None else latent.transform(z)
            log_jacobian = (
                torch.zeros_like(z)
                if latent.transform is None
                else -latent.transform.log_abs_det_jacobian(z, value)
            )
            if latent.event_dim:
                log_jacobian = log_jacobian.flatten(-latent.event_dim).sum(-1)
            with in_plates(latent):
                values[latent.name] = pyro.sample(
                    latent.name, dist.Delta(value, log_jacobian, event_dim=latent.event_dim)
                )
        return values

    def table(self) -> pd.DataFrame:
        """One row per site: name, size, structure of its Gaussian, parameters, and whether its KL
        is in closed form or sampled.
        """
        parts = self.parts.values()
        counts = (sum(p.numel() for p in part.parameters()) for part in parts)
        names = (str(part.structure) for part in parts)
        return site_table(self.latents, list(zip(names, counts, strict=True)))


class IndependentSite(nn.Module):
    """Parameters of `Independent`: `loc` and `log_scale`, as in `MeanField`."""

    structure = "independent"

    def __init__(self, latent: Latent, scale: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(latent.start.clone())
        self.log_scale = nn.Parameter(scale.log().expand(latent.shape).clone())

    def forward(self, values: Mapping[str, Tensor], mask: Tensor | None) -> Independent:
        return Independent.of(self.loc, self.log_scale, mask)


class Drawn(dist.Delta):
    """A draw of the `SiteNormal` `conditional(mask)` at a given noise, as a distribution with its
    log density.
    """

    def __init__(
        self, conditional: Callable[[Tensor | None], SiteNormal], noise: Tensor, mask: Tensor | None
    ) -> None:
        self.conditional, self.noise, self.mask_before = conditional, noise, mask
        q = conditional(mask)
        z = q.draw(noise)
        super().__init__(z, log_density(q, z, noise), event_dim=z.ndim)

    def pruned(self, mask: Tensor) -> Drawn:
        """The same draw with `mask` in force."""
        return Drawn(
            self.conditional,
            self.noise,
            mask if self.mask_before is None else mask & self.mask_before,
        )


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ModuleDict takes no dots
