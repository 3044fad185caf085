r"""Matrix-normal Gaussians with single entries held at zero.

Owns the structure `HeldMatrixNormal`, what holding more entries gains in evidence (`held_gain`),
and its form of `prune_subset`. The equations are in `held_entries.py` and `held_evidence.py`.
Imports torch only. Next: `matrix_normal.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError, warn
from pyro_bmr.formulas.conjugate_gradients import precision
from pyro_bmr.formulas.covariance import half_log_and_energy
from pyro_bmr.formulas.diagonal import check_mask
from pyro_bmr.formulas.gaussian import prune_subset
from pyro_bmr.formulas.held_entries import DENSE_UP_TO, HeldAtZero, entries_factor, held_at_zero
from pyro_bmr.formulas.held_evidence import Bounds, held_var, log_det_bounds
from pyro_bmr.formulas.structure import Correlated, Noise, covariance_root, spread, spread_square


@dataclass(frozen=True)
class HeldMatrixNormal:
    r"""MN(free_mean, row_cov, col_cov) given that the entries `held` are zero.

    Entries that are neither held nor kept are left out: kept entries have a variance > 0.

    `mean`, `var`: of the kept entries given the zeros, (n, m), 0 elsewhere. The mean is M − RΛC.
    The variances are exact where `held_var` is, up to 1,024 entries that are held or left; else
    they are R_ii C_jj, those before anything was held, which are no smaller. `multipliers`: Λ.
    `energy`, `log_det`: M_Sᵀ Σ_SS⁻¹ M_S, and two bounds of log det Σ_SS, in float64. `residual`: 0,
    or what is left of the equations for Λ where they have not converged (`HeldAtZero.residual`).

    M, R and C remain as they were, so that more entries can be held from here as exactly as from
    the beginning.
    """

    mean: Tensor
    var: Tensor
    row_cov: Tensor
    col_cov: Tensor
    free_mean: Tensor
    held: Tensor
    multipliers: Tensor
    energy: Tensor
    log_det: Tensor
    residual: Tensor

    @classmethod
    def of(cls, mean: Tensor, row_cov: Tensor, col_cov: Tensor) -> HeldMatrixNormal:
        """MN(mean, row_cov, col_cov) with nothing held."""
        var = row_cov.diagonal()[:, None] * col_cov.diagonal()
        zero = mean.new_zeros((), dtype=torch.float64)
        held = torch.zeros_like(mean, dtype=torch.bool)
        parts = held, torch.zeros_like(mean), zero, zero.expand(2).clone(), zero
        return cls(mean, var, row_cov, col_cov, mean, *parts)

    def holding(self, pruned: Tensor, tolerance: float | None = None) -> HeldMatrixNormal:
        """With the kept entries where `pruned` is True held at zero too; arguments and errors as
        for `held_at_zero`.
        """
        held = self.held | (pruned & self.kept)
        # first, while there are no other tensors of that size
        bounds = log_det_bounds(self.row_cov, self.col_cov, held)
        start = self.multipliers if bool(self.held.any()) else None
        done = self._given_zeros(self.free_mean, held, start, tolerance)
        kept = self.kept & ~held
        var = held_var(self.row_cov, self.col_cov, held)[0]
        return replace(
            self,
            mean=done.mean.where(kept, 0).to(self.mean.dtype),
            var=var.where(kept, 0).to(self.var.dtype),
            held=held,
            multipliers=done.multipliers.to(self.mean.dtype),
            energy=done.energy,
            log_det=done.energy.new_tensor(bounds),
            residual=done.energy.new_tensor(0.0 if done.converged else done.residual),
        )

    def _given_zeros(
        self, free: Tensor, held: Tensor, start: Tensor | None, tolerance: float | None = None
    ) -> HeldAtZero:
        return held_at_zero(
            free, self.row_cov, self.col_cov, held, start=start, tolerance=tolerance
        )

    @property
    def kept(self) -> Tensor:
        """The kept entries."""
        return self.var > 0

    @property
    def marginal_var(self) -> Tensor:
        """`var`."""
        return self.var

    @property
    def unit_count(self) -> int:
        """The number of rows."""
        return len(self.mean)

    def fits(self) -> bool:
        """Whether its tensors have the shapes and dtypes of its parts."""
        d = self.mean.shape
        like = (self.var, self.free_mean, self.held, self.multipliers)
        square = [(size, size) for size in d]
        numbers = [self.energy.shape, self.log_det.shape, self.residual.shape]
        return (
            len(d) == 2
            and all(t.shape == d for t in like)
            and [self.row_cov.shape, self.col_cov.shape] == square
            and numbers == [(), (2,), ()]
            and self.held.dtype == torch.bool
        )

    def scaled(self, factor: float) -> HeldMatrixNormal:
        """With `factor` times the covariance."""
        if factor == 0:
            return replace(self, var=0 * self.var, row_cov=0 * self.row_cov)
        more = int(self.held.count_nonzero()) * torch.tensor(factor).double().log()
        return replace(
            self,
            var=self.var * factor,
            row_cov=self.row_cov * factor,
            multipliers=self.multipliers / factor,
            energy=self.energy / factor,
            log_det=self.log_det + more.to(self.log_det.device),
        )

    def masked(self, kept: Tensor) -> HeldMatrixNormal:
        """With mean and variance 0 for the entries that are not `kept`, which are left out, not
        held.
        """
        kept = kept.reshape(self.mean.shape)
        return replace(self, mean=self.mean.where(kept, 0), var=self.var.where(kept, 0))

    def embedded(self, kept: Tensor) -> HeldMatrixNormal:
        """As the `kept` rows among pruned ones."""
        names = ("mean", "var", "free_mean", "held", "multipliers")
        rows = {name: spread(getattr(self, name), kept) for name in names}
        return replace(self, row_cov=spread_square(self.row_cov, kept), **rows)

    def whole(self, kept: Tensor, turned: bool) -> HeldMatrixNormal:
        """Itself: it has the shape of its site."""
        return self

    def correlated(self, prior: Any, kept: Tensor, labels: Tensor | None) -> Correlated | None:
        """None: no update of rank one holds one more of its entries, or lets it go."""
        return None

    def roots(self) -> tuple[Tensor, ...]:
        """What a draw needs: the root of the covariance of the entries that are not held, where
        they are few; else those of rows and columns, and the factor of Σ_SS where that is small.
        """
        free, count = ~self.held, int(self.held.count_nonzero())
        alive = bool((self.row_cov.diagonal() > 0).all() and (self.col_cov.diagonal() > 0).all())
        if count and alive and self.held.numel() - count <= DENSE_UP_TO:
            inverses = precision(self.row_cov, "rows"), precision(self.col_cov, "columns")
            return (torch.linalg.inv(entries_factor(*inverses, free)).mT.to(self.mean.dtype),)
        roots = covariance_root(self.row_cov), covariance_root(self.col_cov)
        if 0 < count <= DENSE_UP_TO:
            return (*roots, entries_factor(self.row_cov, self.col_cov, self.held))
        return roots

    def draw(self, roots: tuple[Tensor, ...], noise: Noise) -> Tensor:
        """One draw given the zeros: ε − R Λ(ε) C + mean for a draw ε of MN(0, R, C) (Matheron's
        rule).

        Warns: PyroBMRWarning: conjugate gradients for Λ(ε) have not converged.
        """
        kept = self.kept
        if len(roots) == 1:
            free = ~self.held
            drawn = torch.zeros_like(self.mean).masked_scatter(
                free, roots[0] @ noise(len(roots[0]))
            )
            return (self.mean + drawn).where(kept, 0)
        error = roots[0] @ noise(*self.mean.shape) @ roots[1].mT
        if len(roots) == 3:
            own = torch.cholesky_solve(error[self.held].double()[:, None], roots[2])[:, 0]
            weights = torch.zeros_like(error).masked_scatter(self.held, own.to(error.dtype))
            return (self.mean + error - self.row_cov @ weights @ self.col_cov).where(kept, 0)
        done = self._given_zeros(error, self.held, None)
        if not done.converged:
            warn(_not_converged("a draw", done.residual))
        return (self.mean + done.mean).where(kept, 0)


def held_gain(before: HeldMatrixNormal, after: HeldMatrixNormal, prior: Any) -> Bounds:
    """ΔF of what `after` holds beyond `before`, given that, between two bounds, nats; `prior` has
    diagonal moments.
    """
    more = after.held & ~before.held
    if not bool(more.any()):
        return Bounds(0.0, 0.0)
    low, high = (after.log_det - before.log_det.flip(0)).tolist()
    if bool(before.held.any()):  # given what was held, variances are no larger than at first
        first = after.row_cov.double().diagonal()[:, None] * after.col_cov.double().diagonal()
        high = min(high, float(first[more].log().sum()))
    low = min(low, high)
    rest = float(half_log_and_energy(prior, after.mean, more))
    rest -= 0.5 * float(after.energy - before.energy)
    return Bounds(rest - 0.5 * high, rest - 0.5 * low)


def not_converged(after: HeldMatrixNormal) -> str | None:
    """What to say of multipliers that do not solve their equations; None if they do."""
    residual = float(after.residual)
    return _not_converged("the mean of the rest", residual) if residual else None


def _not_converged(what: str, residual: float) -> str:
    return (
        f"conjugate gradients for {what} of a matrix normal with entries held at zero have not"
        f" converged: a residual of {residual:.2g} of the held means is left. Its row_cov and"
        " col_cov are near to singular; give them in torch.float64, or a narrower prior"
    )


@prune_subset.register
def _(posterior: HeldMatrixNormal, prior: Any, pruned: Tensor) -> tuple[Tensor, HeldMatrixNormal]:
    r"""Single entries, `pruned` of shape (n, m), set to 0. The rest is of the same shape, with
    zeros. ΔF is the lower one of the two bounds of `held_gain`; `held_delta_f` gives both.

    Warns: PyroBMRWarning: conjugate gradients have not converged.
    """
    check_mask(pruned, posterior.mean)
    if bool((pruned & ~posterior.kept).any()):
        raise ReductionError(
            f"pruned: {int((pruned & ~posterior.kept).sum())} entries are no longer there; name"
            " kept ones"
        )
    after = posterior.holding(pruned)
    if said := not_converged(after):
        warn(said)
    gain = held_gain(posterior, after, prior).lower
    return torch.tensor(gain, dtype=posterior.mean.dtype), after
