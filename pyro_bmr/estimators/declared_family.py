"""The family that the user declares, by name or as a likelihood of the library, and the family
that is fitted.

Owns `declared`, `number_family` and `class_family`. Next: `generalised_subsets.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from pyro_bmr import likelihoods
from pyro_bmr.data.table_encoding import TableError, refused
from pyro_bmr.estimators.class_families import Bernoulli, Categorical, Ordinal, equal_gaps
from pyro_bmr.estimators.columns import contrasts
from pyro_bmr.estimators.count_families import NegativeBinomial, Poisson
from pyro_bmr.estimators.families import ClassFamily, NumberFamily
from pyro_bmr.estimators.real_families import Normal, StudentT

Kinds = Mapping[str, tuple[type, tuple[str, ...]]]
NUMBERS: Kinds = {
    "normal": (likelihoods.Normal, ("noise",)),
    "student-t": (likelihoods.StudentT, ("df", "noise")),
    "poisson": (likelihoods.Poisson, ("exposure",)),
    "negative-binomial": (likelihoods.NegativeBinomial, ("concentration", "exposure")),
}
"""Name → the likelihood of the library, and the arguments of it that an estimator takes."""
CLASSES: Kinds = {
    "categorical": (likelihoods.Categorical, ()),
    "bernoulli": (likelihoods.Bernoulli, ()),
    "ordinal": (likelihoods.Ordinal, ("classes",)),
}
COUNTS = ("poisson", "negative-binomial")


def declared(family: Any, kinds: Kinds) -> tuple[str, Any]:
    """The name of a family, and its likelihood if it was given as one."""
    if isinstance(family, str) and family in kinds:
        return family, None
    for name, (kind, arguments) in kinds.items():
        if type(family) is kind:
            for each in fields(kind):
                value = getattr(family, each.name)
                if each.name not in arguments and value != each.default:
                    takes = " and ".join(arguments) or "no arguments"
                    raise TableError(
                        f"family={kind.__name__}({each.name}={value!r}): expected {takes} alone in"
                        " an estimator; leave it out"
                    )
            return name, family
    names = ", ".join(kinds)
    kinds_ = ", ".join(f"bmr.likelihoods.{kind.__name__}" for kind, _ in kinds.values())
    raise refused("family", f"one of {names}, or a likelihood, one of {kinds_}", family)


def number_family(name: str, likelihood: Any, y: Any, scale: float) -> NumberFamily | None:
    """What is fitted to numbers that were divided by `scale`; None for a normal distribution whose
    noise is inferred.
    """
    noise: Any = getattr(likelihood, "noise", "learned")
    if noise in ("network", "per output"):
        raise TableError(
            f"family=bmr.Normal(noise={noise!r}): expected a number or 'learned'; the noise of an"
            " estimator is the same for all rows"
        )
    if name == "normal":
        return None if noise == "learned" else Normal((noise / scale) ** 2)
    if name == "student-t":
        df: Any = getattr(likelihood, "df", "learned")
        given = {"scale": noise, "df": df}
        learned = tuple(key for key, value in given.items() if value == "learned")
        return StudentT(
            1.0 if noise == "learned" else noise / scale, 10.0 if df == "learned" else df, learned
        )
    if not bool(((y >= 0) & (y == np.floor(y))).all()):
        raise TableError(
            f"y: expected counts 0, 1, 2, … for family={name!r}, got other numbers; take"
            " family='normal'"
        )
    if not y.any():
        raise TableError(
            f"y: expected a count above 0 for family={name!r}, got zeros alone, which say nothing"
            " of their logarithm"
        )
    if name == "poisson":
        return Poisson()
    concentration = getattr(likelihood, "concentration", "learned")
    if concentration == "learned":
        return NegativeBinomial()
    return NegativeBinomial(float(concentration), learned=False)


def class_family(name: str, likelihood: Any, count: int) -> ClassFamily:
    """What is fitted to `count` classes; two need no order."""
    expected = getattr(likelihood, "classes", count)
    if expected != count:
        raise TableError(f"y: expected {expected} classes for family={likelihood!r}, got {count}")
    if name == "bernoulli" and count != 2:
        raise TableError(
            f"y: expected 2 classes for family={name!r}, got {count}; take family='categorical' or"
            " 'ordinal'"
        )
    if count == 2:
        return Bernoulli()
    return Ordinal(equal_gaps(count)) if name == "ordinal" else Categorical(contrasts(count))


def exposure_of(likelihood: Any) -> int | str | None:
    """The column with the exposure of each row, of a likelihood of counts."""
    found: int | str | None = getattr(likelihood, "exposure", None)
    return found
