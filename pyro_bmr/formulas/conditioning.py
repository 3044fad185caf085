r"""Gaussians with some entries held at zero, stored so that holding or releasing one more is a
rank-one update.

Owns the generic function `initial_state`, which the file of a structure extends, and the states:
`SweptState` (`Dense`, and the rows of a `MatrixNormal`), `LowRankState`, `IndependentState`. Each
answers what the density ratio log q(0) − log p(0) of an entry or group is, given that the entries
set so far are zero. All in float64. Imports torch only. Next: `dense.py`.
"""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.diagonal import Diagonal, check_diagonal, moments
from pyro_bmr.formulas.gaussian import delta_f

Members = list[list[tuple[int, Tensor]]]
"""Group → (number of the structure, indices of its entries there), for each structure that the
group has entries in.
"""

_SPREAD = 1e-5  # of the factor of C: below, C⁻¹ has less than six digits
_LOG_2PI = math.log(2 * math.pi)


class State(Protocol):
    """A posterior and a prior with some entries held at zero."""

    def log_ratios(self) -> Tensor:
        """For each entry: log q − log p of it at zero, given the others that are held there."""
        ...

    def log_ratio(self, index: Tensor, kept: bool) -> Tensor:
        """The same for a block of entries, which are all kept or all held."""
        ...

    def flipped(self, index: Tensor, kept: bool) -> State:
        """The state with kept entries held at zero, or held ones released."""
        ...

    def log_ratios_after_each(self, index: Tensor) -> Tensor | None:
        """Row k: `log_ratios` of the entries `index` in the state where the k-th of them alone has
        flipped. None if that is no faster than the states themselves."""
        ...

    def inflation(self) -> float:
        """By how much releasing may enlarge roundings: the largest ratio of a held entry's variance
        at the start to its variance given the other held ones; inf if none should be released.
        """
        ...


class SweptState(NamedTuple):
    r"""A covariance swept on the entries S that are held: Σ_RR − Σ_RS Σ_SS⁻¹ Σ_SR where they are
    not, −Σ_SS⁻¹ where they are; the means likewise.

    `mean` is (d, m): m independent columns that share one covariance. The prior is swept too if it
    has correlations. Source: Goodnight 1979.
    """

    cov: Tensor
    mean: Tensor
    held: Tensor
    log_p: Tensor  # (d,) of independent priors
    prior: Any  # a SweptState, or None for independent priors
    constant: float  # per entry, of a common factor of the columns
    start: Tensor  # (d,) the variances before anything was held

    def log_ratios(self) -> Tensor:
        log_q = self._log_q(self.cov.diagonal(), self.mean, self.held)
        return log_q - (self.log_p if self.prior is None else self.prior.log_ratios())

    def log_ratios_after_each(self, index: Tensor) -> Tensor | None:
        if self.mean.shape[1] != 1:
            return None
        index = index.to(self.cov.device)
        cross, mean, held = self.cov[index][:, index], self.mean[index, 0], self.held[index]
        pivot = cross.diagonal()
        share = cross / pivot[:, None]  # the sweep of `flipped`, of its diagonal and mean alone
        diagonal, means = pivot - share * cross, mean - share * mean[:, None]
        diagonal.diagonal().copy_(-1 / pivot)
        means.diagonal().copy_(mean / pivot)  # but for its sign: the square counts
        swapped = held ^ torch.eye(len(index), dtype=torch.bool, device=held.device)
        log_q = self._log_q(diagonal, means[..., None], swapped)
        after = None if self.prior is None else self.prior.log_ratios_after_each(index)
        return log_q - (self.log_p[index] if after is None else after)

    def inflation(self) -> float:
        factors = (-self.cov.diagonal() * self.start).where(self.held, 1.0)
        own = float(factors.max())
        return own if self.prior is None else max(own, self.prior.inflation())

    def _log_q(self, diagonal: Tensor, mean: Tensor, held: Tensor) -> Tensor:
        """log q of each entry at zero, of the diagonals of swept covariances and their means."""
        # the conditional variance; of a held entry 1/(Σ_SS⁻¹)_ii
        var = torch.where(held, -1 / diagonal, diagonal)
        mean = torch.where(held[..., None], mean * var[..., None], mean)
        energy = mean.square().sum(-1) / var
        return self.constant - 0.5 * (mean.shape[-1] * (_LOG_2PI + var.log()) + energy)

    def log_ratio(self, index: Tensor, kept: bool) -> Tensor:
        if len(index) == 1:
            return self.log_ratios()[index[0]]
        cov, mean = self.cov[index][:, index], self.mean[index]
        chol = torch.linalg.cholesky(cov if kept else -cov)
        half_log_det = chol.diagonal().log().sum() * (1 if kept else -1)
        # held: Vb with V = Λ⁻¹, so bᵀΛ⁻¹b again
        quadratic = (torch.linalg.solve_triangular(chol, mean, upper=False)).square().sum()
        log_q = (
            self.constant * len(index)
            - 0.5 * (mean.numel() * _LOG_2PI + quadratic)
            - self.mean.shape[1] * half_log_det
        )
        return log_q - (
            self.log_p[index].sum() if self.prior is None else self.prior.log_ratio(index, kept)
        )

    def flipped(self, index: Tensor, kept: bool) -> SweptState:
        cov, mean, held = self.cov.clone(), self.mean.clone(), self.held.clone()
        for k in index.tolist():
            pivot, column, row = cov[k, k].clone(), cov[:, k].clone(), mean[k].clone()
            cov.addr_(column, column, alpha=-1 / float(pivot))
            mean.addr_(column, row, alpha=-1 / float(pivot))
            side = (1 if kept else -1) / pivot
            cov[:, k] = cov[k] = column * side
            cov[k, k] = -1 / pivot
            mean[k] = row * side
            held[k] = kept
        prior = None if self.prior is None else self.prior.flipped(index, kept)
        return self._replace(cov=cov, mean=mean, held=held, prior=prior)


class LowRankState(NamedTuple):
    r"""w = μ + D^½ε + Wz with the held entries S observed to be 0: z ~ N(C⁻¹r, C⁻¹), C = I + Σ_S
    w_iw_iᵀ/D_i, r = −Σ_S w_iμ_i/D_i. Only C and r change.
    """

    mean: Tensor
    var: Tensor  # D
    factor: Tensor  # W
    held: Tensor
    precision: Tensor  # C
    weighted: Tensor  # r
    log_p: Tensor

    def log_ratios(self) -> Tensor:
        projected, z = self._latent(self.precision, self.weighted)
        a = projected.square().sum(1)  # wᵀC⁻¹w
        b = self.factor @ z
        # of a held entry: D − wᵀC⁻¹w > 0
        rest = (self.var - a).clamp(min=torch.finfo(a.dtype).tiny)
        var = torch.where(self.held, self.var.square() / rest, self.var + a)
        # without its own observation: Sherman–Morrison
        mean = self.mean + torch.where(self.held, (b * self.var + a * self.mean) / rest, b)
        return -0.5 * (_LOG_2PI + var.log() + mean.square() / var) - self.log_p

    def log_ratio(self, index: Tensor, kept: bool) -> Tensor:
        without = self if kept else self.flipped(index, False)
        projected, z = without._latent(without.precision, without.weighted, index)
        mean = self.mean[index] + self.factor[index] @ z
        scaled = projected / self.var[index, None]
        inner = torch.eye(projected.shape[1]).to(projected) + projected.mT @ scaled
        white = scaled.mT @ mean
        quadratic = (mean.square() / self.var[index]).sum() - white @ torch.linalg.solve(
            inner, white
        )
        log_det = self.var[index].log().sum() + torch.linalg.slogdet(inner).logabsdet
        return -0.5 * (len(index) * _LOG_2PI + log_det + quadratic) - self.log_p[index].sum()

    def flipped(self, index: Tensor, kept: bool) -> LowRankState:
        factor, sign = self.factor[index], 1 if kept else -1
        scaled = factor / self.var[index, None]
        held = self.held.index_fill(0, index.to(self.held.device), kept)
        return self._replace(
            held=held,
            precision=self.precision + sign * factor.mT @ scaled,
            weighted=self.weighted - sign * scaled.mT @ self.mean[index],
        )

    def log_ratios_after_each(self, index: Tensor) -> Tensor | None:
        return None

    def inflation(self) -> float:
        # C has no bound for what its entries lose
        return math.inf if bool(self.held.any()) else 1.0

    def _latent(
        self, precision: Tensor, weighted: Tensor, index: Any = slice(None)
    ) -> tuple[Tensor, Tensor]:
        chol, info = torch.linalg.cholesky_ex(precision)
        ends = chol.diagonal().aminmax() if len(chol) else None
        if int(info) or (ends is not None and bool(ends.min < _SPREAD * ends.max)):
            raise ReductionError(
                "the diagonal of the low-rank posterior is too small beside its factor for a"
                " search; take Dense(mean, cov)"
            )
        projected = torch.linalg.solve_triangular(chol, self.factor[index].mT, upper=False).mT
        return projected, torch.cholesky_solve(weighted[:, None], chol)[:, 0]


class IndependentState(NamedTuple):
    """Independent entries: holding some changes nothing for the rest."""

    ratios: Tensor

    def log_ratios(self) -> Tensor:
        return self.ratios

    def log_ratio(self, index: Tensor, kept: bool) -> Tensor:
        return self.ratios[index].sum()

    def flipped(self, index: Tensor, kept: bool) -> IndependentState:
        return self

    def log_ratios_after_each(self, index: Tensor) -> Tensor | None:
        return self.ratios[index].expand(len(index), -1)

    def inflation(self) -> float:
        return 1.0


@singledispatch
def initial_state(posterior: Any, prior: Any) -> State:
    """The state of a posterior under a prior, nothing held at zero.

    Raises:
        ReductionError: moments are not finite, a variance is not positive, or a covariance not
            symmetric positive definite.
    """
    spike = torch.zeros((), dtype=torch.float64)
    q = moments(posterior)
    return IndependentState(
        delta_f(Diagonal(q.mean.double(), q.var.double()), prior, Diagonal(spike, spike)).flatten()
    )


def log_prior_at_zero(prior: Any, mean: Tensor) -> Tensor:
    """log p(0) of a diagonal prior, entry by entry, in float64."""
    p = moments(prior, mean)
    check_diagonal("prior", p)
    m, v = p.mean.double(), p.var.double()
    return -0.5 * (_LOG_2PI + v.log() + m * (m / v))
