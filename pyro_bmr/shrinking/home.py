"""A network is read and cut on the CPU, wherever it is; the smaller one goes back.

Owns `Home` and `to_cpu`. Next: `exported_graph.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from pyro_bmr.errors import ShrinkError

_CPU = torch.device("cpu")
_OF_TORCH = frozenset(vars(nn.Module()))  # what a module has of its own: parameters, hooks


@dataclass(frozen=True)
class Home:
    """Where a network was.

    `attributes`: the path of a module, and an attribute of it that is no parameter or buffer → its
    value, in which tensors that were there and names of the device have been replaced.
    """

    device: torch.device
    attributes: Mapping[tuple[str, str], Any]

    def back(self, net: nn.Module) -> nn.Module:
        """Moves `net`, which is changed: the network that was moved, or a smaller one."""
        if self.device == _CPU:
            return net

        def there(now: Any, before: Any) -> Any:
            if isinstance(now, Tensor):
                return now.to(self.device)
            return before if _names(before, self.device) else now

        modules = dict(net.named_modules())
        for (path, name), before in self.attributes.items():
            own = modules[path].__dict__ if path in modules else {}
            if name in own:
                own[name] = tree_map(there, own[name], before)
        _exchange(net, _CPU, self.device)
        return net.to(self.device)


def to_cpu(net: nn.Module) -> Home:
    """Moves `net`, which is changed, and says where it was.

    A tensor among the attributes of its modules is moved as well, and a device that a forward makes
    tensors on becomes the CPU; both may be in a list, a tuple or a dict.

    Raises:
        ShrinkError: its tensors are on several devices, or have no values.
    """
    devices = {t.device for t in (*net.parameters(), *net.buffers())}
    others = {device for device in devices if device.type not in ("cpu", "meta")}
    empty = any(device.type == "meta" for device in devices)
    if len(others) > 1 or (empty and (others or len(devices) == 1)):
        names = ", ".join(sorted(map(str, devices)))
        raise ShrinkError(
            f"net: expected tensors on one device, with values, got some on {names}; move them"
            " with net.to(...)"
        )
    if not others:
        return Home(_CPU, {})
    (device,) = others
    attributes: dict[tuple[str, str], Any] = {}
    for path, module in net.named_modules():
        for name in vars(module).keys() - _OF_TORCH:
            before, found = vars(module)[name], list[Any]()

            def here(part: Any, found: list[Any] = found) -> Any:
                if isinstance(part, Tensor) and part.device == device:
                    found.append(part)
                    return part.to(_CPU)
                if _names(part, device):
                    found.append(part)
                    return type(part)(str(_CPU))
                return part

            now = tree_map(here, before)
            if found:
                attributes[path, name] = before
                module.__dict__[name] = now  # past a property of that name
    _exchange(net, device, _CPU)
    net.to(_CPU)
    return Home(device, attributes)


def _names(value: Any, device: torch.device) -> bool:
    """Whether it is a name of the device: with its number, or without."""
    return type(value) in (str, torch.device) and str(value) in (str(device), device.type)


def _exchange(net: nn.Module, old: torch.device, new: torch.device) -> None:
    """Puts another device into the operations of the graphs in `net`."""

    def exchanged(part: Any) -> Any:
        return new if isinstance(part, torch.device) and _names(part, old) else part

    for module in net.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.args = fx.node.map_aggregate(node.args, exchanged)
                node.kwargs = fx.node.map_aggregate(node.kwargs, exchanged)
                if _names(node.kwargs.get("device"), old):
                    node.update_kwarg("device", new)
            module.recompile()
