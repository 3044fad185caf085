"""What cannot be shrunk: the errors that say so, and what to use instead.

Owns `MASKED`, `foreign_errors` and `first_line`. Next: `untied.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyro_bmr.errors import PyroBMRError, ShrinkError

MASKED = (
    "use the masked network instead (zeros in tensors of the old shape, as `export` returns it)"
)


@contextmanager
def foreign_errors(what: str) -> Iterator[None]:
    """A context that turns errors from outside the library into a ShrinkError that names `what`."""
    try:
        yield
    except PyroBMRError:
        raise
    # An operation that the analysis has not seen before may raise anything.
    except Exception as error:
        raise ShrinkError(
            f"{what} cannot be read ({type(error).__name__}: {first_line(error)}); {MASKED}"
        ) from None


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters."""
    return str(error).strip().split("\n")[0][:200]
