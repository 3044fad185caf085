"""The class of a network as readable Python that needs torch alone: its layers and its forward.

Owns `network_source`. The loaders are in `loaders_source.py`. Next: `formats.py`.
"""

from __future__ import annotations

import builtins
import re

import torch
from torch import fx, nn

from pyro_bmr.errors import ModelError
from pyro_bmr.exporting.loaders_source import python_file

# Names that torch.fx uses in a forward, and how they are imported.
_IMPORTS = {
    "inf": "from math import inf",
    "nan": "from math import nan",
    "device": "from torch import device",
}


def network_source(graph: fx.GraphModule, title: str, version: str) -> str:
    """The text of a Python file with the class `Network` and the loaders of all formats.

    The state_dict of the class has the keys of `graph`.

    Raises:
        ModelError: a layer, or an operation of the forward, cannot be written as a line of Python.
    """
    parts = [n for n in graph.graph.nodes if n.op in ("call_module", "get_attr")]
    names = list(dict.fromkeys(str(n.target) for n in parts))
    lines = {name: _constructor(name, graph) for name in names}
    chain = all(
        n.op == "placeholder" or (n.op in ("call_module", "output") and n.args == (n.prev,))
        for n in graph.graph.nodes
    )
    if chain and len(names) == len(parts) and not any("." in name for name in names):
        return python_file(title, version, _sequential(lines))
    forward, imports = _forward(graph)
    return python_file(title, version, _module(lines, forward), imports)


def _sequential(lines: dict[str, str]) -> str:
    """A class that is a chain of layers; `lines`: name → constructor."""
    layers = "\n".join(f'            ("{name}", {line}),' for name, line in lines.items())
    return (
        "class Network(nn.Sequential):\n    def __init__(self):\n       "
        f" super().__init__(OrderedDict([\n{layers}\n        ]))\n"
    )


def _module(lines: dict[str, str], forward: str) -> str:
    """A class with this `forward`; `lines`: name → constructor of a layer or tensor."""
    made, body = set[str](), []
    for name, line in lines.items():
        path = name.split(".")
        for k in range(1, len(path)):
            if (inner := ".".join(path[:k])) not in made:
                made.add(inner)
                body.append(_assignment(inner, "nn.Module()"))
        body.append(_assignment(name, line))
    head = "class Network(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    return head + "\n".join(body) + f"\n\n{forward}\n"


def _forward(graph: fx.GraphModule) -> tuple[str, list[str]]:
    """The forward of the graph as an indented method, and the imports that it needs."""
    forward = graph.graph.python_code("self")
    used = {
        key: value
        for key, value in forward.globals.items()
        if key not in ("torch", "NoneType") and re.search(rf"\b{key}\b", forward.src)
    }
    for key, value in used.items():
        if key not in _IMPORTS and value is not getattr(builtins, key, None):
            raise ModelError(f"the forward uses '{key}', which is not torch's")
    lines = [f"    {line}" for line in _without_annotations(forward.src).splitlines()]
    return "\n".join(lines), [line for key, line in _IMPORTS.items() if key in used]


def _without_annotations(source: str) -> str:
    """The forward that torch.fx has written, without types, comments and `x = None`."""
    text = re.sub(r";  ?[\w, ]+(= [\w]+ )*= None", "", source).strip()
    signature = r"^def forward\(self, (\w+)[^)]*\)[^:]*:"
    text = re.sub(signature, r"def forward(self, \1):", text, flags=re.M)
    text = "\n".join(line.split("  #")[0].rstrip() for line in text.splitlines() if line.strip())
    function = r"torch\._C\._nn\.(\w+)|torch\.nn\.functional\.(\w+)"
    return re.sub(function, lambda m: f"nn.functional.{m[1] or m[2]}", text)


def _assignment(name: str, value: str) -> str:
    """The line of `__init__` that gives the part `name` its value."""
    *path, last = name.split(".")
    where = "self"
    for step in path:
        where = f"{where}.{step}" if step.isidentifier() else f'getattr({where}, "{step}")'
    if value.startswith("torch."):
        return f'        {where}.register_buffer("{last}", {value})'
    if value.startswith("nn.Parameter(") and not last.isidentifier():
        return f'        {where}.register_parameter("{last}", {value})'
    if last.isidentifier():
        return f"        {where}.{last} = {value}"
    return f'        {where}.add_module("{last}", {value})'


def _constructor(name: str, graph: fx.GraphModule) -> str:
    """The layer or tensor of this name as an expression."""
    parent, _, last = name.rpartition(".")
    part = getattr(graph.get_submodule(parent), last)
    if isinstance(part, torch.Tensor):
        empty = f"torch.empty({tuple(part.shape)}, dtype={part.dtype})"
        if not isinstance(part, nn.Parameter):
            return empty
        return f"nn.Parameter({empty}{'' if part.requires_grad else ', requires_grad=False'})"
    # torch prints the mode without quotes
    line = re.sub(r"padding_mode=(\w+)", r'padding_mode="\1"', f"nn.{part!r}")
    kind = type(part)
    if kind.__module__.startswith("torch.nn") and "\n" not in line and hasattr(nn, kind.__name__):
        return line
    raise ModelError(f"layer '{name}' ({kind.__name__}) cannot be written as a line of Python")
