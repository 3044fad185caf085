r"""What the structure of a posterior is: a Gaussian over the entries of a site, with or without
correlations.

Owns the protocols `Structure` and `Noise`, `Correlated` and `Rescaled`, which a structure answers
with, and what structures share. A structure is a frozen dataclass of tensors in a file of its own,
`diagonal.py`, `dense.py`, `low_rank.py` or `matrix_normal.py`. That file also registers it with the
functions that need a prior: `delta_f`, `reduced_posterior`, `prune_subset`, `rescaled`
(`gaussian.py`) and `initial_state` (`conditioning.py`). Imports torch only. Next: `diagonal.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """Standard normals of a shape."""

    def __call__(self, *shape: int) -> Tensor: ...


class Structure(Protocol):
    """A Gaussian over the flattened entries of a site. A unit is what a search sets to zero at
    once: an entry, or a row of a matrix normal.
    """

    @property
    def mean(self) -> Tensor: ...

    @property
    def marginal_var(self) -> Tensor:
        """The variance of each entry, in the shape of `mean`."""
        ...

    @property
    def unit_count(self) -> int:
        """How many units it has."""
        ...

    def fits(self) -> bool:
        """Whether the shapes of its tensors fit each other."""
        ...

    def scaled(self, factor: float) -> Structure:
        """With `factor` times the covariance."""
        ...

    def masked(self, kept: Tensor) -> Structure | None:
        """With mean, variance and covariances 0 for the entries that are not `kept`, a mask in the
        shape of the site; None where that has no such form.
        """
        ...

    def embedded(self, kept: Tensor) -> Structure:
        """As the `kept` units among pruned ones, whose mean, variance and covariances are 0."""
        ...

    def whole(self, kept: Tensor, turned: bool) -> Structure:
        """As the `kept` part of a site, a mask in the site's shape, among pruned entries. It is the
        structure of a `Correlated`, or of what is left of one, whose `turned` is given.
        """
        ...

    def correlated(self, prior: Any, kept: Tensor, labels: Tensor | None) -> Correlated | None:
        """The `kept` part as units that can be set to zero together; None if the groups `labels`
        cut through its units. `prior` (a `Diagonal`), `kept` and `labels` have the site's shape.
        """
        ...

    def roots(self) -> tuple[Tensor, ...]:
        """T of each covariance TTᵀ in it, with rows of zeros for pruned entries."""
        ...

    def draw(self, roots: tuple[Tensor, ...], noise: Noise) -> Tensor:
        """One draw with its `roots`, in the shape of `mean`."""
        ...


@dataclass(frozen=True)
class Correlated:
    """The kept part of a site with correlations.

    `structure`, `prior`: what the formula files take. `labels`: the group of each unit. `units`:
    for each entry of the site the number of its unit, −1 for pruned entries. `turned`: the units of
    a matrix normal are its columns, so that `structure` is transposed.
    """

    structure: Structure
    prior: Any
    labels: Tensor
    units: Tensor
    turned: bool = False


class Rescaled(NamedTuple):
    """A posterior under another prior: ΔF, the marginal moments of its entries, and its structure,
    None where only the moments have a closed form.
    """

    delta_f: float
    mean: Tensor
    var: Tensor
    structure: Structure | None


def entries_as_units(
    part: Structure, prior: Any, kept: Tensor, labels: Tensor | None
) -> Correlated:
    """What `Structure.correlated` gives where each entry is a unit; `part` has the kept entries."""
    flat = kept.flatten()
    units = torch.where(flat, flat.cumsum(0) - 1, -1).view(kept.shape)
    own = units.flatten()[flat] if labels is None else labels.to(kept.device).flatten()[flat]
    return Correlated(part, prior.part(kept), own, units)


def spread(part: Tensor, kept: Tensor) -> Tensor:
    """The rows of `part` at the `kept` places of a larger tensor, zeros elsewhere."""
    full = part.new_zeros((len(kept), *part.shape[1:]))
    full[kept] = part
    return full


def spread_square(part: Tensor, kept: Tensor) -> Tensor:
    """The rows and columns of `part` at the `kept` places of a larger matrix, zeros elsewhere."""
    index = kept.nonzero()[:, 0]
    full = part.new_zeros((len(kept), len(kept)))
    full[index[:, None], index] = part
    return full


def covariance_root(cov: Tensor) -> Tensor:
    """T of the covariance TTᵀ, rows of pruned entries (variance 0) 0."""
    kept = cov.diagonal() > 0
    root, info = torch.linalg.cholesky_ex(cov + (~kept).to(cov.dtype).diag())
    if int(info) != 0:  # singular to working precision
        values, vectors = torch.linalg.eigh(cov)
        root = vectors * values.clamp_min(0).sqrt()
    return root * kept[:, None]
