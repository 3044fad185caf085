"""The errors that users can cause. Each names the argument or the site, says what was expected and
what was got, and how to mend it.

The command line prints them in one line and exits with status 2; any other error is a bug and keeps
its traceback. A result that is right but may mislead comes with a `PyroBMRWarning`. Next:
`files.py`.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import fields, is_dataclass
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LONGEST = 160  # characters of a value in a message


class PyroBMRError(Exception):
    """Base of every error that pyro_bmr raises on purpose."""


class DataError(PyroBMRError):
    """The data are missing, malformed, or do not fit the likelihood."""


class ModelError(PyroBMRError):
    """A program, prior, likelihood or guide is declared in a way that cannot be fitted."""


class OptionError(ModelError):
    """A method of a study has no such options, `unknown`; its options are `known`."""

    def __init__(self, method: str, unknown: Iterable[str], known: Iterable[str]) -> None:
        self.unknown, self.known = sorted(unknown), list(known)
        super().__init__(
            f"{method}: no option {', '.join(self.unknown)}; the options are:"
            f" {', '.join(self.known)}"
        )


class FitError(PyroBMRError):
    """A fit cannot start, or its numbers are not finite any more."""


class ReductionError(PyroBMRError):
    """A reduction has no answer for the posterior and prior it was given."""


class ShrinkError(PyroBMRError):
    """A network cannot be made smaller: its masks do not fit it, or it has an unsupported part."""


CANNOT_RUN = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)
"""The errors that a program or a network may raise on rows that it cannot take."""


def first_line(error: BaseException) -> str:
    """The first line of the message of an error, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class PyroBMRWarning(UserWarning):
    """A result is right but may mislead; the message says which figure shows it, and the mend.
    `warnings.filterwarnings` takes the class.
    """


def warn(message: str) -> None:
    """Warns with a `PyroBMRWarning` that points to the user's line that called the library, however
    many calls and decorators are in between.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, PyroBMRWarning, stacklevel=level)


def _is_inside(file: str) -> bool:
    # `_contextlib.py` has torch.no_grad
    return file.startswith((_HERE, contextlib.__file__)) or file.endswith("_contextlib.py")


def holds(rule: Callable[..., Any], *values: Any) -> bool:
    """Whether a rule about arguments is true. It is False if the rule does not apply to them, as
    0 < x to a tensor of several numbers or to a word.
    """
    try:
        return bool(rule(*values))
    except (RuntimeError, TypeError, ValueError):
        return False


def described(value: Any) -> str:
    """A value in a few words for a message: short ones as they are, tensors and arrays by dtype and
    shape, other objects by their type.

    Example:
        >>> described({"w": torch.ones(3)}), described(torch.ones(3))
        ('a dict of 1', 'a float32 tensor of shape (3,)')
    """
    words = _words(value)
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]} …"


def _words(value: Any) -> str:
    """The description of a value before it is cut to length."""
    name = type(value).__name__
    if isinstance(value, float):
        return repr(float(value))  # numpy's is a float, with a repr of its own
    if value is None or isinstance(value, (str, bytes, bool, int, complex)):
        return repr(value)
    if isinstance(value, Mapping) and all(
        isinstance(part, (str, bool, int, float, type(None))) for part in value.values()
    ):
        return repr(dict(value))
    if hasattr(value, "shape"):
        return _array_words(value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = (f"{f.name}={described(getattr(value, f.name))}" for f in fields(value) if f.repr)
        return f"{name}({', '.join(parts)})"
    if isinstance(value, (tuple, list)) and all(
        isinstance(part, (str, bool, int, float)) for part in value
    ):
        return repr(value)
    if isinstance(value, (tuple, list, Set, Mapping)):
        return f"{_one(name)} of {len(value)}"
    return f"{'the class ' * isinstance(value, type)}{getattr(value, '__qualname__', _one(name))}"


def _array_words(value: Any) -> str:
    """The dtype, kind and shape of a tensor, an array or a table."""
    name = type(value).__name__
    if type(value).__module__.startswith("torch"):
        kind = "tensor"
    else:
        kind = "array" if name == "ndarray" else name
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return _one(f"{dtype} {kind} of shape {tuple(value.shape)}".strip())


def _one(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
