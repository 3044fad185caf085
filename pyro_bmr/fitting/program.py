"""What a fit finds out about its program before the first step: that it runs, which sites have
entries per row, and whether its rows may be mixed.

Owns `latents_of` and its checks. Next: `tempered_noise.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bmr.data.batch import first_rows, rows_at
from pyro_bmr.errors import DataError, FitError, PyroBMRError, warn
from pyro_bmr.fitting.arguments import Program
from pyro_bmr.fitting.program_error import observes_nothing
from pyro_bmr.fitting.program_run import ProgramRun, equal, run_of, run_on, running, shape_in
from pyro_bmr.fitting.rows import Batch, LoaderRows, Rows
from pyro_bmr.guides.latent_sites import base_distribution
from pyro_bmr.likelihoods.ignored import Ignoring
from pyro_bmr.likelihoods.support import check_observed, is_target
from pyro_bmr.tracing import Values

_EXAMPLE = 8  # rows on which a program is tried


def latents_of(program: Program, rows: Rows | LoaderRows) -> tuple[int, dict[str, Tensor]]:
    """On how many of the first rows the guide is made, and the latent sites there, after all checks
    of the program.

    Raises:
        FitError, DataError: as the checks below.
    """
    batch, batches = rows.sizes[0], len(rows.sizes) > 1
    example, found = _tried(program, rows.first, rows.targets(), batch)
    if rows.in_memory:
        _check_informed(program, example, rows.targets())
    if not rows.in_memory:
        rows.checks.check_target = _target_check(program, example)
        rows.checks.try_on = lambda batch: check_latents(program, batch, found)
        rows.checks.check_target(rows.targets())
    count, drawn, per_row = rows_of_guide(program, rows, found, len(example[1]))
    if per_row and not rows.in_memory:
        raise FitError(
            f"site '{per_row}' has entries per row, which needs all rows in memory and in order;"
            " give x and y as tensors"
        )
    if rows.held_out is not None:
        held = rows.held_out.first
        _tried(program, partial(first_rows, held), held[1], len(held[1]))
        if per_row:
            raise FitError(
                f"validation: site '{per_row}' has entries per row, which held-out rows have not;"
                " fit without validation"
            )
    if batches or rows.split:
        check_rows_add_up(program, example, found, batches=batches, shuffled=rows.shuffled)
    return count, drawn.latent


def _tried(
    program: Program, first: Callable[[int], Batch], y: Tensor, batch: int
) -> tuple[Batch, ProgramRun]:
    """The first few rows and a run on them; `y` are all targets that are known. Where the program
    needs more rows, as with a matrix of its own between all rows, they are those of the first
    batch.
    """
    example = first(_EXAMPLE)
    try:
        return example, check_program(program, example, y)
    except FitError as error:
        example = first(batch)
        with suppress(FitError):
            if batch > _EXAMPLE:
                return example, check_program(program, example, y)
        raise error


def check_program(program: Program, example: Batch, y: Tensor) -> ProgramRun:
    """A run of the program on a few rows: no pyro.param, y in the shape of the observed site, and
    every y in its support, such as 0 … classes − 1.

    Raises:
        FitError: the program does not run, observes no site, or has a pyro.param outside a
            module.
        DataError: y has another shape, or is outside the support.
    """
    with running(program, example), Values({}) as run:
        trace = poutine.trace(program).get_trace(*example)
    params = [name for name, site in trace.nodes.items() if site["type"] == "param"]
    if params and not isinstance(program, nn.Module):
        raise FitError(
            f"pyro.param '{params[0]}' would not be trained; make it a pyro.sample site or an"
            " nn.Parameter of a module, or fit with Pyro's SVI and use Posterior.from_param_store"
        )
    if not any(msg["is_observed"] for msg in run.observed.values()):
        raise observes_nothing(program, example, run.observed)
    for name, msg in run.observed.items():
        if is_target(msg["value"], example[1]):
            check_observed(name, msg["fn"], example[1], y)
    with running(program, example):
        return run_of(run)


def _target_check(program: Program, example: Batch) -> Callable[[Tensor], None]:
    """A function that raises DataError for targets outside the support of their observed site."""
    with running(program, example), Values({}) as run:
        program(*example)
    sites = [
        (name, m["fn"]) for name, m in run.observed.items() if is_target(m["value"], example[1])
    ]

    def check(y: Tensor) -> None:
        for name, fn in sites:
            with suppress(RuntimeError):  # a support that differs between the rows
                check_observed(name, fn, example[1], y)

    return check


def _check_informed(program: Program, example: Batch, y: Tensor) -> None:
    """Raises DataError if no target is observed, and warns if a learned noise has nothing to tell
    it from zero.
    """
    with running(program, example), Values({}) as run:
        program(*example)
    for name, msg in run.observed.items():
        fn = base_distribution(msg["fn"])
        is_y = is_target(msg["value"], example[1])
        if is_y and isinstance(fn, Ignoring) and bool(fn.marked(y).all()):
            raise DataError(
                f"y: expected at least one target of site '{name}' that is observed, got"
                f" {y.numel()} that are missing"
            )
    noise = "noise" in getattr(getattr(program, "likelihood", None), "inferred", ())
    if noise and len(y) > 1 and bool((y == y[:1]).all()):
        warn(
            f"y is the same in all {len(y)} rows: there is nothing to predict, and the learned"
            " noise goes to 0. Leave a constant target out, or give the likelihood a noise"
        )


def check_latents(program: Program, batch: Batch, found: ProgramRun) -> None:
    """Raises FitError unless the program runs on a batch whose rows have a new shape, with the
    latent sites that it had before.
    """
    other = run_on(program, batch)
    for name in {**found.latent, **other.latent}:
        if shape_in(found, name) != shape_in(other, name):
            shapes = ", ".join(shape_in(run, name) or "not there" for run in (found, other))
            raise FitError(
                f"site '{name}': its shape depends on the shape of the rows ({shapes}); give the"
                " site a shape that no batch changes"
            )


def rows_of_guide(
    program: Program, rows: Rows | LoaderRows, found: ProgramRun, tried: int
) -> tuple[int, ProgramRun, str | None]:
    """On how many of the first rows the guide is made, a few, or all if latent sites have entries
    per row; a run on them; and the first such site.

    Args:
        found: the run on the first `tried` rows.

    Raises:
        FitError: the program runs on one number of rows alone, which not all batches need have;
            sites have entries per row, and a batch is not all of them.
    """
    size, batch = rows.size, rows.sizes[0]
    if tried == size > _EXAMPLE:  # no other number of rows is needed
        return tried, found, None
    if batch != tried:
        count = batch
    else:
        count = max(tried // 2, 1) if tried <= _EXAMPLE else min(2 * batch, size)
    other = run_on(program, rows.first(count))
    names = {**found.latent, **other.latent}
    name = next((n for n in names if shape_in(found, n) != shape_in(other, n)), None)
    if name is None:
        return tried, found, None
    if batch < size:
        shapes = ", ".join(
            f"{shape_in(run, name) or 'not there'} for {n} rows"
            for n, run in ((tried, found), (count, other))
        )
        raise FitError(
            f"site '{name}': its shape depends on the rows of the batch ({shapes}), so each batch"
            f" has latents of its own; fit all rows at once, batch_size=len(x) ({size}), or give"
            " the site a shape that no batch changes"
        )
    return size, found if tried == size else other, name


def check_rows_add_up(
    program: Program, example: Batch, found: ProgramRun, batches: bool, shuffled: bool
) -> None:
    """Whether log p of a few rows is the sum of log p of its halves, as batches need it, and does
    not depend on the order of the rows, as shuffling needs it.

    Raises:
        FitError: an observed site depends on the order of rows that are shuffled, or does not
            depend on the rows and would be counted once a batch.

    Warns:
        PyroBMRWarning: rows of one batch depend on each other.
    """
    latent, device = found.latent, example[1].device
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(example[1]), generator=generator, device="cpu").to(device)
    if len(order) < 2:
        return
    try:
        parts = [run_on(program, rows_at(example, own), latent) for own in order.tensor_split(2)]
        again = run_on(program, example, latent, seed=1)
        mixed = run_on(program, rows_at(example, order), latent)
    except PyroBMRError:  # a program that needs so many rows
        return
    for name, of_all in found.observed.items():
        if any(name not in run.observed for run in (*parts, again, mixed)):
            continue
        if not equal(again.observed[name], of_all):
            continue  # it draws random numbers of its own
        if shuffled and not equal(mixed.observed[name], of_all):
            raise FitError(
                f"observed site '{name}' depends on the order of the rows, as in a series, and they"
                " are shuffled; keep their order with shuffle=False, or fit all rows at once"
                " (batch_size=len(x)) without a random split (validation=)"
            )
        if batches:
            _check_sum(name, [run.observed[name] for run in parts], of_all, shuffled)


def _check_sum(
    name: str, halves: Sequence[tuple[float, float]], of_all: tuple[float, float], shuffled: bool
) -> None:
    """Refuses a site whose log density is the same for every batch, and warns of one whose log
    density is not the sum over its rows.
    """
    if equal((sum(half[0] for half in halves), of_all[1]), of_all):
        return
    if all(equal(half, of_all) for half in halves):
        raise FitError(
            f"observed site '{name}' does not depend on the rows, as a pyro.factor or a condition,"
            " and would be counted once a batch; fit all rows at once, batch_size=len(x), or"
            " multiply it by the part of the rows that the batch has, len(x) / N"
        )
    if shuffled:
        warn(
            f"observed site '{name}': the log density of a batch is not the sum over its rows, so a"
            " fit in batches is not one of all rows; fit them at once with batch_size=len(x),"
            " unless rows are meant to depend on each other within a batch"
        )
