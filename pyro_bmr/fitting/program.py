"""What a fit finds out about its program before the first step: that it runs, which sites have
entries per row, and whether its rows may be mixed.

Owns `latents_of` with its checks, and `make_guide`. Next: `noise.py`.
"""

from __future__ import annotations

import copy
import inspect
import math
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyro_bmr.errors import DataError, FitError, PyroBMRError, PyroBMRWarning
from pyro_bmr.fitting.arguments import PROGRAM, Program
from pyro_bmr.guides.sites import check_guide, guide_shapes
from pyro_bmr.isolation import seed_generators
from pyro_bmr.tracing import Values

FEW = 8  # rows on which a program is tried
_CANNOT_RUN = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)
_BY_SVI = (
    "train it with Pyro's SVI and read it with Posterior.from_guide, or give a guide module, such"
    " as MeanField or AutoNormal"
)
Batch = tuple[Tensor, Tensor]


class Run(NamedTuple):
    """One run of a program: its latent values, drawn from the prior unless given, and of each
    observed site Σ log p and Σ |log p| of its entries.
    """

    latent: dict[str, Tensor]
    observed: dict[str, tuple[float, float]]


def latents_of(
    program: Program,
    x: Tensor,
    y: Tensor,
    held_out: Batch | None,
    sizes: Sequence[int],
    shuffle: bool,
    split: bool,
) -> tuple[int, dict[str, Tensor]]:
    """On how many of the first rows the guide is made, and the latent sites there, after all checks
    of the program.

    Args:
        sizes: of the batches.
        shuffle: whether the rows are mixed if there are several batches.
        split: whether the held-out rows were taken out at random.

    Raises:
        FitError, DataError: as the checks below.
    """
    few, found = _tried(program, x, y, sizes[0])
    rows, drawn, per_row = rows_of_guide(program, x, y, sizes[0], found, len(few[0]))
    if held_out is not None:
        _tried(program, *held_out, len(held_out[0]))
        if per_row:
            raise FitError(
                f"validation: site '{per_row}' has entries per row, which held-out rows have not;"
                " fit without validation"
            )
    if len(sizes) > 1 or split:
        check_rows_add_up(program, few, found, batches=len(sizes) > 1, shuffled=shuffle)
    return rows, drawn.latent


def _tried(program: Program, x: Tensor, y: Tensor, batch: int) -> tuple[Batch, Run]:
    """The first few rows, or where the program needs more, as with a matrix of its own between all
    rows, those of the first batch; and a run on them.
    """
    few = (x[:FEW].clone(), y[:FEW].clone())
    try:
        return few, check_program(program, few, y)
    except FitError as error:
        few = (x[:batch].clone(), y[:batch].clone())
        with suppress(FitError):
            if batch > FEW:
                return few, check_program(program, few, y)
        raise error


def check_program(program: Program, few: Batch, y: Tensor) -> Run:
    """A run of the program on a few rows: no pyro.param, y in the shape of the observed site, and
    every y in its support, such as 0 … classes − 1.
    """
    with _running(few), Values({}) as run:
        trace = poutine.trace(program).get_trace(*few)
    params = [name for name, site in trace.nodes.items() if site["type"] == "param"]
    if params and not isinstance(program, nn.Module):
        raise FitError(
            f"pyro.param '{params[0]}' would not be trained; make it a pyro.sample site or an"
            " nn.Parameter of a module, or fit with Pyro's SVI and use Posterior.from_param_store"
        )
    for name, msg in run.observed.items():
        if msg["value"] is few[1]:
            shape = tuple(msg["fn"].shape())
            if shape and shape != tuple(few[1].shape):
                raise DataError(
                    f"y of shape {tuple(y.shape)} does not fit observed site '{name}': for"
                    f" {len(few[1])} rows the site has shape {shape}, y {tuple(few[1].shape)}; give"
                    " y that shape"
                )
            support = msg["fn"].support
            good = (
                support.check(y)
                if hasattr(support, "lower_bound")
                else torch.ones(len(y), dtype=torch.bool)
            )
            if not bool(good.all()):
                row = int((~good).nonzero()[0][0])
                raise DataError(
                    f"y is outside the support of observed site '{name}' ({support}): got"
                    f" {y[row].item()} in row {row}; number the classes from 0, or give the network"
                    " more outputs"
                )
    with _running(few):
        return _run_of(run)


def rows_of_guide(
    program: Program, x: Tensor, y: Tensor, batch: int, found: Run, few: int
) -> tuple[int, Run, str | None]:
    """On how many of the first rows the guide is made, a few, or all if latent sites have entries
    per row; a run on them; and the first such site.

    Args:
        batch: the rows of the first batch.
        found: the run on the first `few` rows.

    Raises:
        FitError: the program runs on one number of rows alone, which not all batches need have;
            sites have entries per row, and a batch is not all of them.
    """
    if few == len(x) > FEW:  # no other number of rows is needed
        return few, found, None
    rows = batch if batch != few else max(few // 2, 1) if few <= FEW else min(2 * batch, len(x))
    other = _run(program, (x[:rows].clone(), y[:rows].clone()))
    name = next(
        (n for n in {**found.latent, **other.latent} if _shape(found, n) != _shape(other, n)), None
    )
    if name is None:
        return few, found, None
    if batch < len(x):
        shapes = ", ".join(
            f"{_shape(run, name) or 'not there'} for {n} rows"
            for n, run in ((few, found), (rows, other))
        )
        raise FitError(
            f"site '{name}': its shape depends on the rows of the batch ({shapes}), so each batch"
            f" has latents of its own; fit all rows at once, batch_size=len(x) ({len(x)}), or give"
            " the site a shape that no batch changes"
        )
    return len(x), found if few == len(x) else other, name


def check_rows_add_up(
    program: Program, few: Batch, found: Run, batches: bool, shuffled: bool
) -> None:
    """Whether log p of a few rows is the sum of log p of its halves, as batches need it, and knows
    no order of the rows, as shuffling needs it.

    Raises:
        FitError: an observed site depends on the order of rows that are shuffled, or does not
            depend on the rows and would be counted once a batch.

    Warns:
        PyroBMRWarning: rows of one batch depend on each other.
    """
    order = torch.randperm(
        len(few[0]), generator=torch.Generator().manual_seed(0), device="cpu"
    ).to(few[0].device)
    if len(order) < 2:
        return
    try:
        parts = [
            _run(program, (few[0][own], few[1][own]), found.latent) for own in order.tensor_split(2)
        ]
        again, mixed = (
            _run(program, few, found.latent, seed=1),
            _run(program, (few[0][order], few[1][order]), found.latent),
        )
    except PyroBMRError:  # a program that needs so many rows
        return
    for name, whole in found.observed.items():
        if any(name not in run.observed for run in (*parts, again, mixed)) or not _equal(
            again.observed[name], whole
        ):
            continue  # it draws random numbers of its own
        halves = [run.observed[name] for run in parts]
        if shuffled and not _equal(mixed.observed[name], whole):
            raise FitError(
                f"observed site '{name}' depends on the order of the rows, as in a series, and they"
                " are shuffled; keep their order with shuffle=False, or fit all rows at once"
                " (batch_size=len(x)) without a random split (validation=)"
            )
        if not batches or _equal((sum(half[0] for half in halves), whole[1]), whole):
            continue
        if all(_equal(half, whole) for half in halves):
            raise FitError(
                f"observed site '{name}' does not depend on the rows, as a pyro.factor or a"
                " condition, and would be counted once a batch; fit all rows at once,"
                " batch_size=len(x), or multiply it by the part of the rows that the batch has,"
                " len(x) / N"
            )
        if shuffled:
            warnings.warn(
                f"observed site '{name}': the log density of a batch is not the sum over its rows,"
                " so a fit in batches is not one of all rows; fit them at once with"
                " batch_size=len(x), unless rows are meant to depend on each other within a batch",
                PyroBMRWarning,
                stacklevel=5,
            )


def make_guide(
    guide: Program, program: Program, few: Batch, latents: Mapping[str, Tensor]
) -> Program:
    """The guide that a fit trains: a copy of the module, or what the function makes of the program
    and, if it takes one, of a batch.

    Raises:
        FitError: it is a function of the rows with statements of Pyro's in it, or what comes out
            cannot be called.
        ModelError: its sites are not the latent sites of the program.
    """
    if isinstance(guide, nn.Module):
        made: Program = copy.deepcopy(guide)
    else:
        made = _made(guide, program, few)
    _name_apart(made)
    with pyro.get_param_store().scope():
        try:
            poutine.block(made)(*few)  # autoguides make their parameters at the first call
            trace = prune_subsample_sites(poutine.trace(made).get_trace(*few))
        except _CANNOT_RUN as error:
            raise FitError(
                f"the guide {_name(made)} does not run on rows of the data: {_first_line(error)}"
            ) from error
    params = [name for name, site in trace.nodes.items() if site["type"] == "param"]
    if params and not isinstance(made, nn.Module):
        raise FitError(f"pyro.param '{params[0]}' of the guide would not be trained; {_BY_SVI}")
    check_guide(guide_shapes(trace), {name: value.shape for name, value in latents.items()})
    return made


def _made(guide: Program, program: Program, few: Batch) -> Any:
    parameters = inspect.signature(guide).parameters.values()
    # MeanField(program, *batch), AutoNormal(program)
    takes_batch = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    with pyro.get_param_store().scope():
        try:
            made = guide(program, *few) if takes_batch else guide(program)
        except _CANNOT_RUN as error:
            raise FitError(
                f"guide: {_name(guide)} makes no guide of the program ({_first_line(error)}); if it"
                f" is a guide itself, {_BY_SVI}"
            ) from error
    if not callable(made):
        raise FitError(
            f"guide: {_name(guide)} makes no guide of the program, but {type(made).__name__}; if it"
            f" is a guide itself, {_BY_SVI}"
        )
    return made


def _name_apart(guide: Any) -> None:
    """Gives the parameters of a guide of Pyro's names of their own: outside a fit it looks them up
    by name in the global store, where another fit's may be.
    """
    if isinstance(guide, PyroModule):
        root = f"{guide._pyro_name}_{secrets.token_hex(4)}"
        for path, module in guide.named_modules():
            if isinstance(module, PyroModule):
                module._pyro_name = f"{root}.{path}" if path else root


def _run(
    program: Program, batch: Batch, values: Mapping[str, Tensor] | None = None, seed: int = 0
) -> Run:
    with _running(batch), torch.random.fork_rng():
        seed_generators(seed)
        with Values(values or {}) as run:
            program(*batch)
        return _run_of(run)


@contextmanager
def _running(batch: Batch) -> Iterator[None]:
    """Within it nothing is trained, and an error of the program names the rows that it was
    given.
    """
    with torch.no_grad(), pyro.get_param_store().scope():
        try:
            yield
        except _CANNOT_RUN as error:
            shapes = " and ".join(
                f"{name} of shape {tuple(t.shape)} and {t.dtype}"
                for name, t in zip("xy", batch, strict=True)
            )
            raise FitError(
                f"the program does not run as program(x, y) on {shapes}: {_first_line(error)};"
                f" {PROGRAM}"
            ) from error


def _run_of(run: Values) -> Run:
    drawn = {name: msg for name, msg in run.observed.items() if not msg["is_observed"]}
    seen = {
        name: msg["fn"].log_prob(msg["value"])
        for name, msg in run.observed.items()
        if msg["is_observed"]
    }
    latent = {name: msg["value"].detach() for name, msg in {**run.latent, **drawn}.items()}
    return Run(
        latent,
        {name: (float(log_p.sum()), float(log_p.abs().sum())) for name, log_p in seen.items()},
    )


def _shape(run: Run, name: str) -> str:
    return f"shape {tuple(run.latent[name].shape)}" if name in run.latent else ""


def _equal(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Up to rounding, which the sizes of the terms tell; what is not finite says nothing."""
    difference, size = one[0] - other[0], max(one[1], other[1])
    return not math.isfinite(difference) or abs(difference) <= 1e-3 * size


def _name(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__name__))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
