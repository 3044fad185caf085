r"""The Gaussian of one site in a guide, q(z) = N(μ, AAᵀ) with z = μ + Aε, as the evidence bound and
a posterior need it.

Owns the protocol `SiteNormal`, its independent form `Independent`, entropy, density and the
closed-form KL. The correlated forms are beside their guides: `full_rank.py`,
`low_rank_plus_diagonal.py`, `matrix_variate.py`. Next: `row_noise.py`.

Masks: a pruned entry has the value 0 and takes no part. Its row of A is dropped, and so is the
noise that only this entry uses. The kept entries have a Gaussian of the same form.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from torch import Tensor

from pyro_bmr.formulas.dense import Dense
from pyro_bmr.formulas.low_rank import LowRank
from pyro_bmr.formulas.matrix_normal import MatrixNormal

_LOG_2PI = math.log(2 * math.pi)


class SiteNormal(Protocol):
    """What every form of the Gaussian of a site has.

    `mean` and `var` are the marginal moments in the site's shape, 0 where pruned. `log_det` is
    log |AAᵀ| of the kept entries. `mask` is True where an entry is kept; None if all are.
    """

    @property
    def mean(self) -> Tensor: ...
    @property
    def var(self) -> Tensor: ...
    @property
    def log_det(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor | None: ...
    @property
    def noise_size(self) -> int:
        """How many standard normals a draw takes."""
        ...

    def draw(self, noise: Tensor) -> Tensor:
        """z = μ + Aε in the site's shape, 0 where masked; `noise` is flat."""
        ...

    def squared_distance(self, z: Tensor, noise: Tensor) -> Tensor:
        """(z − μ)ᵀ(AAᵀ)⁻¹(z − μ) over the kept entries, at the draw z of `noise`."""
        ...

    def joint(self) -> Dense | LowRank | MatrixNormal | None:
        """Mean and covariance over the flattened site as a structure of the reductions; None when
        entries are independent or the form has no such structure.
        """
        ...


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """`values`, exactly zero where an entry is pruned."""
    return values if mask is None else values.where(mask, 0)


def kept_count(q: SiteNormal) -> Tensor | int:
    """The number of entries that are kept."""
    return q.mean.numel() if q.mask is None else q.mask.sum().to(q.mean.dtype)


def log_density(q: SiteNormal, z: Tensor, noise: Tensor) -> Tensor:
    """log q(z) of the kept entries at the draw z of `noise`; nats."""
    return -0.5 * (q.squared_distance(z, noise) + q.log_det + _LOG_2PI * kept_count(q))


def entropy(q: SiteNormal) -> Tensor:
    """H(q) = ½ log |2πe AAᵀ| of the kept entries; nats."""
    return 0.5 * (q.log_det + (1 + _LOG_2PI) * kept_count(q))


def gaussian_kl(q: SiteNormal, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
    r"""KL(q ‖ ∏ᵢ N(ηᵢ, sᵢ²)) over the kept entries; nats.

    .. math:: \sum_i \left[\log s_i + \frac{(\mu_i - \eta_i)^2 +
        \Sigma_{ii}}{2 s_i^2} - \frac12\right] - \frac12 \log|\Sigma|
    """
    terms = (
        prior_scale.log()
        + 0.5 * ((q.mean - prior_loc).square() + q.var) / prior_scale.square()
        - 0.5
    )
    return masked(terms, q.mask).sum() - 0.5 * q.log_det


class Independent(NamedTuple):
    """A is diagonal: `std` on it, 0 where masked."""

    mean: Tensor
    std: Tensor
    log_std: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, loc: Tensor, log_std: Tensor, mask: Tensor | None) -> Independent:
        return cls(masked(loc, mask), masked(log_std.exp(), mask), log_std, mask)

    @property
    def var(self) -> Tensor:
        return self.std.square()

    @property
    def log_det(self) -> Tensor:
        return 2 * masked(self.log_std, self.mask).sum()

    @property
    def noise_size(self) -> int:
        return self.mean.numel()

    def draw(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise.view(self.mean.shape)

    def squared_distance(self, z: Tensor, noise: Tensor) -> Tensor:
        return masked(noise.view(self.mean.shape), self.mask).square().sum()

    def joint(self) -> None:
        return None
