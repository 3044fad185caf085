"""Names that the modules of torch's graphs use themselves, such as `graph`, `code` and `meta`.

A network may have a buffer or a layer of such a name, and torch.export reads it, but cannot make a
module of its graph. Owns `names_of_graphs`, `beside` and `without_clashes`. Next:
`exported_graph.py`.
"""

from __future__ import annotations

from torch import fx, nn


def names_of_graphs() -> set[str]:
    """The attributes that the module of a graph has itself."""
    return set(dir(fx.GraphModule(nn.Module(), fx.Graph())))


def beside(path: str, taken: set[str], present: set[str]) -> str:
    """`path`, with underscores after its first part if that is in `taken`, until it is neither
    there nor in `present`.
    """
    first, dot, rest = path.partition(".")
    if first in taken:
        while first in taken | present:
            first += "_"
    return f"{first}{dot}{rest}"


def without_clashes(net: nn.Module) -> nn.Module:
    """`net`; inside another module if a part of it has one of those names."""
    if not names_of_graphs() & {*net._parameters, *net._buffers, *net._modules}:
        return net
    outer = nn.Module()
    outer.net = net
    outer.forward = net.forward
    return outer.train(net.training)
