"""What is said of a program that does not run on rows of the data, or observes none of them: the
rows, the error of the program, and its mend.

Owns `SitesReached`, `does_not_run`, `observes_nothing` and `of_another_dtype`. Next:
`program_run.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn

from pyro_bmr.data.inputs import described, parts_of
from pyro_bmr.errors import FitError, first_line
from pyro_bmr.fitting.arguments import PROGRAM, Program
from pyro_bmr.fitting.rows import Batch
from pyro_bmr.guides.latent_sites import base_distribution

_MOST = 5  # sites that a message names


class SitesReached(Messenger):
    """Records which sites a program reaches before its error: `names`, and of each plate the size
    and the number of rows that it takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.plates: dict[str, tuple[int, int]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            size, taken = msg["fn"].size, msg["fn"].subsample_size
            self.plates[msg["name"]] = size, size if taken is None else taken
        else:
            self.names.append(msg["name"])


def does_not_run(
    program: Program, batch: Batch, error: BaseException, reached: SitesReached
) -> FitError:
    """The error of a program that raises `error` on a batch."""
    shapes = " and ".join(
        f"{name} of {described(part)}" for name, part in zip("xy", batch, strict=True)
    )
    mends = (
        PROGRAM if _is_plain(program) and not reached.names else "",
        _of_arguments(program, batch, error),
        _of_plates(batch, error, reached),
    )
    mend = next((f"; {words}" for words in mends if words), "")
    return FitError(
        f"the program does not run as program(x, y) on {shapes}: {first_line(error)}{mend}"
    )


def observes_nothing(program: Program, batch: Batch, latent: Mapping[str, Any]) -> FitError:
    """The error of a program none of whose sites is observed; `latent`: site → message."""
    if not latent:
        mend = PROGRAM if _is_plain(program) else "write it as a function with pyro.sample sites"
        return FitError(f"the program has no latent site and no observed site; {mend}")
    rows = len(batch[1])
    for name, msg in latent.items():
        plate = next((f.name for f in msg["cond_indep_stack"] if f.size == rows), None)
        if plate is not None:
            return FitError(
                f"site '{name}' has an entry per row in plate '{plate}' and is latent, and no site"
                f" of the program is observed; did you forget obs=y, as in"
                f" pyro.sample('{name}', ..., obs=y)?"
            )
    more = f" and {len(latent) - _MOST} more" if len(latent) > _MOST else ""
    return FitError(
        "the program has no observed site, so the data would not change its latent"
        f" {', '.join(map(repr, list(latent)[:_MOST]))}{more}; did you forget obs=y, as in"
        " pyro.sample(name, likelihood, obs=y)? A log density of your own is a pyro.factor"
    )


def of_another_dtype(name: str, msg: Any, error: BaseException) -> FitError | None:
    """The error of an observed site that has no log density of its value, but has one of the same
    numbers in another dtype; None if that is not so.
    """
    fn, value = msg["fn"], msg["value"]
    kind = type(base_distribution(fn)).__name__
    for dtype, words in ((torch.get_default_dtype(), "y.float()"), (torch.int64, "y.long()")):
        if isinstance(value, Tensor) and value.dtype != dtype and _takes(fn, value, dtype):
            return FitError(
                f"observed site '{name}': {kind} has no log density of {value.dtype} numbers"
                f" ({first_line(error)}); write obs={words} in the program, or give {words}"
            )
    return None


def _takes(fn: Any, value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a distribution has a log density of a value in another dtype that has its numbers."""
    other = value.to(dtype)
    if not bool((other == value).all()):
        return False
    try:
        fn.log_prob(other)
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def _is_plain(program: Program) -> bool:
    return isinstance(program, nn.Module) and not isinstance(program, PyroModule)


def _of_arguments(program: Program, batch: Batch, error: BaseException) -> str:
    """The mend of a program that expects other arguments; empty if it does not seem to."""
    x, words = batch[0], str(error)
    least, most = _positional(program)
    if not isinstance(x, Tensor):
        kind = type(x).__name__
        if most > 2 or kind in words:
            names = ", ".join(parts_of(x, "xs"))
            return (
                f"x arrives as one argument, a {kind} of {len(x)}: write program(xs, y=None), and"
                f" take {names}"
            )
    if not least <= 2 <= most:
        return (
            "it is called with two arguments: write program(x, y=None); several inputs are one x, a"
            " tuple"
        )
    return ""


def _positional(program: Program) -> tuple[int, float]:
    """The least and the largest number of arguments by position that a program takes."""
    try:
        parameters = inspect.signature(getattr(program, "forward", program)).parameters.values()
    except (TypeError, ValueError):
        return 0, 2
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in named)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return least, 2  # any number; more than two are not what it expects
    return least, len(named)


def _of_plates(batch: Batch, error: BaseException, reached: SitesReached) -> str:
    """The mend of a program whose plate has other rows than its batch; empty if none has."""
    rows, words = len(batch[1]), first_line(error)
    beyond = isinstance(error, IndexError) and "out of bounds" in words
    for name, (size, taken) in reached.plates.items():
        of_plate = f"plate('{name}')" in words and f" {taken} vs {rows}" in words
        if size != rows and (of_plate or (beyond and f"with size {rows}" in words)):
            some = f", of which it draws {taken}" if taken != size else ""
            return (
                f"plate '{name}' has {size} rows{some}, and the program was given {rows}: the rows"
                f' that come are the batch already; write pyro.plate("{name}", len(x)), and take'
                " all rows of x and y"
            )
    return ""
