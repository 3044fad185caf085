"""A call of a network with given tensors in the places of its parameters, at less cost than
`torch.func.functional_call`, which looks for the places anew each time.

Owns `PlacedWeights`. Next: `bayesian_network.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class PlacedWeights:
    """The places of the parameters of `net`, whose modules must stay what they are.

    A tensor that several modules share has several places.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        names = {id(p): name for name, p in net.named_parameters()}
        self.places: dict[str, list[tuple[dict[str, Any], str]]] = {n: [] for n in names.values()}
        for module in net.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self.places[names[id(parameter)]].append((module._parameters, key))

    def call(self, given: Mapping[str, Tensor], arguments: tuple[Any, ...], named: Any) -> Any:
        """What the network returns with the tensors `given` (parameter name → tensor)."""
        before = []
        try:
            for name, tensor in given.items():
                for held, key in self.places[name]:
                    before.append((held, key, held[key]))
                    held[key] = tensor
            return self.net(*arguments, **named)
        finally:
            for held, key, parameter in before:
                held[key] = parameter
