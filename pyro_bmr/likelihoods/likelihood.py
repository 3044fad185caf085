"""How a network's output meets the data: `Categorical` for classes, `Normal` for real targets with
a learned noise, and others, one file each.

A likelihood owns the plate over the data, and with it the number of rows N. Inside `fit` the N of
the data set is supplied; a hand-written SVI loop over mini-batches gives it as `size`, so that
no KL term has to be scaled. Next: `ignored.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import pyro
import torch
from torch import Tensor

from pyro_bmr.checks import check_shape
from pyro_bmr.errors import DataError, ModelError, described, holds

OBSERVED = "y"  # the name of the observed site
Missing = Literal["refuse", "ignore"]


class Likelihood(Protocol):
    """What a likelihood has for `BayesianNetwork`: the observed site, in its plate.

    It may have more. `log_prob(output, y)` is Σ log p over a batch, for a faster step. `inferred`
    has the names of its own latent sites, such as ``("noise",)``. `reads` has what it takes out of
    x (name → column of a tensor, or key of a dict); these tensors are further arguments of
    `observe` and `log_prob`, by name. `missing` is "ignore" if a target that is NaN has no density.
    """

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


def observed_rows(fn: Any, y: Tensor | None, size: int | None, device: torch.device) -> Tensor:
    """The observed site in its plate; `fn` has one axis of rows, all others are its event."""
    with data_plate(fn.batch_shape[0], size, device):
        return pyro.sample(OBSERVED, fn, obs=y)


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


def entries(name: str, output: Any, y: Tensor | None) -> Tensor:
    """The output with one number for each entry of y: of shape (rows,), if it was (rows, 1), or of
    the shape (rows, ...) of y.

    Raises:
        DataError: it has another shape, or is no tensor of real numbers.
    """
    check_output(name, output, "one row for each row of x")
    if output.ndim == 0:
        raise DataError(
            f"{name}: expected an output of shape (rows,) or (rows, 1) from the network, got a"
            " single number"
        )
    if output.ndim == 2 and output.shape[1] == 1:
        output = output[:, 0]
    if output.ndim > 1 and y is not None and y.shape != output.shape:
        raise DataError(
            f"{name}: expected an output of shape (rows,) or (rows, 1) from the network, or, for"
            f" several numbers a row, the shape of y, got shape {tuple(output.shape)} and y of"
            f" shape {tuple(y.shape)}"
        )
    if output.ndim < 2:
        check_target(output, y)
    return output


def check_missing(name: str, missing: Any) -> None:
    """Raises ModelError unless `missing` is one of the two words."""
    if missing not in ("refuse", "ignore"):
        raise ModelError(f"{name}(missing={described(missing)}): expected 'refuse' or 'ignore'")


def check_positive(name: str, *words: str, **given: Any) -> None:
    """Raises ModelError unless each of the arguments `given` is a finite number > 0, or one of the
    `words`.
    """
    for argument, value in given.items():
        if isinstance(value, str) and value in words:
            continue
        if isinstance(value, (str, bool)) or not holds(lambda v: 0 < v < float("inf"), value):
            rule = " or ".join(["a finite number > 0", *map(repr, words)])
            raise ModelError(f"{name}({argument}={described(value)}): expected {rule}")


def read_inputs(likelihood: Any, x: Any) -> tuple[Any, dict[str, Tensor]]:
    """The inputs of the network, and what the likelihood `reads` from x, by name.

    A whole number is a column of a tensor (rows, columns), or a place in a tuple; a word is a key
    of a dict. The network does not see them.

    Raises:
        DataError: x has no such column or key.
    """
    reads: Mapping[str, int | str] = getattr(likelihood, "reads", {})
    read: dict[str, Tensor] = {}
    if not reads:
        return x, read
    for name, where in reads.items():
        try:
            read[name] = x[:, int(where)] if isinstance(x, Tensor) else x[where]
        except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            shape = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise DataError(
                f"{name}={described(where)}: expected the column of a tensor x (rows, columns), or"
                f" the key of a dict x, got x of {shape}"
            ) from error
    if isinstance(x, Mapping):
        return {key: value for key, value in x.items() if key not in reads.values()}, read
    size = x.shape[1] if isinstance(x, Tensor) else len(x)
    gone = {int(where) % size for where in reads.values()}
    left = [k for k in range(size) if k not in gone]
    return (x[:, left] if isinstance(x, Tensor) else tuple(x[k] for k in left)), read


def check_read(likelihood: Any, x: Any, where: str = "x") -> None:
    """Raises DataError unless what a likelihood reads from x is in range: an exposure > 0, weights
    of rows >= 0.
    """
    for name, column in read_inputs(likelihood, x)[1].items():
        if name not in _RANGES or not isinstance(column, Tensor) or column.ndim != 1:
            continue
        rule, fits = _RANGES[name]
        good = fits(column)
        if not bool(good.all()):
            row = int((~good).nonzero()[0])
            raise DataError(
                f"{where}: {name}: expected numbers {rule}, got {float(column[row]):g} in row"
                f" {row}; leave such rows out"
            )


_RANGES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "exposure": ("> 0", lambda column: column > 0),
    "weights": (">= 0", lambda column: column >= 0),
}
