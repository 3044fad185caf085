"""The likelihood of real targets, with an inferred noise scale."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_bmr.errors import DataError
from pyro_bmr.likelihoods.likelihood import OBSERVED, check_output, check_target, data_plate


@dataclass(frozen=True)
class Normal:
    """y ~ N(output, noise²) with one noise scale for all rows, the site `noise` ~
    HalfNormal(`noise_scale`), inferred with the weights.

    `output` has the shape (rows,) or (rows, 1) and `y` (rows,). Or both have one shape (rows, ...),
    such as several targets, a forecast or an image; the entries are independent given the weights
    and share the noise scale. `noise_scale` is in the units of y: the default 1 suits a
    standardised target.
    """

    noise_scale: float = 1.0
    size: int | None = None

    def observe(self, output: Tensor, y: Tensor | None) -> Tensor:
        check_output("Normal", output, "one row for each row of x")
        if output.ndim == 0:
            raise DataError(
                "Normal: expected an output of shape (rows,) or (rows, 1) from the network, got a"
                " single number"
            )
        if output.ndim == 2 and output.shape[1] == 1:
            output = output[:, 0]
        if output.ndim > 1 and y is not None and y.shape != output.shape:
            raise DataError(
                "Normal: expected an output of shape (rows,) or (rows, 1) from the network, or, for"
                f" several numbers a row, the shape of y, got shape {tuple(output.shape)} and y of"
                f" shape {tuple(y.shape)}"
            )
        if output.ndim < 2:
            check_target(output, y)
        noise = pyro.sample("noise", dist.HalfNormal(output.new_tensor(self.noise_scale)))
        with data_plate(output.shape[0], self.size, output.device):
            return pyro.sample(
                OBSERVED, dist.Normal(output, noise).to_event(output.ndim - 1), obs=y
            )
