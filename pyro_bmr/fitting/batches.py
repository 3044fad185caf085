"""Batches as the program of a fit takes them: read, on its device, in its dtype, and checked.

Owns `Batches`, `like_program`, and the held-out rows, `HeldOut`. Next: `loader_rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_bmr.checks import check_rows, check_tensor
from pyro_bmr.data.batch import Batch, BatchChecks, first_rows
from pyro_bmr.data.inputs import of_each, parts_of
from pyro_bmr.data.row_sources import Held, Source, Stream, chunks
from pyro_bmr.errors import DataError, FitError
from pyro_bmr.fitting.arguments import Program
from pyro_bmr.fitting.checkpoint_file import digest
from pyro_bmr.isolation import plain, seed_generators
from pyro_bmr.likelihoods.likelihood import check_read

_EXAMPLE = 8  # rows that a checkpoint keeps
_CHUNK = 10_000  # held-out rows that are scored at once
_SEEDS = (1 << 63) - 1


class Batches:
    """Makes batches of what a data set or a loader gives, for one fit. `device`: of the program."""

    def __init__(self, program: Program, seed: int) -> None:
        self.program, self.seed = program, seed
        self.checks = BatchChecks(
            getattr(program, "missing_targets", False), getattr(program, "likelihood", None)
        )
        self.device = device_of(program)
        parts = program.modules() if isinstance(program, nn.Module) else ()
        self.has_batch_norm = any(isinstance(part, _BatchNorm) for part in parts)

    def seeded(self, epoch: int, number: int) -> None:
        """Seeds what is drawn as batch `number` of an epoch is read, such as augmentations: a
        function of (seed, epoch, number).
        """
        place = (self.seed * 1_000_003 + epoch) * 1_000_003 + number
        seed_generators((place ^ 0x2545F4914F6CDD1D) & _SEEDS)

    def batch(
        self, raw: Any, epoch: int, number: int, row_of: Callable[[int], str] = "row {}".format
    ) -> Batch:
        """The batch `number`, from 1, of an epoch, on the program's device.

        Raises:
            DataError: it is not like the others, not finite, or has targets outside the support.
        """
        where = f"batch {number} of epoch {epoch}"
        x, y = self.checks.of_tensors(raw, where)
        batch = placed(self.program, (x, y))
        if self.has_batch_norm and len(y) == 1:
            raise DataError(
                f"{where} has one row, which batch norm cannot take; make the loader with"
                " drop_last=True, or with another batch size"
            )
        self.checks.check_values(batch, where, row_of, first_epoch=epoch == 1)
        return batch


class HeldOut:
    """The rows that a fit holds out, and scores after each epoch; in memory or read in pieces.

    `first`: those on which the program is tried. `split`: whether they were a fraction of the data.
    """

    def __init__(self, source: Source, program: Program, split: bool = False) -> None:
        self.source, self.program, self.split = source, program, split
        self.checks = BatchChecks(
            getattr(program, "missing_targets", False), getattr(program, "likelihood", None)
        )
        if isinstance(source, Held):
            check_held(source.x, source.y, "the validation rows", self.checks.missing)
            check_read(self.checks.likelihood, source.x, "the validation rows")
            self.source = Held(*placed(program, (source.x, source.y)))
        if isinstance(source, Stream) and not source.again:
            raise DataError(
                f"validation: expected rows that can be read after each epoch, got {source.about};"
                " give a loader, a data set or tensors"
            )
        self.first = next(self.batches(1))

    def batches(self, rows: int = _CHUNK) -> Iterator[Batch]:
        """All of them, at most about `rows` at a time unless they are in memory."""
        read, before = not isinstance(self.source, Held), 0
        for x, y in chunks(self.source, rows, self.checks):
            batch = placed(self.program, (x, y)) if read else (x, y)
            if read:
                numbers = range(before, before + len(y))
                self.checks.check_values(
                    batch,
                    "the validation rows",
                    lambda k, numbers=numbers: f"row {numbers[k]}",  # type: ignore[misc]
                    first_epoch=True,
                )
            before += len(y)
            yield batch


def check_held(x: Any, y: Any, where: str, missing: bool = False) -> None:
    """Raises DataError unless all inputs and the targets have the same number of rows, all
    finite.
    """
    if isinstance(x, list):
        check_tensor(x, f"{where}: x")
    if isinstance(x, Tensor) or not isinstance(x, (tuple, Mapping)):
        check_rows(x, y, where, missing)
        return
    for name, part in parts_of(x).items():
        check_rows(part, y, f"{where}, {name}", missing)


def digest_of(batch: Batch) -> str:
    """What tells the first rows of a batch from others."""
    x, y = first_rows(batch, _EXAMPLE)
    return digest({**parts_of(x), "y": y})


def placed(program: Program, batch: Batch) -> Batch:
    """A batch on the device and in the dtype of the program."""
    x, y = batch
    return of_each(lambda part: like_program(program, plain(part)), x), like_program(
        program, plain(y)
    )


def device_of(program: Program) -> torch.device:
    """The device of a module's parameters; the CPU for other programs."""
    parameters = program.parameters() if isinstance(program, nn.Module) else ()
    return next((p.device for p in parameters if p.is_floating_point()), torch.device("cpu"))


def like_program(program: Program, values: Tensor) -> Tensor:
    """`values` on the device and, if floating, in the dtype of a module's parameters; other
    programs take them as they are.
    """
    if not isinstance(program, nn.Module):
        return values
    parameter = next((p for p in program.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return values
    if parameter.device.type == "meta":
        raise FitError(
            "the program's parameters are on the device 'meta' and have no values; make the network"
            " with torch.device('cpu'), or another device"
        )
    dtype = parameter.dtype if values.is_floating_point() else values.dtype
    return values.to(parameter.device, dtype)
