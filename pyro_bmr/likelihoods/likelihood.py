"""How a network's output meets the data: `Categorical` for classes, `Normal` for real targets with
a learned noise.

A likelihood owns the plate over the data, and with it the number of rows N. Inside `fit` the N of
the data set is supplied; a hand-written SVI loop over mini-batches gives it as `size`, so that
nobody ever scales a KL term. Next: `categorical.py`.
"""

from __future__ import annotations

from typing import Any, Protocol

import pyro
import torch
from torch import Tensor

from pyro_bmr.errors import DataError

OBSERVED = "y"  # the name of the observed site


class Likelihood(Protocol):
    """What `BayesianNetwork` asks of a likelihood."""

    def observe(self, output: Tensor, y: Tensor | None) -> Tensor:
        """The observed site `y`, of one row per row of `output`; with y None, a draw."""
        ...


def data_plate(rows: int, size: int | None, device: torch.device) -> pyro.plate:
    """The plate "data" over a batch of `rows`; with `size` given, log densities are scaled by
    size/rows.
    """
    if size is None:
        return pyro.plate("data", rows, dim=-1)
    return pyro.plate("data", size, subsample=torch.arange(rows, device=device), dim=-1)


def check_output(name: str, output: Any, wanted: str) -> None:
    """Raises DataError unless the network returned one tensor of real numbers."""
    if not isinstance(output, Tensor) or output.is_complex():
        got = output.dtype if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise DataError(
            f"{name}: the network must return one tensor of real numbers, {wanted}, got {got}; a"
            " likelihood of your own, with observe, may take it"
        )


def check_target(output: Tensor, y: Tensor | None) -> None:
    """Raises DataError unless y has one entry for each row of the output."""
    if y is not None and y.shape != output.shape[:1]:
        raise DataError(
            f"y has shape {tuple(y.shape)}, the network returned {output.shape[0]} rows; y must"
            f" have shape ({output.shape[0]},)"
        )
