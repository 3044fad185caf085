"""Layers cut to the channels that are kept, with constants folded into biases.

Owns `resized_layer` and `weight_shape`. Next: `rebuilding.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_bmr.shrinking.attention import linear
from pyro_bmr.shrinking.channels import Channels
from pyro_bmr.shrinking.ties import Read


def resized_layer(
    channels: Channels, node: fx.Node, layer: nn.Module, read: Read | None
) -> nn.Module:
    """A copy of `layer` with the channels that are kept; `read`: its entry, if it weights channels.

    Parameters that were frozen are frozen in the copy.
    """
    small = _resized(channels, node, layer, read)
    before = dict(layer.named_parameters())
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(before[name].requires_grad if name in before else True)
    return small


def _resized(channels: Channels, node: fx.Node, layer: nn.Module, read: Read | None) -> nn.Module:
    if read is not None:
        return _weighting(channels, layer, read)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)) and layer.groups == layer.in_channels:
        kept, bias = _kept(channels, node, 1), layer.bias
        groups = int(_kept(channels, _source(node), 1).sum())
        weights = layer.weight.detach()[kept]
        return _convolution(layer, weights, None if bias is None else bias.detach()[kept], groups)
    if isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        return _prelu(layer, _kept(channels, node, 1))
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return _batch_norm(layer, _kept(channels, node, 1))
    if isinstance(layer, nn.Embedding):
        rows = layer.weight.detach()[:, _kept(channels, node, -1)].clone()
        return nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=layer.padding_idx)
    return copy.deepcopy(layer)


def weight_shape(channels: Channels, layer: Any, node: fx.Node) -> list[int]:
    """The shape of the weight of `layer`, cut to the channels that are kept."""
    before = list(layer.weight.shape)
    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        axis = -1 if isinstance(layer, nn.Linear) else 1
        outputs = int(_kept(channels, node, axis).sum())
        inputs = int(_kept(channels, _source(node), axis).sum())
        return [outputs, inputs if getattr(layer, "groups", 1) == 1 else before[1], *before[2:]]
    if isinstance(layer, nn.Embedding):
        return [before[0], int(_kept(channels, node, -1).sum())]
    per_channel = isinstance(layer, nn.PReLU) and layer.num_parameters > 1
    if per_channel or isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return [int(_kept(channels, node, 1).sum())]
    return before


def _kept(channels: Channels, node: fx.Node, axis: int) -> Tensor:
    """Which positions of an axis of the value at `node` are kept."""
    return torch.from_numpy(channels.kept(channels.states[node].axes[axis]))


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _weighting(channels: Channels, layer: Any, read: Read) -> nn.Module:
    """A Linear or convolution layer, cut: b' = b + W[:, pruned] c for the constants c it read."""
    inputs, outputs = (torch.from_numpy(channels.kept(ids)) for ids in (read.inputs, read.outputs))
    weight: Tensor = layer.weight.detach()
    bias: Tensor | None = None if layer.bias is None else layer.bias.detach()
    totals = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    folded = totals[:, ~inputs] @ read.level[~inputs].to(weight.dtype)
    if bool(folded.any()):
        bias = folded if bias is None else bias + folded
    weight, bias = weight[outputs][:, inputs], None if bias is None else bias[outputs]
    return (
        linear(weight, bias)
        if isinstance(layer, nn.Linear)
        else _convolution(layer, weight, bias, 1)
    )


def _convolution(layer: Any, weight: Tensor, bias: Tensor | None, groups: int) -> nn.Module:
    small: Any = type(layer)(
        weight.shape[1] * groups,
        weight.shape[0],
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        groups,
        bias is not None,
        layer.padding_mode,
        device="meta",
    )
    small.weight = nn.Parameter(weight.clone())
    small.bias = None if bias is None else nn.Parameter(bias.clone())
    return small


def _prelu(layer: nn.PReLU, kept: Tensor) -> nn.PReLU:
    slopes = layer.weight.detach()[kept].clone()
    small = nn.PReLU(len(slopes), device="meta")
    small.weight = nn.Parameter(slopes)
    return small


def _batch_norm(layer: Any, kept: Tensor) -> nn.Module:
    like = {"device": layer.running_mean.device, "dtype": layer.running_mean.dtype}
    small: nn.Module = type(layer)(int(kept.sum()), layer.eps, layer.momentum, layer.affine, **like)
    state = layer.state_dict()
    small.load_state_dict({k: v[kept] if v.ndim else v for k, v in state.items()})
    return small
