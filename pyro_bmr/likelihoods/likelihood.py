"""How a network's output meets the data: `Categorical` for classes, `Normal` for real targets with
a learned noise.

A likelihood owns the plate over the data, and with it the number of rows N. Inside `fit` the N of
the data set is supplied; a hand-written SVI loop over mini-batches gives it as `size`, so that
no KL term has to be scaled. Next: `categorical.py`.
"""

from __future__ import annotations

from typing import Any, Protocol

import pyro
import torch
from torch import Tensor

from pyro_bmr.checks import check_shape
from pyro_bmr.errors import DataError

OBSERVED = "y"  # the name of the observed site


class Likelihood(Protocol):
    """What a likelihood has for `BayesianNetwork`: the observed site, in its plate."""

    def observe(self, output: Tensor, y: Tensor | None) -> Tensor:
        """The value of the observed site `y`, one row for each row of `output`; without y, a draw
        of it.
        """
        ...


def data_plate(rows: int, size: int | None, device: torch.device) -> pyro.plate:
    """The plate "data" over a batch of `rows`; with `size` given, log densities are scaled by
    size/rows.
    """
    if size is None:
        return pyro.plate("data", rows, dim=-1)
    return pyro.plate("data", size, subsample=torch.arange(rows, device=device), dim=-1)


def check_output(name: str, output: Any, shape: str) -> None:
    """Raises DataError unless the network returned one tensor of real numbers."""
    if not isinstance(output, Tensor) or output.is_complex():
        got = output.dtype if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise DataError(
            f"{name}: expected one tensor of real numbers from the network, {shape}, got {got};"
            " write a likelihood of your own, with observe, to take it"
        )


def check_target(output: Tensor, y: Tensor | None) -> None:
    """Raises DataError unless y, if given, has one entry for each row of the output."""
    if y is not None:
        check_shape(y, "y", output.shape[:1], "one entry for each row that the network returns")
