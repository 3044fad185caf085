"""`Site`: one latent site of a posterior — Gaussian moments, their correlations, the prior of the
fit, the entries that live.

Owns `Site`, what a mask does to it, `rows_digest`, and the draw of a correlated one. Next:
`curvature.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_bmr.formulas.gaussian import Dense, Diagonal, Message
from pyro_bmr.formulas.low_rank import LowRank
from pyro_bmr.formulas.matrix_normal import MatrixNormal
from pyro_bmr.guides.mean_field import SUPPORTS
from pyro_bmr.priors import Prior

Joint = Dense | LowRank | MatrixNormal


@dataclass(frozen=True)
class Site:
    """One latent site: q = N(`mean`, `var`) entry by entry, on the unconstrained scale (log for
    positive sites, logit on (0, 1)).

    `prior`: the Gaussian prior of the fit, its moments expanded lazily from numbers; None for a
    prior that is not Gaussian. `declared`: the prior object that declared the site, if one did.
    `mask`: the entries that live; None for all. Pruned entries have mean and variance 0. `given`:
    the latent sites on which the prior's moments depend; they stand at their posterior point (their
    median). `joint`: the correlations of the entries where q has them, over the flattened site
    (`MatrixNormal`: over its rows and the rest); `mean` and `var` are its marginals. None for
    independent entries. `message`: where q couples the site with the scales that `declared`
    multiplies it by (`ScaleCoupled`), what the data said of the weight, in the weight's units; a
    draw of the site then follows the draw of its scales, and `mean` and `var` are those given the
    scales at their medians. Else None. `multiplies`: the sites by which the program multiplies this
    one, slice by slice (`products.with_products`); empty also where nobody looked. `of_rows`: in a
    site of the data's plate, with an entry for each row, which rows these are (`rows_digest` of x);
    else None.
    """

    mean: Tensor
    var: Tensor
    prior: Diagonal | None = None
    declared: Prior | None = None
    support: str = "real"
    mask: Tensor | None = None
    given: tuple[str, ...] = ()
    joint: Joint | None = None
    message: Message | None = None
    multiplies: tuple[str, ...] = ()
    of_rows: str | None = None

    @property
    def alive(self) -> Tensor:
        """The entries that live, as a bool tensor in the site's shape."""
        return torch.ones_like(self.mean, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def living(self) -> int:
        """How many entries live."""
        return self.mean.numel() if self.mask is None else int(self.mask.count_nonzero())

    def value(self, unconstrained: Tensor) -> Tensor:
        """The constrained value, exactly 0 where the mask says so."""
        transform = SUPPORTS[self.support]
        value = unconstrained if transform is None else transform(unconstrained)
        return value if self.mask is None else value.where(self.mask, 0)

    def masked(self, mask: Tensor) -> Site:
        """The same site with `mask` in force: moments of pruned entries 0, and the joint covariance
        that of the others.
        """
        return replace(
            self,
            mean=self.mean.where(mask, 0),
            var=self.var.where(mask, 0),
            mask=mask,
            joint=_masked_joint(self.joint, mask),
        )

    def widened(self, factor: float) -> Site:
        """The same site with `factor` times the covariance; one that is not on all numbers stays as
        it is.
        """
        if self.support != "real":
            return self
        return replace(self, var=self.var * factor, joint=_widened_joint(self.joint, factor))


def rows_digest(x: Tensor) -> str:
    """What tells the rows `x` from others."""
    return hashlib.sha256(x.detach().cpu().contiguous().double().numpy().tobytes()).hexdigest()[:16]


def _widened_joint(joint: Joint | None, factor: float) -> Joint | None:
    if isinstance(joint, Dense):
        return replace(joint, cov=joint.cov * factor)
    if isinstance(joint, LowRank):
        return replace(joint, var=joint.var * factor, factor=joint.factor * factor**0.5)
    return joint if joint is None else replace(joint, row_cov=joint.row_cov * factor)


def _masked_joint(joint: Joint | None, mask: Tensor) -> Joint | None:
    """The covariance of the living entries, rows and columns of the others 0; None where a matrix
    normal loses its form.
    """
    flat = mask.flatten()
    if isinstance(joint, Dense):
        return Dense(joint.mean.where(flat, 0), joint.cov * (flat[:, None] & flat))
    if isinstance(joint, LowRank):
        return LowRank(
            joint.mean.where(flat, 0), joint.var.where(flat, 0), joint.factor * flat[:, None]
        )
    if isinstance(joint, MatrixNormal):
        alive = mask.reshape(joint.mean.shape)
        rows, columns = alive.any(1), alive.any(0)
        if bool((alive == rows[:, None] & columns).all()):
            return MatrixNormal(
                joint.mean.where(alive, 0),
                joint.row_cov * (rows[:, None] & rows),
                joint.col_cov * (columns[:, None] & columns),
            )
    return None


def joint_roots(joint: Joint) -> tuple[Tensor, ...]:
    """T of each covariance TTᵀ in `joint`, rows of pruned entries 0."""
    covariances = {Dense: ("cov",), LowRank: (), MatrixNormal: ("row_cov", "col_cov")}[type(joint)]
    roots = []
    for cov in (getattr(joint, name) for name in covariances):
        alive = cov.diagonal() > 0
        root, info = torch.linalg.cholesky_ex(cov + (~alive).to(cov.dtype).diag())
        if int(info) != 0:  # singular to working precision
            values, vectors = torch.linalg.eigh(cov)
            root = vectors * values.clamp_min(0).sqrt()
        roots.append(root * alive[:, None])
    return tuple(roots)


def joint_draw(joint: Joint, roots: tuple[Tensor, ...], noise: Callable[..., Tensor]) -> Tensor:
    """One draw from `joint` with its `joint_roots`; `noise(*shape)` gives standard normals."""
    if isinstance(joint, Dense):
        return joint.mean + roots[0] @ noise(len(joint.mean))
    if isinstance(joint, LowRank):
        return (
            joint.mean
            + joint.var.sqrt() * noise(len(joint.mean))
            + joint.factor @ noise(joint.factor.shape[1])
        )
    return joint.mean + roots[0] @ noise(*joint.mean.shape) @ roots[1].mT
