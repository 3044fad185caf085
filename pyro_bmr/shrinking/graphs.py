"""A network as a graph of plain torch operations: attention and encoder layers opened up, control
flow that depends on data refused.

Owns `trace` and `foreign_errors`. What each operation means for channels is in `channels.py`; the
smaller network is built in `rebuilding.py`. Next: `ties.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_bmr.errors import PyroBMRError, ShrinkError

MASKED = (
    "the masked network (zeros in tensors of the old shape, as `export` gives it) is the answer"
    " here"
)


@contextmanager
def foreign_errors(what: str) -> Iterator[None]:
    """Inside it an error that is not the library's own becomes a ShrinkError that says of what."""
    try:
        yield
    except PyroBMRError:
        raise
    # whatever an operation raises that the analysis meets for the first time
    except Exception as error:
        raise ShrinkError(
            f"{what} cannot be read ({type(error).__name__}: {first_line(error)}); {MASKED}"
        ) from None


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().split("\n")[0][:200]


class Attention(nn.Module):
    """`nn.MultiheadAttention` in traceable steps, with `q`, `k`, `v` and `out` as layers of their
    own, so that heads can go.
    """

    def __init__(self, mha: nn.MultiheadAttention, path: str) -> None:
        super().__init__()
        if mha.bias_k is not None or mha.bias_v is not None or mha.add_zero_attn:
            raise ShrinkError(
                f"'{path}': attention with add_bias_kv or add_zero_attn is not supported; {MASKED}"
            )
        if mha.in_proj_weight is not None:
            weights = mha.in_proj_weight.detach().chunk(3)
        else:
            weights = tuple(getattr(mha, f"{name}_proj_weight").detach() for name in "qkv")
        biases = mha.in_proj_bias.detach().chunk(3) if mha.in_proj_bias is not None else (None,) * 3
        self.q, self.k, self.v = (linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out = linear(
            mha.out_proj.weight.detach(),
            None if mha.out_proj.bias is None else mha.out_proj.bias.detach(),
        )
        self.head_dim, self.batch_first, self.path = mha.head_dim, mha.batch_first, path

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Any = None,
        need_weights: bool = True, attn_mask: Any = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if key_padding_mask is not None or attn_mask is not None:
            raise ShrinkError(f"'{self.path}': attention with a mask is not supported; {MASKED}")
        sources = (
            (query, key, value)
            if self.batch_first
            else tuple(t.transpose(0, 1) for t in (query, key, value))
        )
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer, x in zip((self.q, self.k, self.v), sources, strict=True)
        )
        y = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (y if self.batch_first else y.transpose(0, 1)), None


class EncoderLayer(nn.Module):
    """`nn.TransformerEncoderLayer` in traceable steps, with the names of its parts."""

    def __init__(self, layer: nn.TransformerEncoderLayer, path: str) -> None:
        super().__init__()
        self.self_attn = Attention(layer.self_attn, f"{path}.self_attn")
        self.linear1, self.linear2, self.norm1, self.norm2 = (
            layer.linear1,
            layer.linear2,
            layer.norm1,
            layer.norm2,
        )
        self.activation, self.norm_first, self.path = layer.activation, layer.norm_first, path

    def forward(
        self,
        src: Tensor,
        src_mask: Any = None,
        src_key_padding_mask: Any = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src_mask is not None or src_key_padding_mask is not None:
            raise ShrinkError(
                f"'{self.path}': an encoder layer with a mask is not supported; {MASKED}"
            )
        x = src
        if self.norm_first:
            y = self.norm1(x)
            x = x + self.self_attn(y, y, y)[0]
            return x + self.linear2(self.activation(self.linear1(self.norm2(x))))
        x = self.norm1(x + self.self_attn(x, x, x)[0])
        return self.norm2(x + self.linear2(self.activation(self.linear1(x))))


class Encoder(nn.Module):
    """`nn.TransformerEncoder` in traceable steps."""

    def __init__(self, encoder: nn.TransformerEncoder, path: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(layer, f"{path}.layers.{k}") for k, layer in enumerate(encoder.layers)
        )  # type: ignore[arg-type]
        self.norm, self.path = encoder.norm, path

    def forward(
        self, src: Tensor, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None
    ) -> Tensor:
        if mask is not None or src_key_padding_mask is not None:
            raise ShrinkError(f"'{self.path}': an encoder with a mask is not supported; {MASKED}")
        for layer in self.layers:
            src = layer(src)
        return src if self.norm is None else self.norm(src)


_OPENED: dict[type[nn.Module], Callable[[Any, str], nn.Module]] = {
    nn.MultiheadAttention: Attention,
    nn.TransformerEncoderLayer: EncoderLayer,
    nn.TransformerEncoder: Encoder,
}


def trace(net: nn.Module) -> fx.GraphModule:
    """The graph of `net`, which is changed: attention and encoder layers are replaced by traceable
    ones.

    Raises:
        ShrinkError: the control flow of the network depends on the data, or a part has no traceable
            form.
    """
    holder = nn.ModuleDict({"net": net})
    _open(holder, "")
    root = holder["net"]
    if type(root).__module__.startswith("torch.nn") and not isinstance(root, nn.Sequential):
        root = nn.Sequential(root)  # a single layer
    name = type(root).__name__
    try:
        argument = _read_one_input(root)
        graph = fx.symbolic_trace(root.eval())
    except ShrinkError:
        raise
    except Exception as error:  # whatever a user's forward raises when it meets a proxy
        raise ShrinkError(
            f"{name} cannot be traced, its control flow depends on the data or on shapes"
            f" ({first_line(error)}); {MASKED}"
        ) from None
    for node in graph.graph.nodes:
        node.type = None  # annotations name what the graph does not know
        if node.op == "placeholder" and argument is not None:
            node.target = argument
    graph.recompile()
    return graph


def other_arguments(net: nn.Module) -> tuple[str, bool]:
    """The name of the argument of `net` that is its input, and whether there are others, which all
    have defaults.

    Raises:
        ShrinkError: the network wants more than one.
    """
    _, first, *others = inspect.signature(type(net).forward).parameters.values()
    several = [
        p.name
        for p in others
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if several:
        raise ShrinkError(
            f"{type(net).__name__}.forward wants {', '.join([first.name, *several])}; networks of"
            f" one input tensor are supported; {MASKED}"
        )
    return first.name, bool(others)


def _read_one_input(root: nn.Module) -> str | None:
    """Leaves `root` a forward of its input alone, whose name is given back, if it had others: a
    flag at its default is no value of the data.
    """
    name, others = other_arguments(root)
    if not others:
        return None
    plain = type(root)

    def forward(self: nn.Module, x: Tensor) -> Any:
        return plain.forward(self, x)

    root.__class__ = type(plain.__name__, (plain,), {"forward": forward})
    return name


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear layer of these values, without drawing others first."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    layer.bias = None if bias is None else nn.Parameter(bias.clone())  # type: ignore[assignment]
    return layer


def _open(module: nn.Module, path: str) -> None:
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        maker = _OPENED.get(type(child))
        if maker is not None:
            setattr(module, name, maker(child, where.removeprefix("net.")))
        else:
            _open(child, where)


def values_of(graph: fx.GraphModule, x: Tensor) -> dict[fx.Node, Any]:
    """Node → its value when the network runs on `x`."""

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    seen: dict[fx.Node, Any] = {}
    with torch.no_grad():
        Recorder(graph).run(x)
    return seen
