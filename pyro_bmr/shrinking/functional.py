"""Operations in place, made functional; blocks without gradients, put in line.

Owns `make_functional` and `inline_blocks`. Next: `graph_names.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def make_functional(module: fx.GraphModule) -> bool:
    """Replaces each operation in place by the one that returns a new tensor, and says whether all
    could be.

    An operation can be replaced if no view of its tensor is in use: what reads the tensor
    later reads the new one. If one cannot, the rest is left as it was.
    """
    graph = module.graph
    order = {node: k for k, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _changes_its_input(node):
            continue
        target = _functional(node)
        base = node.args[0]
        if target is None or not isinstance(base, fx.Node) or not _only_one(base, node):
            return False
        with graph.inserting_before(node):
            new = graph.call_function(target, node.args, node.kwargs)
        new.meta = dict(node.meta)
        order[new] = order[node]
        later = [user for user in base.users if user is not new and order[user] > order[node]]
        for user in later:
            user.replace_input_with(base, new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return True


def _changes_its_input(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _functional(node: fx.Node) -> Any:
    """The operation that returns what `node` writes; None if there is none."""
    target: Any = node.target
    name = target.overloadpacket.__name__
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    found = getattr(packet, target._overloadname, None) if packet is not None else None
    if found is None or [a.name for a in found._schema.arguments] != [
        a.name for a in target._schema.arguments
    ]:
        return None
    return found


def _is_view(node: fx.Node) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return any(r.alias_info is not None for r in returns) and not _changes_its_input(node)


def _only_one(base: fx.Node, node: fx.Node) -> bool:
    """Whether `base` is a tensor of its own, of which no other view is in use."""
    if any(user is not node and _is_view(user) for user in base.users):
        return False
    if base.op != "call_function" or getattr(base.target, "_schema", None) is None:
        return False
    if not _is_view(base):
        return True
    source = base.args[0]
    return isinstance(source, fx.Node) and len(source.users) == 1 and _only_one(source, base)


def inline_blocks(module: fx.GraphModule) -> None:
    """Puts the operations of blocks such as `torch.no_grad()` and autocast in their place."""
    graph = module.graph
    for node in list(graph.nodes):
        name = str(getattr(node.target, "__name__", node.target))
        if node.op != "call_function" or name not in (
            "wrap_with_set_grad_enabled", "wrap_with_autocast",
        ):  # fmt: skip
            continue
        at = next(
            k for k, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"
        )
        block = node.args[at]
        inner = getattr(module, str(block.target))  # type: ignore[union-attr]
        inline_blocks(inner)
        given = dict(
            zip(
                (n for n in inner.graph.nodes if n.op == "placeholder"),
                node.args[at + 1 :],
                strict=True,
            )
        )
        with graph.inserting_before(node):
            results: Any = graph.graph_copy(inner.graph, given)  # type: ignore[arg-type]
        results = results if isinstance(results, (tuple, list)) else (results,)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(node)
        if not block.users:  # type: ignore[union-attr]
            graph.erase_node(block)  # type: ignore[arg-type]
