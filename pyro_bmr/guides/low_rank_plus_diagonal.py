r"""The low-rank-plus-diagonal guide: the k directions of each site in which the posterior is most
correlated, at a cost linear in its size.

Owns `LowRankPlusDiagonal`. Next: `matrix_variate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_bmr.checks import check_arguments
from pyro_bmr.errors import holds
from pyro_bmr.formulas.low_rank import LowRank
from pyro_bmr.guides.latent_sites import Latent
from pyro_bmr.guides.site_normal import masked
from pyro_bmr.guides.site_wise import SiteWise
from pyro_bmr.isolation import normal_numbers
from pyro_bmr.memory import check_memory, training_bytes


class LowRankPlusDiagonal(SiteWise):
    r"""q(zₛ) = N(μₛ, Dₛ + WₛWₛᵀ) for each site s, D diagonal, W of size d × k (Ong, Nott & Smith
    2018, JCGS 27(3); Mishkin et al. 2018, NeurIPS).

    Memory per site: (2 + k) d numbers, beside (1 + 1) d of `MeanField`; a step also takes a k × k
    determinant.

    Args:
        rank: k, at most the number of entries of the site.
        others: as in `SiteWise`.

    Raises:
        ModelError: `rank` is below 1.

    Example:
        >>> fit(model, data, guide=partial(LowRankPlusDiagonal, rank=4))
    """

    def __init__(
        self, program: Callable[..., Any], *args: Any, rank: int = 8, **kwargs: Any
    ) -> None:
        check_arguments(
            "LowRankPlusDiagonal",
            holds(lambda x: x >= 1, rank),
            "a rank of at least 1; MeanField is rank 0",
            rank=rank,
        )
        self.rank = rank
        super().__init__(program, *args, **kwargs)

    def site(self, latent: Latent, scale: Tensor) -> nn.Module | None:
        size = latent.start.numel()
        check_memory(
            f"site '{latent.name}': rank {self.rank} plus diagonal of its {size} entries, with"
            " their gradients and Adam's moments,",
            training_bytes((2 + self.rank) * size, latent.start),
            latent.start.device,
            "use a smaller rank, MatrixVariate or MeanField",
        )
        return LowRankSite(latent, scale, min(self.rank, size)) if size > 1 else None


class LowRankSite(nn.Module):
    """D = diag(exp(2 log_scale)), W = exp(log_scale) · `factor`."""

    def __init__(self, latent: Latent, scale: Tensor, rank: int) -> None:
        super().__init__()
        size = latent.start.numel()
        self.structure = f"rank {rank} plus diagonal"
        self.loc = nn.Parameter(latent.start.clone())
        self.log_scale = nn.Parameter(scale.log().expand(size).clone())
        # not at W = 0, which is a saddle point of the bound
        start = normal_numbers((size, rank), size, torch.float64)
        self.factor = nn.Parameter((0.3 / math.sqrt(rank) * start).to(latent.start))

    def forward(self, values: Mapping[str, Tensor], mask: Tensor | None) -> LowRankNormal:
        relative = self.factor if mask is None else self.factor * mask.flatten()[:, None]
        return LowRankNormal(masked(self.loc, mask), self.log_scale, relative, mask)


class LowRankNormal(NamedTuple):
    """A Gaussian with the root (D^½, W), W = D^½ `relative`; rows of masked entries are zero."""

    mean: Tensor
    log_scale: Tensor  # ½ log D before the mask, flat
    relative: Tensor  # D^-½ W
    mask: Tensor | None

    @property
    def std(self) -> Tensor:
        scale = self.log_scale.exp()
        return scale if self.mask is None else scale * self.mask.flatten()

    @property
    def var(self) -> Tensor:
        return (self.std.square() * (1 + self.relative.square().sum(1))).view(self.mean.shape)

    @property
    def log_det(self) -> Tensor:
        return 2 * masked(self.log_scale.view(self.mean.shape), self.mask).sum() + torch.logdet(
            self._capacitance()
        )

    @property
    def noise_size(self) -> int:
        return self.relative.numel() // self.relative.shape[1] + self.relative.shape[1]

    def draw(self, noise: Tensor) -> Tensor:
        own, shared = noise.split([self.mean.numel(), self.relative.shape[1]])
        return self.mean + (self.std * (own + self.relative @ shared)).view(self.mean.shape)

    def squared_distance(self, z: Tensor, noise: Tensor) -> Tensor:
        own, shared = noise.split([self.mean.numel(), self.relative.shape[1]])
        u = (own if self.mask is None else own * self.mask.flatten()) + self.relative @ shared
        inner = self.relative.mT @ u
        return u @ u - inner @ torch.linalg.solve(self._capacitance(), inner)  # Woodbury

    def joint(self) -> LowRank:
        return LowRank(self.mean.flatten(), self.std.square(), self.std[:, None] * self.relative)

    def _capacitance(self) -> Tensor:
        """I + WᵀD⁻¹W."""
        k = self.relative.shape[1]
        return (
            torch.eye(k, dtype=self.mean.dtype, device=self.mean.device)
            + self.relative.mT @ self.relative
        )
