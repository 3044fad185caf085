"""The likelihood of class labels."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bmr.errors import DataError
from pyro_bmr.likelihoods.likelihood import OBSERVED, check_output, check_target, data_plate


@dataclass(frozen=True)
class Categorical:
    """y ~ Categorical(softmax(output)): `output` is (rows, classes), `y` integers in 0 … classes −
    1.
    """

    size: int | None = None

    def observe(self, output: Tensor, y: Tensor | None) -> Tensor:
        check_output("Categorical", output, "(rows, classes)")
        if output.ndim != 2:
            mend = (
                "; for a class at each position, make the positions rows, or write a likelihood of"
                " your own, with observe"
                if output.ndim > 2
                else ""
            )
            raise DataError(
                "Categorical: expected an output of shape (rows, classes) from the network, got"
                f" shape {tuple(output.shape)}{mend}"
            )
        check_target(output, y)
        with data_plate(output.shape[0], self.size, output.device):
            return pyro.sample(
                OBSERVED, dist.Categorical(logits=output, validate_args=False), obs=y
            )

    def log_prob(self, output: Tensor, y: Tensor) -> Tensor:
        """The log density of the observed site, summed over the rows of the batch, nats."""
        return -torch.nn.functional.cross_entropy(output, y.long(), reduction="sum")
