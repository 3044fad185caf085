"""A network whose weights are shared out over processes. A layer gathers its weights before it
runs, and frees them afterwards. In the backward pass it does so again, and the gradients are summed
over the processes, each of which gets those of its part.

Owns `ShardedLayers`. All of this is torch's `fully_shard`, applied to the weights as they are drawn
in a step. Next: `sharded_guide.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from pyro_bmr.errors import FitError
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.networks.placed_weights import PlacedWeights
from pyro_bmr.sharding.layout import Layout

# modules that use the weights of modules inside them without calling these
_WHOLE = (nn.MultiheadAttention,)


class ShardedLayers:
    """A copy of `program`, `network`, whose lifted parameters are shared out over `mesh`, and their
    `layout`. Its other parameters and its buffers are whole in each process.

    Parameters on the device "meta" get their start values layer by layer, from the
    `reset_parameters` of their modules and `seed`, the same in all processes.

    Raises:
        FitError: a module with parameters on "meta" has no `reset_parameters`.
    """

    def __init__(self, program: BayesianNetwork, mesh: DeviceMesh, seed: int) -> None:
        self.network = program.copy()
        net = self.network.net
        shapes = {name: p.shape for name, p in net.named_parameters() if name in program.priors}
        self.layout = Layout(mesh, shapes)
        others = {p for name, p in net.named_parameters() if name not in program.priors}
        units = set(_units(net, set(shapes)))
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            for path, module in net.named_modules():
                inner = {*module.modules()} - {module}
                if module in units and not units & inner:
                    _make_values(path, module, self.layout.device, recurse=True)
                    _shard(module, mesh, others)
                else:
                    _make_values(path, module, self.layout.device)
        for module in reversed([m for m in net.modules() if m in units]):
            _shard(module, mesh, others)
        _shard(net, mesh, others)
        if self.layout.device.type == "cpu":
            _overlap([m for m in net.modules() if m in units and isinstance(m, FSDPModule)])
        self.parameters = {name: p for name, p in net.named_parameters() if name in shapes}
        self.placed = PlacedWeights(net)

    def own(self, name: str) -> Tensor:
        """This process's part of a parameter, as the next run will read it."""
        with torch.no_grad():
            part: Tensor = self.parameters[name].to_local()  # type: ignore[attr-defined]
        return part

    @torch.no_grad()
    def place(self, weights: Mapping[str, Tensor]) -> None:
        """Gives the network this process's parts of the weights."""
        for name, weight in weights.items():
            self.own(name).copy_(weight)

    def log_likelihood(self, batch: tuple[object, ...]) -> Tensor:
        """Σ log p(y | x) over the rows of a batch, at the weights that were placed last, nats."""
        x, y = batch
        return self.network.log_likelihood({}, x, y, self.placed)  # type: ignore[arg-type]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gradient of this process's part of each parameter that the last run has used: the
        mean over the processes.
        """
        for name, parameter in self.parameters.items():
            grad, parameter.grad = parameter.grad, None
            if grad is not None:
                yield name, grad.to_local()  # type: ignore[attr-defined]


def _units(net: nn.Module, lifted: set[str]) -> Iterator[nn.Module]:
    """The modules that gather their weights together: those that have lifted parameters of their
    own. What two modules share is left to the whole network.
    """
    names = Counter(id(p) for _, p in net.named_parameters(remove_duplicate=False))
    wholes = [module for module in net.modules() if isinstance(module, _WHOLE)]
    within = {id(module) for whole in wholes for module in whole.modules()}
    for path, module in net.named_modules():
        recurse = isinstance(module, _WHOLE)
        if id(module) in within and not recurse:
            continue
        found = dict(module.named_parameters(path, recurse=recurse))
        shared = any(names[id(p)] > 1 for p in found.values())
        if lifted & found.keys() and not shared:
            yield module


def _shard(module: nn.Module, mesh: DeviceMesh, others: set[nn.Parameter]) -> None:
    """Shares out the parameters of a module, but for `others`, if that was not done."""
    if not isinstance(module, FSDPModule):
        fully_shard(module, mesh=mesh, ignored_params=others, reshard_after_forward=True)


def _overlap(units: Sequence[FSDPModule]) -> None:
    """Has the weights of a layer on their way while its neighbour computes: of the next one in the
    forward pass, of the one before in the backward pass. On GPUs torch does so by itself. Layers
    that run in another order are gathered when they run; torch drops what was gathered in vain at
    the end of the backward pass.
    """
    for unit in units:
        unit._set_unshard_async_op(True)
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([unit])


def _make_values(path: str, module: nn.Module, device: torch.device, recurse: bool = False) -> None:
    """Gives the parameters and buffers of a module itself start values, if they have none; before
    that those of the modules inside, if `recurse`.
    """
    for name, inner in module.named_children() if recurse else ():
        _make_values(f"{path}.{name}", inner, device, recurse)
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if not any(t.is_meta for t in own):
        return
    reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
    if reset is None:
        raise FitError(
            f"'{path}' ({type(module).__name__}) is on the device 'meta', and has no"
            " reset_parameters() to make its start values; write one, or make the network on"
            " another device"
        )
    module.to_empty(device=device, recurse=False)
    reset()
