"""How a network's output meets the data: `Categorical` for classes, `Normal` for real targets with a learned noise.

A likelihood owns the plate over the data, and with it the number of rows N. Inside `fit` the N of the data set is supplied; a
hand-written SVI loop over mini-batches gives it as `size`, so that nobody ever scales a KL term. Next: `networks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_bmr.errors import DataError, ModelError

OBSERVED = "y"  # the name of the observed site


class Likelihood(Protocol):
    """What `BayesianNetwork` asks of a likelihood."""

    def observe(self, output: Tensor, y: Tensor | None) -> Tensor:
        """The observed site `y`, of one row per row of `output`; with y None, a draw."""
        ...


def data_plate(rows: int, size: int | None, device: torch.device) -> pyro.plate:
    """The plate "data" over a batch of `rows`; with `size` given, log densities are scaled by size/rows."""
    if size is None:
        return pyro.plate("data", rows, dim=-1)
    return pyro.plate("data", size, subsample=torch.arange(rows, device=device), dim=-1)


def _check_output(name: str, output: Any, wanted: str) -> None:
    if not isinstance(output, Tensor) or output.is_complex():
        got = output.dtype if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise DataError(f"{name}: the network must return one tensor of real numbers, {wanted}, got {got}; a likelihood of your own, with observe, may take it")


def _check_target(output: Tensor, y: Tensor | None) -> None:
    if y is not None and y.shape != output.shape[:1]:
        raise DataError(f"y has shape {tuple(y.shape)}, the network returned {output.shape[0]} rows; y must have shape ({output.shape[0]},)")


@dataclass(frozen=True)
class Categorical:
    """y ~ Categorical(softmax(output)): `output` is (rows, classes), `y` integers in 0 … classes − 1."""

    size: int | None = None

    def observe(self, output: Tensor, y: Tensor | None) -> Tensor:
        _check_output("Categorical", output, "(rows, classes)")
        if output.ndim != 2:
            mend = "; for a class at each position, make positions rows, or give a likelihood of your own, with observe" if output.ndim > 2 else ""
            raise DataError(f"Categorical: the network must return (rows, classes), got shape {tuple(output.shape)}{mend}")
        _check_target(output, y)
        with data_plate(output.shape[0], self.size, output.device):
            return pyro.sample(OBSERVED, dist.Categorical(logits=output, validate_args=False), obs=y)

    def log_prob(self, output: Tensor, y: Tensor) -> Tensor:
        """The log density of the batch, summed over its rows, nats: that of the site of `observe`, without the site."""
        return -torch.nn.functional.cross_entropy(output, y.long(), reduction="sum")


@dataclass(frozen=True)
class Normal:
    """y ~ N(output, noise²) with one noise scale for all rows, the site `noise` ~ HalfNormal(`noise_scale`), inferred with the weights.

    `output` is (rows,) or (rows, 1) and `y` (rows,), or both are (rows, ...) of one shape, such as several targets, a forecast or an image: independent given
    the weights, of one noise scale. `noise_scale` is in the units of y: the default 1 suits a standardised target."""

    noise_scale: float = 1.0
    size: int | None = None

    def observe(self, output: Tensor, y: Tensor | None) -> Tensor:
        _check_output("Normal", output, "one row for each row of x")
        if output.ndim == 0:
            raise DataError("Normal: the network must return (rows,) or (rows, 1), got a single number")
        if output.ndim == 2 and output.shape[1] == 1:
            output = output[:, 0]
        if output.ndim > 1 and y is not None and y.shape != output.shape:
            shapes = f"got shape {tuple(output.shape)} and y of shape {tuple(y.shape)}"
            raise DataError(f"Normal: the network must return (rows,) or (rows, 1), or, for several numbers a row, the shape of y; {shapes}")
        if output.ndim < 2:
            _check_target(output, y)
        noise = pyro.sample("noise", dist.HalfNormal(output.new_tensor(self.noise_scale)))
        with data_plate(output.shape[0], self.size, output.device):
            return pyro.sample(OBSERVED, dist.Normal(output, noise).to_event(output.ndim - 1), obs=y)


class WholeData(Messenger):
    """Scales the observed sites of a batch of `rows` rows up to the N = `size` rows of the data, unless their plate already does."""

    def __init__(self, size: int, rows: int) -> None:
        super().__init__()
        self.size, self.rows = size, rows

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] or msg["infer"].get("_deterministic"):
            return
        rows = self.rows
        frames = [f for f in msg["cond_indep_stack"] if f.vectorized]
        plate = next((f for f in frames if f.size == rows), None)
        if plate is None and frames:
            sizes = ", ".join(f"'{f.name}' of {f.size}" for f in frames)
            raise ModelError(
                f"observed site '{msg['name']}': it stands in plate {sizes}, none with the {rows} rows of the batch; put it in pyro.plate(\"data\", len(x))"
            )
        counted = rows if plate is None or plate.full_size is None else plate.full_size
        if counted not in (rows, self.size):
            name = plate.name if plate else ""
            raise ModelError(f"observed site '{msg['name']}': its plate '{name}' has {counted} rows, the data have {self.size}; give it the size of the data")
        if counted != self.size:
            msg["scale"] = msg["scale"] * (self.size / rows)
