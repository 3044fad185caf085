"""A network as the graph of torch.export: operations of ATen, with the parameters among its inputs.

Owns `ExportedGraph`, `exported`, `exportable` and `shapes_by_name`. The number of rows stays
open. Attention, convolutions and norms stay whole operations; those that change a tensor in place
are made functional. Next: `channel_ids.py`.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn.modules import transformer
from torch.utils._pytree import TreeSpec, tree_map

from pyro_bmr.data.inputs import Inputs, call_arguments, of_each
from pyro_bmr.errors import ShrinkError
from pyro_bmr.shrinking.functional import inline_blocks, make_functional
from pyro_bmr.shrinking.refusals import MASKED, first_line
from pyro_bmr.shrinking.states import dynamic_axes

# They write of sizes that turn out to be fixed, and of errors that are reported here anyway.
_LOGGERS = (
    "torch._export.non_strict_utils",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
)


@dataclass(frozen=True)
class ExportedGraph:
    """The operations of a network.

    `tensors`: placeholder → (name, tensor) of each parameter, buffer and constant. `inputs`: the
    placeholders of the data, with the argument of the forward that each is in, and the keys in it.
    `arguments`: the names of the arguments, of which those after `positional` are keywords.
    `outputs`: the structure of what the network returns. `open_rows`: whether it is for any number
    of rows; else for two.
    """

    graph: fx.Graph
    tensors: Mapping[fx.Node, tuple[str, Tensor]]
    inputs: Mapping[fx.Node, tuple[str, tuple[Any, ...]]]
    arguments: tuple[str, ...]
    outputs: TreeSpec
    open_rows: bool

    def of(self, net: nn.Module) -> ExportedGraph:
        """The graph of `net`, a copy of the exported network with other numbers in its tensors."""
        named = (net.named_parameters, net.named_buffers)
        held = dict(pair for pairs in named for pair in pairs(remove_duplicate=False))
        tensors = {n: (name, held.get(name, old)) for n, (name, old) in self.tensors.items()}
        return replace(self, tensors=tensors)


def exported(net: nn.Module, two: Inputs) -> ExportedGraph:
    """The graph of `net` on two rows.

    Raises:
        ShrinkError: torch.export cannot read the network.
    """
    given, named = call_arguments(net, two)
    program = _program(net, given, named)
    if not make_functional(program.graph_module):
        program = _decomposed(program, net)
    return _read(program, net, given, named)


def _program(net: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> ExportedProgram:
    """The program at any number of rows and any size that the forward leaves open."""
    reason: Exception | None = None
    for which in ("lengths", "rows", ""):
        shapes = tree_map(lambda t, which=which: _open_axes(t, which), (given, named))
        dynamic = (*shapes[0], *shapes[1].values()) if which else None
        try:
            with _quiet(), exportable(net):
                program = torch.export.export(
                    net,
                    given,
                    named,
                    dynamic_shapes=shapes_by_name(net, given, named, dynamic),
                    strict=False,
                )
        # A user's forward may raise anything when its sizes are symbols.
        except Exception as error:
            reason = reason or error
            continue
        inline_blocks(program.graph_module)
        return program
    assert reason is not None
    raise ShrinkError(
        f"{type(net).__name__} cannot be traced by torch.export: its control flow depends on the"
        f" data, or a part of it has no traceable form ({type(reason).__name__}:"
        f" {first_line(reason)}); {MASKED}"
    ) from None


def _open_axes(t: Tensor, which: str) -> dict[int, Any]:
    """The axes of an input whose size is left open: rows, and with `lengths` that of a sequence."""
    length = which == "lengths" and (t.ndim == 3 or (t.ndim == 2 and not t.is_floating_point()))
    count = 0 if not which else 1 + length
    return {k: Dim.AUTO for k in range(min(t.ndim, count)) if t.shape[k] > 1}


def shapes_by_name(
    net: nn.Module, given: tuple[Any, ...], named: dict[str, Any], dynamic: Any
) -> dict[str, Any] | tuple[Any, ...] | None:
    """The dynamic shapes, one for each argument in order, by the names of the arguments, as
    torch.export wants them.
    """
    if dynamic is None:
        return None
    parameters = inspect.signature(net.forward).parameters
    positional = [p for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
    shapes: dict[str, Any] = {}
    rest = list(dynamic)
    for k in range(len(given)):
        here = positional[min(k, len(positional) - 1)]
        if here.kind is here.VAR_POSITIONAL:
            shapes[here.name] = tuple(rest[: len(given) - k])
            rest = rest[len(given) - k :]
            break
        shapes[here.name] = rest.pop(0)
    keywords = dict(zip(named, rest, strict=True))
    extra = next((p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
    known = {name: shape for name, shape in keywords.items() if name in parameters}
    unknown = {name: shape for name, shape in keywords.items() if name not in parameters}
    return {**shapes, **known, **({extra: unknown} if extra and unknown else {})}


def _is_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context without torch's warnings, and without its fused encoder layers."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    silent = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for logger, was in zip(loggers, silent, strict=True):
            logger.disabled = was


@contextlib.contextmanager
def exportable(net: nn.Module) -> Iterator[None]:
    """A context in which torch.export reads more networks.

    A Hugging Face model does not return its keys and values for later calls, in a class of its own
    that torch.export does not know. An einsum of three tensors and more is computed in their order:
    a better order is chosen by the sizes, which would fix the number of rows. A layer of torch
    applies an attention mask as it is given: its numbers cannot be looked at.
    """
    configs = [getattr(module, "config", None) for module in net.modules()]
    cached = [c for c in configs if getattr(c, "use_cache", False) is True]
    ordered = torch.backends.opt_einsum.enabled
    torch.backends.opt_einsum.enabled = False
    for config in cached:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        with mock.patch.object(transformer, "_detect_is_causal_mask", _is_causal):
            yield
    finally:
        torch.backends.opt_einsum.enabled = ordered
        for config in cached:
            config.use_cache = True  # type: ignore[union-attr]


def _decomposed(program: ExportedProgram, net: nn.Module) -> ExportedProgram:
    """The program in functional form, with composite operations whole.

    Raises:
        ShrinkError: it changes its inputs or its tensors, or has no functional form.
    """
    try:
        with _quiet():
            program = program.run_decompositions({})
    # torch raises errors of many kinds for what it cannot make functional.
    except Exception as error:
        raise ShrinkError(
            f"{type(net).__name__} changes tensors in place in a way that torch.export cannot"
            f" undo ({first_line(error)}); {MASKED}"
        ) from None
    signature = program.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise ShrinkError(f"{type(net).__name__}: the forward changes '{changed[0]}'; {MASKED}")
    return program


def _read(
    program: ExportedProgram, net: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> ExportedGraph:
    graph = program.graph_module.graph
    nodes = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    tensors: dict[fx.Node, tuple[str, Tensor]] = {}
    inputs: list[fx.Node] = []
    for spec in program.graph_signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            held = {**program.constants, **program.state_dict}
            tensors[node] = (str(spec.target), held[str(spec.target)])
        else:
            raise ShrinkError(
                f"{type(net).__name__}: the forward uses '{spec.target}', which is no tensor;"
                f" {MASKED}"
            )
    names = _argument_names(net, given, named)
    where = [(names[int(str(path[0]))], keys) for path, keys in _places((*given, *named.values()))]
    open_rows = all(dynamic_axes(node.meta["val"])[:1] == (True,) for node in inputs)
    spec = program.call_spec.out_spec
    assert spec is not None
    pairs = dict(zip(inputs, where, strict=True))
    return ExportedGraph(graph, tensors, pairs, tuple(names), spec, open_rows)


def _places(arguments: Any) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """For each tensor in the arguments, the argument's number and the keys inside it."""
    from torch.utils._pytree import tree_flatten_with_path

    leaves, _ = tree_flatten_with_path(arguments)
    keys = [tuple(getattr(k, "idx", getattr(k, "key", None)) for k in path) for path, _ in leaves]
    return [(path[:1], path[1:]) for path in keys]


def _argument_names(net: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> list[str]:
    """The name of each argument; those of `*args` are numbered."""
    parameters = list(inspect.signature(net.forward).parameters.values())
    names = []
    for k in range(len(given)):
        here = parameters[min(k, len(parameters) - 1)]
        several = here.kind is here.VAR_POSITIONAL
        names.append(f"{here.name}_{k}" if several or here.name in names else here.name)
    return [*names, *named]


def two_rows(example: Inputs) -> Inputs:
    """The first two rows of each input; the first one twice if there is one only."""
    return of_each(lambda t: t[:2] if len(t) > 1 else t[:1].repeat(2, *[1] * (t.ndim - 1)), example)
