"""The numbers of torch's layers, after their tensors are cut.

Owns `kept_groups` and `resize_layer`. Next: `layer_calls.py`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyro_bmr.shrinking.analysis import Analysis
from pyro_bmr.shrinking.states import operation


def kept_groups(analysis: Analysis, node: fx.Node) -> int | None:
    """How many groups of a grouped convolution or norm are kept; None if the node is neither."""
    name = operation(node)
    schema = getattr(node.target, "_schema", None)
    named = dict(zip([a.name for a in schema.arguments], node.args, strict=False)) if schema else {}
    named |= node.kwargs
    if "conv" in name and int(named.get("groups", 1) or 1) > 1:
        ids, count = analysis.states[named["weight"]].axes[0], int(named["groups"])
    elif name == "group_norm":
        ids, count = analysis.states[named["input"]].axes[1], int(named["num_groups"])
    else:
        return None
    return int(analysis.kept(ids).reshape(count, -1).any(1).sum())


def resize_layer(module: Any, groups: int | None) -> None:
    """Makes the numbers of a layer of torch those of its tensors."""
    if isinstance(module, nn.RNNBase) and not module.proj_size:
        own = dict(module.named_parameters())
        module.input_size = own["weight_ih_l0"].shape[1]
        module.hidden_size = own["weight_hh_l0"].shape[1]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    shape = list(weight.shape)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, _ConvNd):
        module.groups = groups or module.groups
        transposed = isinstance(module, _ConvTransposeNd)
        whole, each = shape[0], shape[1] * module.groups
        module.in_channels, module.out_channels = (whole, each) if transposed else (each, whole)
    elif isinstance(module, _NormBase):
        module.num_features = shape[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels, module.num_groups = shape[0], groups or module.num_groups
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = shape
