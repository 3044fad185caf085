"""One run of a program on few rows: its latent values, and what the observed sites have there.

Owns `ProgramRun`, `run_on`, `run_of` and `running`. Next: `program.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_bmr.errors import CANNOT_RUN
from pyro_bmr.fitting.arguments import Program
from pyro_bmr.fitting.program_error import SitesReached, does_not_run, of_another_dtype
from pyro_bmr.fitting.rows import Batch
from pyro_bmr.isolation import seed_generators
from pyro_bmr.tracing import Values


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
    with running(program, batch), torch.random.fork_rng():
        seed_generators(seed)
        with Values(values or {}) as run:
            program(*batch)
        return run_of(run)


@contextmanager
def running(program: Program, batch: Batch) -> Iterator[None]:
    """Within it nothing is trained, and an error of the program names the rows that it was
    given.
    """
    with torch.no_grad(), pyro.get_param_store().scope(), SitesReached() as reached:
        try:
            yield
        except CANNOT_RUN as error:
            raise does_not_run(program, batch, error, reached) from error


def run_of(run: Values) -> ProgramRun:
    """What the trace `run` of a program says."""
    drawn = {name: msg for name, msg in run.observed.items() if not msg["is_observed"]}
    seen = {
        name: _log_density(name, msg) for name, msg in run.observed.items() if msg["is_observed"]
    }
    latent = {name: msg["value"].detach() for name, msg in {**run.latent, **drawn}.items()}
    return ProgramRun(
        latent,
        {name: (float(log_p.sum()), float(log_p.abs().sum())) for name, log_p in seen.items()},
    )


def _log_density(name: str, msg: Any) -> Tensor:
    """log p of each entry of an observed site.

    Raises:
        FitError: its distribution takes the numbers in another dtype alone.
    """
    try:
        log_p: Tensor = msg["fn"].log_prob(msg["value"])
    except CANNOT_RUN as error:
        dtype_error = of_another_dtype(name, msg, error)
        if dtype_error is None:
            raise
        raise dtype_error from error
    return log_p


def shape_in(run: ProgramRun, name: str) -> str:
    """The shape of a latent site in words; empty where the run does not have the site."""
    return f"shape {tuple(run.latent[name].shape)}" if name in run.latent else ""


def equal(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two log densities with their sizes are equal up to rounding, for which the sizes of
    the terms give the scale. What is not finite counts as equal: it says nothing.
    """
    difference, size = one[0] - other[0], max(one[1], other[1])
    return not math.isfinite(difference) or abs(difference) <= 1e-3 * size
