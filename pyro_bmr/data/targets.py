"""The targets of a data set under its likelihood: their type and units, and what a network for them
returns.

Owns `Kind`, `kind_of`, `may_miss`, `default_likelihood`, `outputs_of` and `targets_of`. Next:
`data_set.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from pyro_bmr.errors import DataError
from pyro_bmr.likelihoods import (
    Bernoulli,
    Categorical,
    Likelihood,
    NegativeBinomial,
    Normal,
    Ordinal,
    Poisson,
    StudentT,
)
from pyro_bmr.likelihoods.weighted import Weighted, unweighted

Kind = Literal["classes", "grades", "bits", "counts", "reals", "own"]
_KINDS: dict[type, Kind] = {
    Categorical: "classes",
    Ordinal: "grades",
    Bernoulli: "bits",
    Poisson: "counts",
    NegativeBinomial: "counts",
    Normal: "reals",
    StudentT: "reals",
}
_MOST_COUNT = 1 << 24  # beyond it float32 has no odd numbers
PARTS = {"train": "training", "test": "test", "val": "validation"}
"""Part of a data set → what it is called in a message."""


@dataclass(frozen=True)
class Targets:
    """The targets of each part of a data set, and what `Data` says of them."""

    ys: dict[str, Tensor]
    likelihood: Likelihood | None = None
    classes: int | None = None
    mean: float | Tensor = 0.0
    scale: float | Tensor = 1.0


def kind_of(likelihood: type | Likelihood) -> Kind:
    """What targets of a likelihood, or of a class of likelihoods, are; "own" of one that is not of
    this library.
    """
    kind = likelihood if isinstance(likelihood, type) else type(unweighted(likelihood))
    return _KINDS.get(kind, "own")


def may_miss(likelihood: Likelihood | None) -> bool:
    """Whether a target may be missing."""
    ignored = getattr(likelihood, "ignore_index", None) is not None
    return ignored or getattr(likelihood, "missing", "refuse") == "ignore"


def default_likelihood(likelihood: Likelihood | None, ys: Mapping[str, Tensor]) -> bool:
    """Whether it is what `Data` takes by itself: `Categorical()` with a class a row, or `Normal()`
    with a number a row.
    """
    plain = likelihood in (None, Categorical(), Normal())
    return plain and all(y.ndim == 1 for y in ys.values())


def outputs_of(likelihood: Likelihood, classes: int | None, y: Tensor) -> int:
    """The number of outputs of a network for targets such as y: a number for each entry of a row,
    two if the network gives the noise, or a number for each class.
    """
    kind, inner = kind_of(likelihood), unweighted(likelihood)
    if kind == "classes" and classes is not None:
        return classes
    return y[0].numel() * (2 if getattr(inner, "noise", None) == "network" else 1)


def targets_of(name: str, ys: Mapping[str, Tensor], likelihood: Likelihood) -> Targets:
    """The targets as the likelihood takes them. Real ones are standardised, column by column, with
    the training rows; all others keep their values.

    Raises:
        DataError: a target is missing where it must not be, or outside the support.
    """
    kind = kind_of(likelihood)
    if kind in ("classes", "grades"):
        return _labels(name, ys, likelihood, kind)
    missing = may_miss(likelihood)
    for part, y in ys.items():
        _check_support(name, part, y, (y.isnan() & missing) | _supported(kind, y), kind)
    if kind == "reals":
        return _standardised(name, ys, likelihood)
    own = kind == "own" and not ys["train"].is_floating_point()
    return Targets({part: y if own else y.float() for part, y in ys.items()}, likelihood)


def _labels(name: str, ys: Mapping[str, Tensor], likelihood: Likelihood, kind: Kind) -> Targets:
    """Classes or grades as whole numbers; a missing one is the label that is ignored."""
    inner, found = unweighted(likelihood), dict(ys)
    ignored = getattr(inner, "ignore_index", None)
    if ignored is not None:
        found = {part: y.where(~y.isnan(), ignored) for part, y in ys.items()}
    known = found["train"][(found["train"] != ignored) & ~found["train"].isnan()]
    if not known.numel():
        raise DataError(f"{name}: expected targets in the training rows, got none")
    classes = getattr(inner, "classes", None) or max(int(known.max()) + 1, 2)
    for part, y in found.items():
        fits = (y == ignored) | ((y >= 0) & (y < classes) & (y == y.round()))
        _check_support(name, part, y, fits, kind, classes)
    return Targets({part: y.long() for part, y in found.items()}, likelihood, classes)


def _supported(kind: Kind, y: Tensor) -> Tensor:
    if kind == "bits":
        return (y == 0) | (y == 1)
    if kind == "counts":
        return (y >= 0) & (y == y.round()) & (y <= _MOST_COUNT)
    return y.isfinite()


_EXPECTED = {
    "classes": "labels from 0 to {}, the largest training label",
    "grades": "grades from 0 to {}",
    "bits": "0 or 1",
    "counts": f"whole numbers from 0 to {_MOST_COUNT:,}",
    "reals": "finite numbers",
    "own": "finite numbers",
}


def _check_support(
    name: str, part: str, y: Tensor, fits: Tensor, kind: Kind, classes: int = 0
) -> None:
    """Raises DataError unless all targets of a part are in the support."""
    if bool(fits.all()):
        return
    place = (~fits).nonzero()[0]
    value = y[tuple(place)].item()
    missing = value != value
    mend = (
        "leave such rows out, or give the likelihood missing=ignore"
        if missing
        else "choose another likelihood, or mend the target"
    )
    raise DataError(
        f"{name}: expected {_EXPECTED[kind].format(classes - 1)}, got"
        f" {'none' if missing else f'{value:g}'} in {PARTS[part]} row {int(place[0])}; {mend}"
    )


def _standardised(name: str, ys: Mapping[str, Tensor], likelihood: Likelihood) -> Targets:
    """Real targets with the mean and scale of the training rows taken off, float32; of several
    targets each has its own. A noise that the likelihood has in the units of y is scaled with them.
    """
    train = ys["train"].double()
    mean = train.nanmean(0)
    scale = (train - mean).square().nanmean(0).sqrt()
    constant = ~(scale > 1e-12 * mean.abs())
    if bool(constant.any()):
        column = f" {int(constant.flatten().nonzero()[0])}" if constant.ndim else ""
        raise DataError(
            f"{name}: target{column} is constant or missing in the training rows; there is nothing"
            " to predict"
        )
    made = {part: ((y - mean) / scale).float() for part, y in ys.items()}
    inner = unweighted(likelihood)
    units = {
        option: value
        for option in ("noise", "noise_scale")
        if isinstance(value := getattr(inner, option, None), (int, float))
    }
    if mean.ndim:
        if units:
            raise DataError(
                f"{name}: expected {' and '.join(units)} without a number for several targets, each"
                " of which is standardised by itself; leave the number out, or take noise='per"
                " output'"
            )
        return Targets(made, likelihood, None, mean.float(), scale.float())
    if units:
        inner = replace(inner, **{name: value / float(scale) for name, value in units.items()})
    if isinstance(likelihood, Weighted):
        inner = Weighted(inner, likelihood.weights)
    return Targets(made, inner, None, float(mean), float(scale))
