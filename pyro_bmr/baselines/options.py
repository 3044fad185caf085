"""The options of a method by name: their ranges, and what is refused of them.

Owns `Budget`, what all baselines are given, `options_of`, and `check_rules` with its rules. Next:
`targets.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Protocol, TypeVar

from pyro_bmr.checks import is_whole
from pyro_bmr.errors import ModelError, OptionError, described


class Ruled(Protocol):
    """Options with a range each."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        """Option → whether its value is in its range, and that range."""


def check_rules(options: Ruled) -> None:
    """Raises a ModelError that names each option out of its range."""
    broken = [
        f"{name}: expected {rule}, got {described(getattr(options, name))}"
        for name, (good, rule) in options.rules().items()
        if not good
    ]
    if broken:
        raise ModelError("; ".join(broken))


def is_between(value: Any, low: float, high: float) -> bool:
    """Whether an option is a number in low … high."""
    return isinstance(value, Real) and not isinstance(value, bool) and low <= float(value) <= high


def is_positive(value: Any) -> bool:
    """Whether an option is a finite number above 0."""
    return is_between(value, 0, math.inf) and 0 < value < math.inf


@dataclass(frozen=True)
class Budget:
    """What every baseline is given: `epochs` over the training rows in mini-batches of
    `batch_size`, Adam from `learning_rate` down a cosine to 0, with `weight_decay` as its L2
    penalty (per row, as torch has it: ½ weight_decay ‖w‖²).
    """

    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_rules(self)

    def rules(self) -> dict[str, tuple[bool, str]]:
        """Option → whether its value is in its range, and that range."""
        return {
            "epochs": (is_whole(self.epochs, 1), "a whole number >= 1"),
            "batch_size": (is_whole(self.batch_size, 1), "a whole number >= 1"),
            "learning_rate": (is_positive(self.learning_rate), "a finite number > 0"),
            "weight_decay": (
                self.weight_decay == 0 or is_positive(self.weight_decay),
                "a finite number >= 0",
            ),
        }


Options = TypeVar("Options", bound=Budget)


def options_of(kind: type[Options], method: str, given: Mapping[str, Any]) -> Options:
    """The options of a method from their names.

    Raises:
        OptionError: the method has no such option.
        ModelError: a value is out of its range.
    """
    names = [f.name for f in fields(kind)]
    if unknown := set(given) - set(names):
        raise OptionError(method, unknown, names)
    return kind(**given)
