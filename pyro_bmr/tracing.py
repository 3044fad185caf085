"""The latent and observed sites of a Pyro program at given values, and the log density of the
observed ones.

Owns `Values` and `likelihood_of`. Next: `guides/latent_sites.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_bmr.errors import ModelError


class Values(Messenger):
    """Sets latent sites to given values and records the message of every latent and observed site.
    Enter it outside all other handlers.

    Raises:
        ModelError: a value has another shape than its site, which would broadcast.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.latent: dict[str, Any] = {}
        self.observed: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) or msg["infer"].get("_deterministic"):
            return
        if msg["is_observed"]:
            self.observed[msg["name"]] = msg
        elif msg["name"] in self.values:
            value, shape = self.values[msg["name"]], msg["fn"].shape()
            if value.shape != shape:
                raise ModelError(
                    f"site '{msg['name']}' has shape {tuple(value.shape)} in the guide or posterior"
                    f" and {tuple(shape)} in the program with these rows; make both from one"
                    " program, and if its sites have entries per row, give it all rows of the fit"
                    " at once"
                )
            msg["value"], msg["done"] = value, True
            self.latent[msg["name"]] = msg
        else:
            self.observed[msg["name"]] = msg  # an observation without data: a prediction

    def latent_shapes(self) -> dict[str, torch.Size]:
        """Latent site → its shape in the program, those without a given value included."""
        drawn = {name: msg for name, msg in self.observed.items() if not msg["is_observed"]}
        return {name: msg["fn"].shape() for name, msg in {**self.latent, **drawn}.items()}


def likelihood_of(run: Values) -> Tensor:
    """The log density of the observed sites of a run."""
    likelihood: Tensor | float = 0.0
    for name, msg in run.observed.items():
        if not msg["is_observed"]:
            raise ModelError(
                f"site '{name}' of the program is not in the guide; make the guide from this"
                " program and batch"
            )
        likelihood = (
            likelihood
            + scale_and_mask(msg["fn"].log_prob(msg["value"]), msg["scale"], msg["mask"]).sum()
        )
    return torch.as_tensor(likelihood)


def does_not_split(name: str, base: Any) -> str:
    """The message about a mask on a site with a joint density."""
    return (
        f"site '{name}': the density of a {type(base).__name__} does not split over its entries, so"
        " they cannot be pruned"
    )


def collapsed(parameter: Tensor) -> Tensor:
    """The number in a tensor that expands one number to the shape of a site; other tensors as they
    are.
    """
    return (
        parameter[(0,) * parameter.ndim]
        if parameter.ndim and parameter.numel() and not any(parameter.stride())
        else parameter
    )
