"""Independent Gaussians, and anything with a mean and a variance read as such.

Owns `Diagonal`, `moments`, `as_structure`, and the checks and dtypes that all Gaussian formulas
share. Imports torch only. Next: `gaussian.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from pyro_bmr.errors import ReductionError, described
from pyro_bmr.formulas.structure import Correlated, Noise, entries_as_units, spread


@dataclass(frozen=True)
class Diagonal:
    """Independent Gaussians, N(mean, var) element by element. `var` may be 0: the point `mean`."""

    mean: Tensor
    var: Tensor

    @property
    def marginal_var(self) -> Tensor:
        """`var`."""
        return self.var

    @property
    def unit_count(self) -> int:
        """The number of entries."""
        return self.mean.numel()

    def fits(self) -> bool:
        """Whether mean and var have one shape."""
        return self.mean.shape == self.var.shape

    def scaled(self, factor: float) -> Diagonal:
        """With `factor` times the variances."""
        return Diagonal(self.mean, self.var * factor)

    def masked(self, kept: Tensor) -> Diagonal:
        """With mean and variance 0 for the entries that are not `kept`."""
        kept = kept.view(self.mean.shape)
        return Diagonal(self.mean.where(kept, 0), self.var.where(kept, 0))

    def embedded(self, kept: Tensor) -> Diagonal:
        """As the `kept` entries among pruned ones, whose mean and variance are 0."""
        return Diagonal(spread(self.mean, kept), spread(self.var, kept))

    def whole(self, kept: Tensor, turned: bool) -> Diagonal:
        """As the `kept` entries of a site."""
        return self.embedded(kept.flatten())

    def part(self, kept: Tensor) -> Diagonal:
        """The `kept` entries."""
        return Diagonal(self.mean[kept], self.var[kept])

    def correlated(self, prior: Any, kept: Tensor, labels: Tensor | None) -> Correlated:
        """The `kept` entries; no groups cut through one."""
        return entries_as_units(self.part(kept.view(self.mean.shape)), prior, kept, labels)

    def roots(self) -> tuple[Tensor, ...]:
        """None: a draw needs no factor."""
        return ()

    def draw(self, roots: tuple[Tensor, ...], noise: Noise) -> Tensor:
        """μ + σε."""
        return self.mean + self.var.sqrt() * noise(*self.mean.shape)


def moments(gaussian: Any, like: Tensor | None = None) -> Diagonal:
    """`gaussian` (anything with `mean` and `var` or `variance`) as a `Diagonal`, expanded to the
    shape of `like`, on its device. Numbers are in float64.
    """
    mean, var = _given_moments(gaussian)
    if like is not None:
        mean, var = mean.to(like.device), var.to(like.device)
    try:
        if like is None:
            return Diagonal(*torch.broadcast_tensors(mean, var))
        return Diagonal(mean.expand(like.shape), var.expand(like.shape))
    except RuntimeError:
        got = " and ".join(dict.fromkeys(str(tuple(t.shape)) for t in (mean, var)))
        expected = (
            "mean and var: expected one shape"
            if like is None
            else f"prior: expected one number or the posterior's shape {tuple(like.shape)}"
        )
        raise ReductionError(f"{expected}, got {got}; give such tensors") from None


def as_structure(posterior: Any) -> Any:
    """A `Structure` as it is, anything else with mean and var as a `Diagonal`."""
    return posterior if hasattr(posterior, "unit_count") else moments(posterior)


def _given_moments(gaussian: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of `gaussian`, as they were given."""
    known = (
        hasattr(gaussian, "mean")
        and (hasattr(gaussian, "var") or hasattr(gaussian, "variance"))
        and not callable(gaussian.mean)
    )
    if isinstance(gaussian, type) or not known:
        raise ReductionError(
            f"expected a Gaussian, with mean and var, got {described(gaussian)}; give"
            " Diagonal(mean, var), or a prior such as Gaussian(0.3)"
        )
    if isinstance(gaussian, Normal):  # its own variance may underflow
        return gaussian.loc, gaussian.scale.double().square()
    var = gaussian.var if hasattr(gaussian, "var") else gaussian.variance
    return _floating(gaussian.mean), _floating(var)


def _floating(value: Any) -> Tensor:
    number_ = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        tensor = torch.tensor(value, dtype=torch.float64) if number_ else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ReductionError(
            f"expected floating-point mean and var, got {described(value)}; give tensors"
        ) from None
    if not tensor.is_floating_point():
        raise ReductionError(
            f"expected floating-point mean and var, got {tensor.dtype}; give tensor.float()"
        )
    return tensor


def diagonals(
    posterior: Any, prior: Any, reduced_prior: Any
) -> tuple[torch.dtype, Diagonal, Diagonal, Diagonal]:
    """The posterior's dtype, and the three with moments that are fit for a formula, expanded to its
    shape.
    """
    q = moments(posterior)
    p, p_ = moments(prior, q.mean), moments(reduced_prior, q.mean)
    for role, one, floor in (
        ("posterior", q, "> 0"),
        ("prior", p, "> 0"),
        ("reduced prior", p_, ">= 0"),
    ):
        check_diagonal(role, one, floor)
    return result_dtype(posterior), q, p, p_


def check_diagonal(role: str, one: Diagonal, floor: str = "> 0") -> None:
    """ReductionError unless the means are finite and the variances finite and > 0, or >= 0."""
    good = one.var > 0 if floor == "> 0" else one.var >= 0
    if not bool((good & one.mean.isfinite() & one.var.isfinite()).all()):
        raise ReductionError(
            f"{role}: expected finite moments and variance {floor}, got {int((~good).sum())} of"
            f" {good.numel()} variances outside,"
            f" {int((~one.mean.isfinite() | ~one.var.isfinite()).sum())} not finite; a point"
            " estimate has no variance to reduce"
        )


def positive_priors(
    prior: Any, reduced_prior: Any, like: Tensor, spike: str
) -> tuple[Diagonal, Diagonal]:
    """Both with moments that are fit for a formula, expanded to the shape of `like`; ReductionError
    unless their variances are > 0, with `spike`, what reduces to a point.
    """
    p, p_ = moments(prior, like), moments(reduced_prior, like)
    check_diagonal("prior", p)
    check_diagonal("reduced prior", p_, ">= 0")
    if not bool((p_.var > 0).all()):
        raise ReductionError(
            f"reduced prior: expected variances > 0, got {int((p_.var <= 0).sum())} that are 0;"
            f" {spike}"
        )
    return p, p_


def check_mask(pruned: Tensor, mean: Tensor) -> None:
    """ReductionError unless `pruned` is a bool tensor of the shape of `mean`."""
    if not isinstance(pruned, Tensor) or pruned.dtype != torch.bool or pruned.shape != mean.shape:
        raise ReductionError(
            f"pruned: expected a bool tensor of shape {tuple(mean.shape)}, got {described(pruned)};"
            " True prunes an entry"
        )


def result_dtype(gaussian: Any) -> torch.dtype:
    """The dtype of the answers about a posterior: the one of its moments."""
    if isinstance(gaussian, Normal):
        return gaussian.loc.dtype
    parts = (gaussian.mean, gaussian.var if hasattr(gaussian, "var") else gaussian.variance)
    dtypes = [_floating(t).dtype for t in parts if hasattr(t, "dtype")]
    return reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()


def rounded(value: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """`value` in `dtype`; ReductionError where it is outside its range."""
    value = value.to(dtype)
    if bad := int((~value.isfinite()).sum()):
        mend = (
            "give moments of torch.float64"
            if dtype != torch.float64
            else "the moments are too far apart for any float"
        )
        raise ReductionError(
            f"{what} leaves the range of {dtype} for {bad} of {value.numel()} values; {mend}"
        )
    return value


def number(t: Tensor) -> Tensor:
    """A number that was expanded, as a number again."""
    return (
        t.as_strided((), ())
        if t.numel()
        and all(stride == 0 or size == 1 for stride, size in zip(t.stride(), t.shape, strict=True))
        else t
    )
