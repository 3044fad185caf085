"""Attention and encoder layers in steps that can be traced, with the weights of torch's layers.

Owns `with_traceable_attention` and `linear`. Attention with a mask is refused. Next:
`traced_forward.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pyro_bmr.errors import ShrinkError
from pyro_bmr.shrinking.refusals import MASKED


def with_traceable_attention(net: nn.Module) -> nn.Module:
    """`net`, which is changed: its attention and encoder layers are replaced by traceable ones."""
    holder = nn.ModuleDict({"net": net})
    _replace_attention(holder, "")
    return holder["net"]


def _replace_attention(module: nn.Module, path: str) -> None:
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        traceable = _TRACEABLE.get(type(child))
        if traceable is not None:
            setattr(module, name, traceable(child, where.removeprefix("net.")))
        else:
            _replace_attention(child, where)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear layer with these values; no random numbers are drawn."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    layer.bias = None if bias is None else nn.Parameter(bias.clone())  # type: ignore[assignment]
    return layer


class Attention(nn.Module):
    """`nn.MultiheadAttention` in traceable steps. `q`, `k`, `v` and `out` are layers of their own,
    so that heads can be pruned.
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
        out_bias = None if mha.out_proj.bias is None else mha.out_proj.bias.detach()
        self.out = linear(mha.out_proj.weight.detach(), out_bias)
        self.head_dim, self.batch_first, self.path = mha.head_dim, mha.batch_first, path

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Any = None,
        need_weights: bool = True, attn_mask: Any = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if key_padding_mask is not None or attn_mask is not None:
            raise ShrinkError(f"'{self.path}': attention with a mask is not supported; {MASKED}")
        sources = (query, key, value)
        if not self.batch_first:
            sources = (query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer, x in zip((self.q, self.k, self.v), sources, strict=True)
        )
        heads = F.scaled_dot_product_attention(q, k, v)
        y = self.out(heads.transpose(1, 2).flatten(2))
        return (y if self.batch_first else y.transpose(0, 1)), None


class EncoderLayer(nn.Module):
    """`nn.TransformerEncoderLayer` in traceable steps, with the names of its parts."""

    def __init__(self, layer: nn.TransformerEncoderLayer, path: str) -> None:
        super().__init__()
        self.self_attn = Attention(layer.self_attn, f"{path}.self_attn")
        self.linear1, self.linear2 = layer.linear1, layer.linear2
        self.norm1, self.norm2 = layer.norm1, layer.norm2
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
        layers: Any = enumerate(encoder.layers)
        self.layers = nn.ModuleList(
            EncoderLayer(layer, f"{path}.layers.{k}") for k, layer in layers
        )
        self.norm, self.path = encoder.norm, path

    def forward(
        self, src: Tensor, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None
    ) -> Tensor:
        if mask is not None or src_key_padding_mask is not None:
            raise ShrinkError(f"'{self.path}': an encoder with a mask is not supported; {MASKED}")
        for layer in self.layers:
            src = layer(src)
        return src if self.norm is None else self.norm(src)


_TRACEABLE: dict[type[nn.Module], Callable[[Any, str], nn.Module]] = {
    nn.MultiheadAttention: Attention,
    nn.TransformerEncoderLayer: EncoderLayer,
    nn.TransformerEncoder: Encoder,
}
