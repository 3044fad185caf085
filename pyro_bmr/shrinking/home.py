"""A network is read and cut on the CPU, wherever it is; the smaller one goes back.

Owns `Home` and `to_cpu`. Next: `exported_graph.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_bmr.errors import ShrinkError

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Home:
    """Where a network was.

    `attributes`: the path of a module, and an attribute of it that is no parameter or buffer → its
    value: a tensor that was there, or a name of the device.
    """

    device: torch.device
    attributes: Mapping[tuple[str, str], Any]

    def back(self, net: nn.Module) -> nn.Module:
        """Moves `net`, which is changed: the network that was moved, or a smaller one."""
        if self.device == _CPU:
            return net
        modules = dict(net.named_modules())
        for (path, name), value in self.attributes.items():
            if name in vars(modules.get(path, nn.Module())):
                held = vars(modules[path])[name]
                there = held.to(self.device) if isinstance(held, Tensor) else value
                setattr(modules[path], name, there)
        for module in modules.values():
            if isinstance(module, fx.GraphModule):
                for node in module.graph.nodes:
                    node.args, node.kwargs = self._here(node.args), self._here(node.kwargs)
                module.recompile()
        return net.to(self.device)

    def _here(self, arguments: Any) -> Any:
        """Arguments of an operation, with this device in the place of the CPU."""

        def moved(part: Any) -> Any:
            return self.device if isinstance(part, torch.device) and part == _CPU else part

        return fx.node.map_aggregate(arguments, moved)


def to_cpu(net: nn.Module) -> Home:
    """Moves `net`, which is changed, and says where it was.

    Tensors among the attributes of its modules are moved as well, and a device that a forward makes
    tensors on becomes the CPU.

    Raises:
        ShrinkError: it is on several devices, or has no values.
    """
    devices = {t.device for t in (*net.parameters(), *net.buffers())} or {_CPU}
    if len(devices) > 1 or _without_values(devices):
        names = ", ".join(sorted(map(str, devices)))
        raise ShrinkError(
            f"net: expected tensors on one device, with values, got some on {names}; move them"
            " with net.to(...)"
        )
    (device,) = devices
    if device == _CPU:
        return Home(device, {})
    attributes: dict[tuple[str, str], Any] = {}
    for path, module in net.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.device == device:
                attributes[path, name] = value
                setattr(module, name, value.to(_CPU))
            elif isinstance(value, (torch.device, str)) and _names(value, device):
                attributes[path, name] = value
                setattr(module, name, type(value)(str(_CPU)))
    net.to(_CPU)
    return Home(device, attributes)


def _without_values(devices: set[torch.device]) -> bool:
    return any(device.type == "meta" for device in devices)


def _names(value: torch.device | str, device: torch.device) -> bool:
    """Whether it is a name of the device: with its number, or without."""
    return str(value) in (str(device), device.type)
