"""Which channels of a network are kept: what is constant, what is tied, and what reads them.

Owns `Analysis`. For each tensor of the graph it finds three things.

- `unknown`, for each entry: whether it depends on the input. Where it does not, `value` is the
  constant. A unit whose incoming weights are all zero is constant: its bias through the activation.
- `axes`: for each axis, the channel of every position, see `channel_ids.py`.
- a `Read`, if the operation adds up channels. A channel is needed when a kept output reads it with
  a weight other than zero, unless it is a constant that can be added to the output instead.

Channels that are not needed are removed. Next: `arguments.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from pyro_bmr.shrinking.channel_ids import ChannelIds, Ids
from pyro_bmr.shrinking.constant_maps import with_map
from pyro_bmr.shrinking.contractions import Read
from pyro_bmr.shrinking.elementwise import nothing_known
from pyro_bmr.shrinking.exported_graph import ExportedGraph
from pyro_bmr.shrinking.refusals import foreign_errors
from pyro_bmr.shrinking.rules import state_after
from pyro_bmr.shrinking.states import Call, State, fixed, layer_of, state_of, states_in

Kept = tuple[np.ndarray, ...]


class Analysis:
    """What is known of each node of a graph, and which channels are kept.

    `states`: node → its `State`, or a number. `reads`: every sum over channels. `reasons`: layer →
    why channels of it are kept together. `depends`: the nodes that are computed from the input.

    `whole`: nodes whose channels are all kept, with the reason. `trained`: parameter → bool tensor
    of the entries that are kept, while a fit moves them: they may have any value, and so may all
    other parameters, and the buffers that it names. `maps`: whether constants that a padded
    convolution reads go into a tensor over the pixels.
    """

    def __init__(
        self,
        graph: ExportedGraph,
        whole: Mapping[fx.Node, str],
        trained: Mapping[str, Tensor] | None = None,
        maps: bool = False,
    ) -> None:
        self.graph, self._whole, self._trained, self._maps = graph, whole, trained, maps
        self._ids = ChannelIds()
        self.states: dict[fx.Node, Any] = {}
        self.reads: list[Read] = []
        self.reasons: dict[str, str] = {}
        self.depends: set[fx.Node] = set()
        self.sized: set[fx.Node] = set()
        self.static: set[fx.Node] = set()
        with torch.no_grad():
            for node in graph.graph.nodes:
                with foreign_errors(f"'{node.name}' ({node.target})"):
                    self.states[node] = self._state(node)
                    if node in whole:
                        self._keep_whole(node, whole[node])
        self.reads = _agreed(self.reads)
        self._resolved = self._ids.resolved()
        self._mark()

    def kept(self, ids: Ids) -> np.ndarray:
        """For each of these channels, whether it is kept."""
        return self._resolved.kept(ids)

    def kept_on(self, state: State) -> Kept:
        """For each axis and each of its positions, whether it is kept."""
        return tuple(self.kept(ids) for ids in state.axes)

    def roots(self, ids: Ids) -> Ids:
        """For each of these channels, the one that stands for all that are tied to it."""
        return self._ids.roots(ids)

    def free(self, ids: Ids) -> Ids:
        """`roots` of channels that can be removed by themselves, −1 of others."""
        return self._ids.free(ids)

    def prunable(self, ids: Ids) -> bool:
        """Whether any of the channels may be removed."""
        return self._ids.prunable(ids)

    def reason(self, ids: Ids) -> str:
        """Why a channel is kept: what reads it, or what it is tied to."""
        return self._resolved.reason(ids)

    def is_cut(self, state: State) -> bool:
        """Whether positions of it are removed."""
        return not all(kept.all() for kept in self.kept_on(state))

    def is_known(self, node: fx.Node) -> bool:
        """Whether the kept part of a tensor is a constant."""
        state = self.states[node]
        return isinstance(state, State) and not bool(cut(state.unknown, self.kept_on(state)).any())

    def _mark(self) -> None:
        order = list(reversed(self.reads))
        changed = True
        while changed:
            changed = False
            for read in order:
                needed = read.needed(self.kept) & ~self.kept(read.inputs)
                if needed.any():
                    why = f"read by {_title(read.node, read.layer)}"
                    changed |= self._resolved.keep(read.inputs[needed], why)
            changed = changed or self._resolved.levelled()

    def _keep_whole(self, node: fx.Node, why: str) -> None:
        for near in (node, *node.all_input_nodes):
            for state in states_in(self.states[near]):
                for axis in (*state.axes, *state.parts):
                    self._ids.fix(axis, why)

    def _state(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if node in self.graph.tensors:
                if self.graph.tensors[node][0] not in (self._trained or {}):
                    self.static.add(node)
                return self._parameter_state(*self.graph.tensors[node])
            self.depends.add(node)
            return nothing_known(concrete(node.meta["val"]))
        if node.op == "output":
            for state in states_in(tree_map(self._of, node.args)):
                for axis in (*state.axes, *state.parts):
                    self._ids.fix(axis, "an output of the network")
            return None
        if node.op == "get_attr":
            raise TypeError("a block of operations with its own control flow")
        return self._result(node)

    def _of(self, part: Any) -> Any:
        return self.states[part] if isinstance(part, fx.Node) else part

    def _result(self, node: fx.Node) -> Any:
        args, kwargs = tree_map(self._of, (node.args, node.kwargs))
        sources = node.all_input_nodes
        traced = node.meta.get("val")
        if isinstance(traced, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            self.sized.add(node)
        elif any(n in self.depends for n in sources):
            self.depends.add(node)
        sized = any(n in self.sized for n in sources)
        target: Any = node.target
        if not states_in((args, kwargs)) and not isinstance(traced, (Tensor, tuple, list)):
            return target(*args, **kwargs) if callable(target) else None  # sizes
        if target.__name__ == "getitem" and isinstance(args[0], (tuple, list)):
            return args[0][args[1]]
        call = Call(node, args, kwargs, layer_of(node), sized)
        if isinstance(traced, (torch.SymInt, int)) and not isinstance(traced, bool):
            return call.values()  # a size of a tensor
        if call.name.startswith(("_assert", "sym_")):
            return call.values() if call.name.startswith("sym_") else None
        if self._is_static(node, call, traced):
            self.static.add(node)
            for state in call.states:
                for axis in state.axes:
                    self._ids.fix(axis, "constants are computed from it")
            return tree_map(self._tensor_state, call.values())
        if not call.states:
            return self._created(call)
        before = len(self.reads)
        found = state_after(self._ids, call, self.reads, self.reasons)
        if self._maps and "conv" in call.name and len(self.reads) > before:
            self.reads[-1] = with_map(call, self.reads[-1])
        return tree_map(lambda part: _uniform_over_rows(part, call.dynamic), found)

    def _is_static(self, node: fx.Node, call: Call, traced: Any) -> bool:
        """Whether it is computed from constants and buffers alone, at any number of rows."""
        if is_random(node) or call.sized or any(any(axes) for axes in [call.dynamic]):
            return False
        return all(
            n in self.static
            and not isinstance(self.graph.tensors.get(n, ("", None))[1], torch.nn.Parameter)
            for n in node.all_input_nodes
        )

    def _created(self, call: Call) -> Any:
        """The state of a tensor that is made of numbers alone: zeros, ones, a range, a draw."""
        value = call.values()
        uniform = call.name in ("zeros", "ones", "full", "scalar_tensor", "empty")
        if is_random(call.node) or not uniform:
            return nothing_known(value)
        axes = tuple(
            fixed((n,))[0] if dynamic or n < 2 else self._ids.new(n)
            for n, dynamic in zip(value.shape, call.dynamic, strict=True)
        )
        return State(value, torch.zeros_like(value, dtype=torch.bool), axes)

    def _parameter_state(self, name: str, value: Tensor) -> State:
        state: State = self._tensor_state(value)
        moved = isinstance(value, torch.nn.Parameter) or name in (self._trained or {})
        if self._trained is None or not moved:
            return state
        kept = self._trained.get(name, torch.ones_like(state.unknown)).to(state.unknown.device)
        return state_of(torch.zeros_like(state.value), kept, state.axes)

    def _tensor_state(self, value: Any) -> Any:
        """The state of a parameter or constant; each axis longer than 1 has channels of its own."""
        if not isinstance(value, Tensor):
            return value
        axes = tuple(self._ids.new(n) if n > 1 else fixed((n,))[0] for n in value.shape)
        value = value.detach()
        return State(value, torch.zeros_like(value, dtype=torch.bool), axes)


def _uniform_over_rows(part: Any, dynamic: tuple[bool, ...]) -> Any:
    """`part`, with constants that differ along an axis of any length taken for unknown: at another
    length they may be others.
    """
    if not isinstance(part, State) or not any(dynamic) or bool(part.unknown.all()):
        return part
    unknown = part.unknown.clone()
    for axis, any_length in enumerate(dynamic[: part.value.ndim]):
        if any_length:
            for channel in np.unique(part.axes[axis]):  # an axis may be rows × heads
                places = torch.from_numpy((part.axes[axis] == channel).nonzero()[0])
                value = part.value.index_select(axis, places)
                other = unknown.index_select(axis, places) | (value != value.narrow(axis, 0, 1))
                unknown.index_copy_(axis, places, other.any(axis, keepdim=True).expand_as(other))
    return replace(state_of(part.value, unknown, part.axes), sums_to_one=part.sums_to_one)


def concrete(value: Any) -> Tensor:
    """A tensor of zeros like a traced one, with its sizes at two rows."""
    sizes = [int(n.node.hint) if isinstance(n, torch.SymInt) else int(n) for n in value.shape]
    return torch.zeros(sizes, dtype=value.dtype)


def is_random(node: fx.Node) -> bool:
    """Whether the operation draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    schema: Any = node.target._schema  # type: ignore[union-attr]
    named = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    named |= {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    named |= node.kwargs
    for switch in ("train", "training"):
        if named.get(switch) is False:
            return False
    return named.get("dropout_p", named.get("dropout", 1.0)) != 0


def _title(node: fx.Node, layer: str) -> str:
    name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
    return layer or f"'{name}' in the forward"


def cut(value: Tensor, kept: Sequence[np.ndarray]) -> Tensor:
    """`value` at the kept positions of each axis."""
    for k, positions in enumerate(kept):
        if not positions.all():
            value = value.index_select(k, torch.from_numpy(positions.nonzero()[0]).to(value.device))
    return value


def _agreed(reads: Sequence[Read]) -> list[Read]:
    """The reads, with a constant foldable only if it is the same in every use of a bias."""
    uses: dict[str, list[int]] = {}
    for k, read in enumerate(reads):
        if read.shared:
            uses.setdefault(read.shared, []).append(k)
    result = list(reads)
    for same in (ks for ks in uses.values() if len(ks) > 1):
        level = reads[same[0]].level
        assert level is not None
        alike = [
            r.foldable & np.asarray(r.level == level)
            if r.level is not None and r.level.shape == level.shape
            else np.zeros_like(r.foldable)
            for r in (reads[k] for k in same)
        ]
        if len({len(a) for a in alike}) > 1:
            alike = [np.zeros_like(a) for a in alike]
        foldable = np.logical_and.reduce(alike) if len({len(a) for a in alike}) == 1 else None
        for k in same:
            none = np.zeros_like(reads[k].foldable)
            result[k] = replace(reads[k], foldable=none if foldable is None else foldable)
    return result
