"""The prediction of real targets: a mixture of Normals over draws.

Owns `RealPrediction`. Next: `mixture_prediction.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.errors import described
from pyro_bmr.prediction.crps import crps_of_normals
from pyro_bmr.prediction.moments import Moments, check_targets, components, mixed, noise_seed
from pyro_bmr.prediction.quantiles import Probabilities, probabilities, quantiles


@dataclass(frozen=True)
class RealPrediction(Moments):
    """A mixture of Normals over draws: `locs` and `scales` (draws, n, ...), in the units of y; the
    entries of a row are independent in each draw. With `missing`, targets that are NaN are not
    scored.
    """

    locs: Tensor
    scales: Tensor
    missing: bool = False

    __repr__ = described

    @property
    def mean(self) -> Tensor:
        return self.locs.mean(0)

    @property
    def aleatoric(self) -> Tensor:
        """The mean noise variance, (n, ...), squared units of y."""
        return self.scales.square().mean(0)

    @property
    def epistemic(self) -> Tensor:
        """The variance of the draws' means, (n, ...), squared units of y."""
        return self.locs.var(0, correction=0)

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y | x, data) of each row, (n,), nats."""
        check_targets(y, self.locs.shape[1:], self.missing)
        y = y.to(self.locs.device)
        unknown = y.isnan()
        log_p = torch.distributions.Normal(self.locs, self.scales).log_prob(y.where(~unknown, 0))
        log_p = log_p.masked_fill(unknown, 0.0) if self.missing else log_p
        return mixed(log_p.flatten(2).sum(2) if log_p.ndim > 2 else log_p)

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y ≤ y) of each entry, (n, ...)."""
        y = torch.as_tensor(y).to(self.locs).expand(self.locs.shape[1:])
        return torch.distributions.Normal(self.locs, self.scales).cdf(y).mean(0)

    def quantile(self, q: Probabilities) -> Tensor:
        """The quantiles of each entry, (n, ...) for a number, (len(q), n, ...) for several."""
        at = probabilities(q)
        found = quantiles(at, self.cdf, self.mean, self.variance, False)
        return found if isinstance(q, Sequence) else found[0]

    def crps(self, y: Tensor) -> Tensor:
        """The continuous ranked probability score of each entry, (n, ...), units of y; exact. NaN
        where y is missing.
        """
        check_targets(y, self.locs.shape[1:], self.missing)
        y = y.to(self.locs)
        unknown = y.isnan()
        return crps_of_normals(self.locs, self.scales, y.where(~unknown, 0)).masked_fill(
            unknown, torch.nan
        )

    def samples(self, count: int, seed: int = 0, *, stretch: int = 0) -> Tensor:
        """Draws of y, (count, n, ...); all rows of one draw have the same draw of the weights.
        Each `stretch` of rows has noise of its own.
        """
        like = self.locs
        which = components(len(like), count, seed).to(like.device)
        generator = torch.Generator(device=like.device).manual_seed(noise_seed(seed, stretch))
        shape = (count, *like.shape[1:])
        noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        return torch.addcmul(self.locs[which], self.scales.expand_as(self.locs)[which], noise)
