"""The network of a fit without the units and channels that pruning has cut off.

A unit is cut off if no kept weight reads it, or if it is 0 whatever the kept weights are: all its
incoming weights and its bias are pruned, and its activation maps 0 to 0. Without it the network is
the same function of the kept weights, and the gradient of every weight is the same. Owns `Cut`,
`LiveNetwork` and `LiveNetworks`. Next: `written_weights.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_bmr.data.inputs import Inputs, called, of_each, rows_in
from pyro_bmr.errors import PyroBMRError, ShrinkError
from pyro_bmr.fitting.network import Network
from pyro_bmr.isolation import tensors_on_cpu
from pyro_bmr.networks.placed_weights import PlacedWeights
from pyro_bmr.networks.plain_module import module_copy
from pyro_bmr.shrinking.analysis import Analysis, cut
from pyro_bmr.shrinking.cut_graph import CutGraph
from pyro_bmr.shrinking.exported_graph import ExportedGraph, exported, two_rows
from pyro_bmr.shrinking.home import to_cpu
from pyro_bmr.shrinking.own_class import own_class
from pyro_bmr.shrinking.refusals import foreign_errors
from pyro_bmr.shrinking.untied import shared_names
from pyro_bmr.shrinking.verification import answers, disagreement, inputs_like

# Reading a network takes some tenths of a second, and the first time in a process some seconds. A
# fit gets them back where a step saves this many products of a weight and a row.
_WORTH = 5_000_000
_PLACES = 16  # a convolution has each weight at many places; counted as this many


@dataclass(frozen=True)
class Cut:
    """The entries of a parameter that a smaller network has: those whose index on every axis is
    in `axes`. `shape`: of the whole parameter.
    """

    shape: tuple[int, ...]
    axes: tuple[Tensor, ...]

    @property
    def small(self) -> tuple[int, ...]:
        """The shape of the parameter in the smaller network."""
        return tuple(len(axis) for axis in self.axes)

    def of(self, whole: Tensor) -> Tensor:
        """The entries of the whole tensor."""
        for k, axis in enumerate(self.axes):
            if len(axis) < whole.shape[k]:
                whole = whole.index_select(k, axis)
        return whole

    def places(self, kept: Tensor) -> Tensor:
        """For each entry of the parameter with a number in `kept`, its number in the smaller one;
        the size of that for an entry that it does not have.
        """
        size = prod(self.small)
        numbers = kept.new_full(self.shape, size)
        here = torch.meshgrid(*self.axes, indexing="ij") if self.axes else ()
        numbers[here] = torch.arange(size, device=kept.device).view(self.small)
        return numbers.view(-1)[kept]

    def taken(self, scales: Tensor) -> Tensor:
        """Scales that several weights share, as the smaller parameter has them."""
        for k, axis in enumerate(self.axes if scales.ndim else ()):
            if scales.shape[k] > 1:
                scales = scales.index_select(k, axis)
        return scales

    def grown(self, sums: Tensor, shape: tuple[int, ...]) -> Tensor:
        """`sums`, one for each scale in the smaller parameter, at the places of scales of `shape`;
        0 at the others.
        """
        for k, axis in enumerate(self.axes if sums.ndim else ()):
            if shape[k] > 1:
                whole = sums.new_zeros(*sums.shape[:k], shape[k], *sums.shape[k + 1 :])
                sums = whole.index_copy_(k, axis, sums)
        return sums

    def summed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of scales of `shape` in the smaller parameter."""
        return tuple(n if m > 1 else 1 for n, m in zip(self.small, shape, strict=True))


class LiveNetwork:
    """A smaller network, and the entries of each parameter and buffer that it has.

    `cuts`: parameter → its `Cut`. A parameter that the smaller network does not read has no place
    in `placed`. `points`: the parameters that are no sites and are cut. `states`: the buffers that
    are cut; the others are those of the whole network.
    """

    def __init__(
        self,
        whole: nn.Module,
        small: nn.Module,
        cuts: Mapping[str, Cut],
        points: Iterable[str] = (),
        states: Iterable[str] = (),
    ) -> None:
        self.whole, self.small, self.cuts = whole, small, cuts
        self.placed = PlacedWeights(small)
        self.points = {name: whole.get_parameter(name) for name in points}
        self.states = {n: (whole.get_buffer(n), small.get_buffer(n)) for n in states}

    def follow(self) -> None:
        """Takes over the mode, training or evaluation, of each module, and the cut buffers."""
        if self.small.training != self.whole.training:
            modes = {path: module.training for path, module in self.whole.named_modules()}
            for path, module in self.small.named_modules():
                module.training = modes.get(path, self.whole.training)
        for name, (whole, small) in self.states.items():
            small.copy_(self.cuts[name].of(whole))

    def point_estimates(self) -> dict[str, Tensor]:
        """The cut parameters that are no sites, of which autograd knows the whole ones."""
        return {name: self.cuts[name].of(whole) for name, whole in self.points.items()}

    @torch.no_grad()
    def give_back(self) -> None:
        """Puts what a step has made of the cut buffers into the whole network."""
        for name, (whole, small) in self.states.items():
            whole[torch.meshgrid(*self.cuts[name].axes, indexing="ij")] = small


class LiveNetworks:
    """The live network of a fit after each pruning; the graph of its network is read once.

    There is none where layers share a parameter, where another layer than a batch norm changes its
    buffers, where tensors are on several devices, and where the smaller network is not of the same
    class or gives other outputs.
    `moving`: running statistic → a mask of ones, since it may have any value.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.net = network, network.net
        self.graph: ExportedGraph | None = None
        self.moving: dict[str, Tensor] = {}
        self.possible = not shared_names(self.net)

    @torch.no_grad()
    def after(self, masks: Mapping[str, Tensor], x: Inputs) -> LiveNetwork | None:
        """The network that is left by `masks` (parameter → bool tensor), if it pays; `x`: what
        the program gets.
        """
        x = self.network.inputs_of(x)
        if not self.possible or _saved(masks) * rows_in(x) < _WORTH:
            return None
        try:
            with torch.random.fork_rng(), foreign_errors("the network of the fit"):
                return self._small(masks, two_rows(of_each(lambda t: t.detach(), x)))
        except PyroBMRError:  # it cannot be read, or not be cut
            self.possible = False
            return None

    def _small(self, masks: Mapping[str, Tensor], two: Inputs) -> LiveNetwork | None:
        if self.graph is None:
            changed = changed_buffers(self.net, two)
            self.moving = {name: torch.ones_like(b, dtype=torch.bool) for name, b in changed}
        with tensors_on_cpu():
            self.graph = self.graph or self._read(two)
            analysis = Analysis(self.graph, {}, trained={**self.moving, **masks})
            graph = CutGraph(analysis)
            if graph.failed is not None:
                return None
            whole = _drawn(self.net, masks)
            small, _ = own_class(whole, analysis, graph, [])
            inputs = inputs_like(two, whole)
        if small is None:
            return None
        small = small.to(next(whole.parameters()).device)
        cuts = self._cuts(analysis, small)
        left = dict(small.named_parameters())
        for name, parameter in whole.named_parameters():
            if name in left:
                left[name].data = cuts[name].of(parameter).detach().clone()
        want = answers(whole, inputs, double=False)
        if want.outputs[0] is None or disagreement(want, answers(small, inputs, double=False)):
            return None
        return self._with_point_estimates(small, masks, cuts)

    def _read(self, two: Inputs) -> ExportedGraph:
        """The graph of the network, on the CPU; tracing does not change parameters that are there
        already.
        """
        here = {id(p): p for p in self.net.parameters() if p.device.type == "cpu"}
        copied = module_copy(self.net, here).eval()
        to_cpu(copied)
        return exported(copied, of_each(Tensor.cpu, two))

    def _cuts(self, analysis: Analysis, small: nn.Module) -> dict[str, Cut]:
        left = {name for name, _ in (*small.named_parameters(), *small.named_buffers())}
        nodes = {name: node for node, (name, _) in analysis.graph.tensors.items()}
        cuts = {}
        for name, tensor in (*self.net.named_parameters(), *self.net.named_buffers()):
            shape = tuple(tensor.shape)
            whole = tuple(torch.arange(n, device=tensor.device) for n in shape)
            if name in left and name in nodes:
                flags = analysis.kept_on(analysis.states[nodes[name]])
                axes = tuple(cut(axis, (here,)) for axis, here in zip(whole, flags, strict=True))
            elif name in left or not whole:
                axes = whole
            else:
                axes = (whole[0][:0], *whole[1:])
            cuts[name] = Cut(shape, axes)
        return cuts

    def _with_point_estimates(
        self, small: nn.Module, masks: Mapping[str, Tensor], cuts: Mapping[str, Cut]
    ) -> LiveNetwork | None:
        """With the parameters that are no sites and the buffers of `net` itself, where they are
        whole; None if a parameter is cut that is no site and has pruned entries.
        """
        left = {name for name, _ in (*small.named_parameters(), *small.named_buffers())}
        tensors = {**dict(self.net.named_parameters()), **dict(self.net.named_buffers())}
        is_cut = {
            name: c.small != c.shape for name, c in cuts.items() if name in left - masks.keys()
        }
        for name, smaller in is_cut.items():
            path, _, own = name.rpartition(".")
            module = small.get_submodule(path)
            if not smaller and own in module._parameters:
                module._parameters[own] = self.net.get_parameter(name)
            elif not smaller:
                module._buffers[own] = tensors[name]
        points = [n for n, smaller in is_cut.items() if smaller and _is_parameter(tensors[n])]
        states = [n for n, smaller in is_cut.items() if smaller and not _is_parameter(tensors[n])]
        if self.network.left_masks.keys() & set(points):
            return None
        live = LiveNetwork(self.net, small, cuts, points, states)
        small.training = not self.net.training
        live.follow()
        return live


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def changed_buffers(net: nn.Module, x: Inputs) -> list[tuple[str, Tensor]]:
    """The buffers that a pass in training mode changes.

    Raises:
        ShrinkError: one of them is none of a batch norm, whose channels do not depend on each
            other.
    """
    copied = module_copy(net).train()
    before = {name: buffer.clone() for name, buffer in copied.named_buffers()}
    called(copied, of_each(Tensor.clone, x))
    changed = []
    for name, buffer in copied.named_buffers():
        was, layer = before[name], copied.get_submodule(name.rpartition(".")[0])
        if was.shape == buffer.shape and torch.equal(was, buffer):
            continue
        if not isinstance(layer, _BatchNorm):
            raise ShrinkError(f"buffer '{name}' of {type(layer).__name__} changes in a forward")
        changed.append((name, buffer))
    return changed


def _saved(masks: Mapping[str, Tensor]) -> int:
    """How many weights lie in rows and columns that are pruned whole, at the places of each."""
    saved = 0
    for mask in masks.values():
        if mask.ndim < 2:
            continue
        flat = mask.flatten(2).any(2) if mask.ndim > 2 else mask
        rows, columns = int(flat.any(1).sum()), int(flat.any(0).sum())
        weights = mask.numel() - mask.numel() // flat.numel() * rows * columns
        saved += weights * (_PLACES if mask.ndim > 2 else 1)
    return saved


def _drawn(net: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `net` in evaluation mode, with random numbers at the kept entries and zeros at the
    others.
    """
    copied = module_copy(net).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in copied.named_parameters():
        if name in masks:
            draw = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter)
            fan_in = prod(parameter.shape[1:])
            parameter.data = draw.mul_(masks[name]).div_(max(fan_in, 1) ** 0.5)
    return copied
