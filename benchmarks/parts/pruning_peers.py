"""Other tools that cut networks, beside `shrink`, on one network: `compared` and `PEERS`, for
`network_kinds.py --peer`.

Each removes half of the channels of each of its groups, by random choice. The masked network has
zeros in the place of all weights that are removed, on the side of the channels and of their
readers. So a tool is right if what it returns has the outputs of the masked network.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.data.inputs import call_arguments, called
from pyro_bmr.shrinking.verification import difference, inputs_like, leaves
from tests.shrinking.kinds import Forward

RIGHT = 1e-5  # largest difference over largest output, in float32

Net = nn.Module
Prune = Callable[[Net, Any, Collection[str], list[str]], None]
"""Removes half of each group of these names from a network on an example, and enters the names of
all groups in a list.
"""


class Comparison(NamedTuple):
    """What another tool makes of a network.

    `groups`: that it finds, without those of the outputs. `together`: whether it is right, or how
    it is not, if it prunes all of them. `right`: the groups that it prunes one after the other with
    the right outputs; others are left out. Parameters: before, and after those groups are pruned by
    the tool and by `shrink`.
    """

    groups: int
    together: str
    right: int
    before: int
    peer: int
    ours: int


def compared(net: Net, example: Any, prune: Prune) -> Comparison:
    """Another tool and `shrink` at the same weights."""
    before = parameters(net)
    try:
        names = [
            n for n in group_names(net, example, prune) if not shortens(net, example, prune, n)
        ]
    except Exception as error:  # of the peer: it cannot read the network
        return Comparison(0, f"error: {first_line(error)}", 0, before, before, before)
    together = verdict(net, example, prune, names)
    chosen: list[str] = []
    for name in names:
        if verdict(net, example, prune, [*chosen, name]) == "right":
            chosen.append(name)
    small, masks = pruned(net, example, prune, chosen)
    ours = bmr.shrinking.shrink_plan(net, masks, example).parameters[1]
    return Comparison(len(names), together, len(chosen), before, parameters(small), ours)


def verdict(net: Net, example: Any, prune: Prune, names: Collection[str]) -> str:
    """How the network with these groups pruned compares with the masked one, such as "right"."""
    try:
        small, masks = pruned(net, example, prune, names)
    except Exception as error:  # of the peer
        return f"error: {first_line(error)}"
    full = bmr.shrinking.masked(net, masks)
    if not names:
        return "prunes nothing"
    worst = 0.0
    for x in inputs_like(example, net):
        try:
            wrong, size = difference(outputs(full, x), outputs(small, x))
        except Exception as error:  # sizes in the forward are not those of the layers
            return f"does not run: {first_line(error)}"
        worst = max(worst, wrong / max(size, 1e-3))
    return "right" if worst <= RIGHT else f"differs by {worst:.1g}"


def shortens(net: Net, example: Any, prune: Prune, name: str) -> bool:
    """Whether the channels of a group are outputs of the network, which nobody prunes."""
    try:
        small = pruned(net, example, prune, [name])[0]
        got = outputs(small, example)
    except Exception:  # `verdict` says what
        return False
    return [p.shape for p in got] != [p.shape for p in outputs(net, example)]


def group_names(net: Net, example: Any, prune: Prune) -> list[str]:
    """The groups that the tool finds."""
    names: list[str] = []
    prune(copy.deepcopy(net), example, (), names)
    return names


def pruned(
    net: Net, example: Any, prune: Prune, names: Collection[str]
) -> tuple[Net, dict[str, Tensor]]:
    """The network after the tool removed half of these groups, and masks of what is left."""
    small = copy.deepcopy(net).eval()
    tensors = _tensors(net)
    with torch.no_grad():  # each entry's place in the original, to see where it goes
        for t in _tensors(small).values():
            t.copy_(torch.arange(t.numel()).view(t.shape))
    prune(small, example, names, [])
    left = {name: _tensors(small)[name] for name in tensors}
    places = {name: t.detach().real.long() for name, t in left.items()}
    masks: dict[str, Tensor] = {}
    for name, p in net.named_parameters(remove_duplicate=False):
        kept = torch.zeros(p.numel(), dtype=torch.bool)
        kept[places[name].flatten()] = True
        masks[name] = kept.view(p.shape)
    for name, t in left.items():
        t.data = tensors[name].detach().flatten()[places[name]]
    return small, _of_tied(net, masks)


def _of_tied(net: Net, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """One mask for each parameter: of several names, what is kept under any."""
    shared: dict[int, Tensor] = {}
    for name, p in net.named_parameters(remove_duplicate=False):
        shared[id(p)] = shared.get(id(p), torch.zeros_like(masks[name])) | masks[name]
    return {name: shared[id(p)] for name, p in net.named_parameters()}


def _tensors(net: Net) -> dict[str, Tensor]:
    """Parameters, and buffers of real numbers, which hold one for each channel too."""
    parameters = dict(net.named_parameters(remove_duplicate=False))
    return parameters | {n: b for n, b in net.named_buffers() if b.is_floating_point()}


@torch.no_grad()
def outputs(net: Net, x: Any) -> list[Tensor]:
    return leaves(called(net, x))


def parameters(net: Net) -> int:
    return sum(p.numel() for p in net.parameters())


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def torch_pruning(net: Net, example: Any, names: Collection[str], found: list[str]) -> None:
    """Of Torch-Pruning: the groups of its `BasePruner`, by their first layers."""
    tp = importlib.import_module("torch_pruning")
    torch.manual_seed(0)
    pruner = tp.pruner.BasePruner(
        net,
        example,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        forward_fn=called,
        output_transform=leaves,
    )
    layers = {id(module): name for name, module in net.named_modules()}
    for group in pruner.step(interactive=True):
        found.append(layers[id(group[0].dep.target.module)])
        if found[-1] in names:
            group.prune()


class _OfOneInput(Forward):
    def forward(self, x: Any) -> Any:  # torch.fx does not read *inputs
        return self.function(self, x)


class _OfTwoInputs(Forward):
    def forward(self, x: Any, z: Any) -> Any:
        return self.function(self, x, z)


def torch_kirigami(net: Net, example: Any, names: Collection[str], found: list[str]) -> None:
    """Of torch-kirigami: the layers whose channels it offers, without those that are removed with
    the channels of a layer before them.
    """
    if type(net) is Forward:
        net.__class__ = _OfTwoInputs if isinstance(example, tuple) else _OfOneInput
    before = _offered(net, example)[1]
    together: set[str] = set()
    for name in before:
        if name in together:
            continue
        found.append(name)
        alone = copy.deepcopy(net)
        try:
            _halve(alone, example, name)
            after = _offered(alone, example)[1]
        except Exception:  # `verdict` says what
            after = before
        together |= {n for n in before if len(after.get(n, ())) < len(before[n])}
    for name in found:
        if name in names:
            _halve(net, example, name)


def _offered(net: Net, example: Any) -> tuple[Any, dict[str, list[Any]]]:
    """A pruner of the network, and layer → the channels that it offers to remove."""
    kirigami = importlib.import_module("torch_kirigami")
    pruning = importlib.import_module("torch_kirigami.pruning")
    given, named = call_arguments(net, example)
    pruner = pruning.Pruner(
        net, graph=kirigami.DependencyGraph.build(net, args=given, kwargs=named)
    )
    layers: dict[str, list[Any]] = {}
    for candidate in pruner.discover_candidates().candidates:
        layers.setdefault(candidate.key.rpartition(":")[0], []).append(candidate)
    return pruner, layers


def _halve(net: Net, example: Any, name: str) -> None:
    pruner, layers = _offered(net, example)
    own = layers[name]
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(0)).tolist()
    gone = [part for k in order[: len(own) // 2] for part in own[k].remove]
    pruner.apply(pruner.plan_remove(gone))


PEERS: Mapping[str, Prune] = {"torch-pruning": torch_pruning, "torch-kirigami": torch_kirigami}
