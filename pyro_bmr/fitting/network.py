"""What a step asks of a network whose priors are written out.

Owns the protocol `Network`. Next: `live_network.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from pyro_bmr.data.inputs import Inputs
from pyro_bmr.networks.placed_weights import PlacedWeights
from pyro_bmr.priors.weight_form import WeightForm


class Network(Protocol):
    """A program that can be run given its weights; see `BayesianNetwork`, which is one."""

    net: nn.Module
    forms: Mapping[str, WeightForm]
    left_masks: Mapping[str, Tensor]
    all_written: bool
    has_log_likelihood: bool

    def inputs_of(self, x: Inputs) -> Inputs: ...

    def log_likelihood(
        self, weights: Mapping[str, Tensor], x: Inputs, y: Tensor, placed: PlacedWeights | None
    ) -> Tensor: ...
