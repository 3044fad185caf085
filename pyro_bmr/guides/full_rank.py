r"""The full-rank guide: a covariance matrix for each site. Exact, for one site, in a
linear-Gaussian model.

Owns `FullRank`. Next: `low_rank_plus_diagonal.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from pyro_bmr.errors import ModelError
from pyro_bmr.formulas.dense import Dense
from pyro_bmr.guides.latent_sites import Latent
from pyro_bmr.guides.site_normal import masked
from pyro_bmr.guides.site_wise import SiteWise
from pyro_bmr.memory import check_memory, training_bytes


class FullRank(SiteWise):
    r"""q(zₛ) = N(μₛ, AₛAₛᵀ) for each site s, A lower triangular of size d × d for a site of d
    entries (Kucukelbir et al. 2017, JMLR 18(14)).

    Memory and time per step grow with d²: with its gradient and Adam's two moments a site takes 4d²
    numbers.

    Args:
        limit: the largest site that may have a covariance matrix, in entries.
        others: as in `SiteWise`; `sites="head.*"` gives a matrix to those sites alone.

    Raises:
        ModelError: a site is larger than `limit`, or its matrix than the memory that is free; the
            message says what it would take.

    Example:
        >>> fit(model, data, guide=partial(FullRank, sites="head.weight"))
    """

    def __init__(
        self, program: Callable[..., Any], *args: Any, limit: int = 4096, **kwargs: Any
    ) -> None:
        self.limit = limit
        super().__init__(program, *args, **kwargs)

    def site(self, latent: Latent, scale: Tensor) -> nn.Module | None:
        size = latent.start.numel()
        if size > self.limit:
            gigabytes = training_bytes(size**2, latent.start) / 1e9
            raise ModelError(
                f"site '{latent.name}': a full covariance of its {size} entries takes"
                f" {gigabytes:.3g} GB with its gradient and Adam's moments, more than the limit of"
                f" {self.limit} entries allows; use LowRankPlusDiagonal or MatrixVariate, name"
                " smaller sites in `sites`, or raise `limit`"
            )
        check_memory(
            f"site '{latent.name}': a full covariance of its {size} entries, with its gradient and"
            " Adam's moments,",
            training_bytes(size**2, latent.start),
            latent.start.device,
            "use LowRankPlusDiagonal or MatrixVariate",
        )
        return FullSite(latent, scale) if size > 1 else None


class FullSite(nn.Module):
    """A = diag(exp(log_scale)) (I + strictly lower part of `tril`)."""

    structure = "full"

    def __init__(self, latent: Latent, scale: Tensor) -> None:
        super().__init__()
        size = latent.start.numel()
        self.loc = nn.Parameter(latent.start.clone())
        self.log_scale = nn.Parameter(scale.log().expand(size).clone())
        self.tril = nn.Parameter(latent.start.new_zeros(size, size))

    def forward(self, values: Mapping[str, Tensor], mask: Tensor | None) -> Full:
        tril = self.log_scale.exp()[:, None] * unit_lower(self.tril)
        if mask is not None:
            flat = mask.flatten()
            tril = tril * (flat[:, None] & flat)
        return Full(masked(self.loc, mask), tril, self.log_scale, mask)


def unit_lower(values: Tensor) -> Tensor:
    """The strictly lower part of a square matrix, with ones on the diagonal."""
    unit = values.tril(-1)
    unit.diagonal().fill_(1)
    return unit


class Full(NamedTuple):
    """A Gaussian with the root A, whose rows and columns of masked entries are zero."""

    mean: Tensor
    tril: Tensor  # A
    log_scale: Tensor  # log of the diagonal of A before the mask
    mask: Tensor | None

    @property
    def var(self) -> Tensor:
        return self.tril.square().sum(1).view(self.mean.shape)

    @property
    def log_det(self) -> Tensor:
        return 2 * masked(self.log_scale.view(self.mean.shape), self.mask).sum()

    @property
    def noise_size(self) -> int:
        return self.mean.numel()

    def draw(self, noise: Tensor) -> Tensor:
        return self.mean + (self.tril @ noise).view(self.mean.shape)

    def squared_distance(self, z: Tensor, noise: Tensor) -> Tensor:
        return masked(noise.view(self.mean.shape), self.mask).square().sum()

    def joint(self) -> Dense:
        return Dense(self.mean.flatten(), self.tril @ self.tril.mT)
