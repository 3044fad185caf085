"""The likelihoods by the names that the command line and study files use.

Owns `LIKELIHOODS`, `likelihood_from_name` and `as_likelihood`. Next: `support.py`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pyro_bmr.checks import check_arguments
from pyro_bmr.errors import ModelError
from pyro_bmr.likelihoods.bernoulli import Bernoulli
from pyro_bmr.likelihoods.categorical import Categorical
from pyro_bmr.likelihoods.likelihood import Likelihood
from pyro_bmr.likelihoods.negative_binomial import NegativeBinomial
from pyro_bmr.likelihoods.normal import Normal
from pyro_bmr.likelihoods.ordinal import Ordinal
from pyro_bmr.likelihoods.poisson import Poisson
from pyro_bmr.likelihoods.student_t import StudentT
from pyro_bmr.likelihoods.weighted import Weighted

LIKELIHOODS: dict[str, type] = {
    "normal": Normal,
    "student-t": StudentT,
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "ordinal": Ordinal,
    "poisson": Poisson,
    "negative-binomial": NegativeBinomial,
}
NOT_OBSERVED = -100
"""The label of a missing class, as in torch's cross entropy."""
_WEIGHTS, _NOT_IN_WORDS = "weights", ("size", "weight")


def as_likelihood(likelihood: str | Likelihood | None, classes: int | None) -> Likelihood | None:
    """A likelihood that may be given by its name; with `classes` for grades whose number it does
    not have.

    Raises:
        ModelError: it is no likelihood.
    """
    if isinstance(likelihood, str):
        return likelihood_from_name(likelihood, classes)
    ok = likelihood is None or (hasattr(likelihood, "observe") and not isinstance(likelihood, type))
    check_arguments("load", ok, "a name or a likelihood", likelihood=likelihood)
    return likelihood


def likelihood_from_name(name: str, classes: int | None = None) -> Likelihood:
    """A likelihood by its name and, after a colon, its options: ``poisson:exposure=hours``,
    ``normal:noise=network``, ``categorical:missing=ignore,weights=w``.

    The options are the arguments of the class, and ``weights``, the column of the weights of rows
    (`Weighted`). ``missing=ignore`` of classes and grades stands for ``ignore_index=-100``.

    Args:
        classes: how many grades there are, if the name does not say so.

    Raises:
        ModelError: there is no such likelihood, option or value.
    """
    family, _, words = name.partition(":")
    if family not in LIKELIHOODS:
        raise ModelError(
            f"no likelihood '{family}'; the likelihoods are: {', '.join(LIKELIHOODS)}, with options"
            " after a colon, as in poisson:exposure=hours"
        )
    kind = LIKELIHOODS[family]
    options = dict(_option(kind, name, word) for word in words.split(",") if word)
    weights = options.pop(_WEIGHTS, None)
    if kind in (Categorical, Ordinal) and options.pop("missing", "refuse") == "ignore":
        options.setdefault("ignore_index", NOT_OBSERVED)
    if kind is Ordinal and classes is not None:
        options.setdefault("classes", classes)
    if kind is Ordinal and "classes" not in options:
        raise ModelError(
            f"likelihood '{name}': expected the number of grades, as ordinal:classes=4"
        )
    found: Any = kind(**options)
    return found if weights is None else Weighted(found, weights)  # type: ignore[return-value]


def _option(kind: type, name: str, word: str) -> tuple[str, Any]:
    """The option and value of ``option=value``."""
    option, _, text = (part.strip() for part in word.partition("="))
    known = {f.name for f in fields(kind) if f.name not in _NOT_IN_WORDS} | {_WEIGHTS, "missing"}
    if option not in known or not text:
        raise ModelError(
            f"likelihood '{name}': expected options as option=value, with an option of"
            f" {', '.join(sorted(known))}, got '{word}'"
        )
    for number in (int, float):
        try:
            return option, number(text)
        except ValueError:
            continue
    return option, text
