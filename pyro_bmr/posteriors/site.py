"""`Site`: one latent site of a posterior — Gaussian moments, their correlations, the prior of the
fit, the kept entries.

Owns `Site`, what a mask does to it, and `rows_digest`. Next: `curvature.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_bmr.data.inputs import Inputs, parts_of
from pyro_bmr.errors import described
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.message import Message
from pyro_bmr.formulas.structure import Structure
from pyro_bmr.guides.latent_sites import SUPPORTS
from pyro_bmr.priors import Prior


@dataclass(frozen=True)
class Site:
    """One latent site: q = N(`mean`, `var`) entry by entry, on the unconstrained scale (log for
    positive sites, logit on (0, 1)).

    `prior`: the Gaussian prior of the fit, its moments expanded lazily from numbers; None for a
    prior that is not Gaussian. `declared`: the prior object that declared the site, if one did.
    `mask`: the kept entries; None for all. Pruned entries have mean and variance 0. `given`:
    the latent sites on which the prior's moments depend; they stand at their posterior point (their
    median). `joint`: the correlations of the entries where q has them, over the flattened site
    (`MatrixNormal`, `HeldMatrixNormal`: over its rows and the rest); `mean` and `var` are its
    marginals, but for the variances of a `HeldMatrixNormal` that is not small. None for independent
    entries. `message`: where q couples the site with the scales that `declared`
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
    joint: Structure | None = None
    message: Message | None = None
    multiplies: tuple[str, ...] = ()
    of_rows: str | None = None

    __repr__ = described

    @property
    def kept(self) -> Tensor:
        """The kept entries, as a bool tensor in the site's shape."""
        return torch.ones_like(self.mean, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def kept_count(self) -> int:
        """How many entries are kept."""
        return self.mean.numel() if self.mask is None else int(self.mask.count_nonzero())

    def value(self, unconstrained: Tensor) -> Tensor:
        """The constrained value, exactly 0 where the mask says so."""
        transform = SUPPORTS[self.support]
        value = unconstrained if transform is None else transform(unconstrained)
        return value if self.mask is None else value.where(self.mask, 0)

    def masked(self, mask: Tensor) -> Site:
        """The same site with `mask` in force: moments and covariances of pruned entries are 0."""
        mean, var, joint = self.mean.where(mask, 0), self.var.where(mask, 0), self.joint
        return replace(self, mean=mean, var=var, mask=mask, joint=joint and joint.masked(mask))

    def widened(self, factor: float) -> Site:
        """With `factor` times the covariance; a site that is not real is unchanged."""
        if self.support != "real":
            return self
        joint = self.joint and self.joint.scaled(factor)
        return replace(self, var=self.var * factor, joint=joint)


def rows_digest(x: Inputs) -> str:
    """What tells the rows `x` from others."""
    digest = hashlib.sha256()
    for part in parts_of(x).values():
        digest.update(part.detach().cpu().contiguous().double().numpy().tobytes())
    return digest.hexdigest()[:16]
