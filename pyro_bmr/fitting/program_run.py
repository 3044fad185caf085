"""One run of a program on few rows: its latent values, and what the observed sites have there.

Owns `ProgramRun`, `run_on`, `run_of` and `running`. Next: `program.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_bmr.data.inputs import described
from pyro_bmr.errors import FitError
from pyro_bmr.fitting.arguments import PROGRAM, Program
from pyro_bmr.fitting.rows import Batch
from pyro_bmr.isolation import seed_generators
from pyro_bmr.tracing import Values

CANNOT_RUN = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)
"""The errors that a program may raise on rows that it cannot take."""


class ProgramRun(NamedTuple):
    """One run of a program: its latent values, drawn from the prior unless given, and of each
    observed site Σ log p and Σ |log p| of its entries.
    """

    latent: dict[str, Tensor]
    observed: dict[str, tuple[float, float]]


def run_on(
    program: Program, batch: Batch, values: Mapping[str, Tensor] | None = None, seed: int = 0
) -> ProgramRun:
    """A run of the program on `batch`, its latent sites at `values` where these are given; the
    random state is afterwards what it was.
    """
    with running(batch), torch.random.fork_rng():
        seed_generators(seed)
        with Values(values or {}) as run:
            program(*batch)
        return run_of(run)


@contextmanager
def running(batch: Batch) -> Iterator[None]:
    """Within it nothing is trained, and an error of the program names the rows that it was
    given.
    """
    with torch.no_grad(), pyro.get_param_store().scope():
        try:
            yield
        except CANNOT_RUN as error:
            shapes = " and ".join(
                f"{name} of {described(part)}" for name, part in zip("xy", batch, strict=True)
            )
            raise FitError(
                f"the program does not run as program(x, y) on {shapes}: {first_line(error)};"
                f" {PROGRAM}"
            ) from error


def run_of(run: Values) -> ProgramRun:
    """What the trace `run` of a program says."""
    drawn = {name: msg for name, msg in run.observed.items() if not msg["is_observed"]}
    seen = {
        name: msg["fn"].log_prob(msg["value"])
        for name, msg in run.observed.items()
        if msg["is_observed"]
    }
    latent = {name: msg["value"].detach() for name, msg in {**run.latent, **drawn}.items()}
    return ProgramRun(
        latent,
        {name: (float(log_p.sum()), float(log_p.abs().sum())) for name, log_p in seen.items()},
    )


def shape_in(run: ProgramRun, name: str) -> str:
    """The shape of a latent site in words; empty where the run does not have the site."""
    return f"shape {tuple(run.latent[name].shape)}" if name in run.latent else ""


def equal(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two log densities with their sizes are equal up to rounding, for which the sizes of
    the terms give the scale. What is not finite counts as equal: it says nothing.
    """
    difference, size = one[0] - other[0], max(one[1], other[1])
    return not math.isfinite(difference) or abs(difference) <= 1e-3 * size


def first_line(error: BaseException) -> str:
    """The first line of the message of an error, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
