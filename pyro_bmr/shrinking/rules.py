"""Which rule is for which operation of torch.export's graph.

An operation without a rule is not refused: what it reads is kept whole. Owns `state_after` and
`OPERATIONS`, the table that the page about smaller networks shows. Next: `analysis.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.shrinking import (
    contractions,
    elementwise,
    movement,
    normalisations,
    products,
    recurrent,
)
from pyro_bmr.shrinking.channel_ids import ChannelIds
from pyro_bmr.shrinking.states import Call, State, state_of

_ENTRY_BY_ENTRY = {
    "dropout", "alpha_dropout", "feature_dropout", "native_dropout", "to", "_to_copy", "type_as",
    "clone", "alias", "detach", "contiguous", "lift_fresh_copy", "lift", "masked_fill", "glu_",
    "hardswish", "log_sigmoid", "where", "rsub", "silu", "gelu", "view_as_real_", "float", "double",
    "half", "bool", "mish", "tanh", "sigmoid", "addcmul", "addcdiv", "lerp", "threshold",
    "result_type", "relu6", "rrelu", "_assert_tensor_metadata", "nan_to_num", "ones_like",
    "zeros_like", "full_like", "_conj", "conj", "resolve_conj", "real", "imag", "complex",
}  # fmt: skip
_SUMS = {"sum", "mean"}
_ALONG = {
    "softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod",
    "logcumsumexp", "sort", "argsort", "topk", "argmax", "argmin", "amax", "amin", "max", "min",
    "std", "var", "var_mean", "std_mean", "linalg_vector_norm", "norm", "prod", "logsumexp", "any",
    "all", "median", "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "cummax", "cummin",
    "_fft_r2c", "_fft_c2r", "_fft_c2c", "frobenius_norm", "nansum", "count_nonzero", "aminmax",
    "fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "kthvalue",
}  # fmt: skip
_POOLS = re.compile(
    r"(adaptive_)?(avg|max)_pool([123])d(_with_indices)?|lp_pool([123])d|"
    r"upsample_\w*?([123])d|_upsample_\w*?([123])d|_adaptive_avg_pool([123])d|"
    r"(reflection|replication)_pad([123])d"
)
_CONVOLUTIONS = re.compile(r"convolution|conv(_transpose)?[123]d|_convolution|conv_tbc_")
_PADS = {"pad", "constant_pad_nd"}

OPERATIONS = {
    "products and sums": "linear, matmul, bmm, mm, mv, addmm, baddbmm, einsum, bilinear, conv1d,"
    " conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d, sum, mean",
    "entry by entry": "activations, arithmetic, comparisons, where, masked_fill, dropout, casts",
    "norms": "batch_norm, layer_norm, rms_norm, group_norm, instance_norm",
    "attention": "scaled_dot_product_attention, with masks and grouped heads",
    "moved": "view, reshape, flatten, permute, transpose, expand, slice, select, split, chunk,"
    " unbind, cat, stack, pad, roll, flip, repeat, unfold, im2col, pixel_shuffle",
    "pixel by pixel": "pooling, upsampling, reflecting and replicating pads",
    "tables": "embedding, embedding_bag, index, index_select",
    "along an axis": "softmax, cumsum, sort, topk, max, min, std, var, norms, fft",
    "recurrent": "lstm, gru, rnn_tanh, rnn_relu",
    "whole": "every other operation: what it reads is kept",
}


def state_after(
    ids: ChannelIds, call: Call, reads: contractions.Reads, reasons: dict[str, str]
) -> Any:
    """The state of what an operation returns; all that it reads is kept if it has no rule."""
    found = recurrent.one_state(ids, call)
    if found is None:
        found = _by_name(ids, call, reads, reasons)
    if found is not None:
        return found
    if call.name in recurrent.GATES:
        kind = call.name.partition("_")[0].upper()
        reasons[call.layer] = f"the units of this {kind} are kept"
    why = f"'{call.name}' in {call.layer or 'forward'} is kept whole"
    return elementwise.opaque(ids, call, why)


def _by_name(
    ids: ChannelIds, call: Call, reads: contractions.Reads, reasons: dict[str, str]
) -> Any:
    name, first = call.name, call.args[0] if call.args else None
    if name in _SPECIAL:
        return _SPECIAL[name](ids, call)
    if name in _READS:
        return _READS[name](ids, call, reads)
    if _CONVOLUTIONS.fullmatch(name) and all(s.value.ndim > 2 for s in call.states[:2]):
        return contractions.convolution(ids, call, reads)
    if name in ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"):
        return normalisations.layer_norm(ids, call, reasons)
    if name in ("group_norm", "instance_norm"):
        return normalisations.group_norm(ids, call, reasons)
    if isinstance(first, State) and name in movement.MOVES and len(call.states) == 1:
        return movement.moved(ids, call)
    if isinstance(first, State) and name in movement.MOVES and name.endswith("_as"):
        for state in call.states[1:]:
            for axis in state.axes:
                ids.fix(axis, "its sizes are used")
    if (match := _POOLS.fullmatch(name)) and isinstance(first, State):
        space = int(next(g for g in match.groups() if g and g.isdigit()))
        return normalisations.pooled(ids, call, space)
    if name in _ALONG and isinstance(first, State) and len(call.states) == 1:
        dims = call.argument("dim")
        every = dims is None or dims == []
        dims = range(first.value.ndim) if every else [dims] if isinstance(dims, int) else dims
        return normalisations.coupled(ids, call, dims, reasons)
    return _entry_by_entry(ids, call)


def _entry_by_entry(ids: ChannelIds, call: Call) -> Any:
    target: Any = call.node.target
    tagged = torch.Tag.pointwise in getattr(target, "tags", ())
    if not (tagged or call.name in _ENTRY_BY_ENTRY) or not call.states:
        return None
    if "dropout" in call.name and call.argument("train", call.argument("training", False)):
        return None
    value = call.values()
    shapes = [state.shape for state in call.states]
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(
        torch.broadcast_shapes(*shapes)
    ):
        return None
    return elementwise.elementwise(ids, call)


def _glu(ids: ChannelIds, call: Call) -> State:
    """a · σ(b), where a and b are the halves of an axis."""
    x = call.states[0]
    dim = call.argument("dim", -1) % x.value.ndim
    a, b = np_halves(x, dim)
    ids.tie(a, b)
    gate, level = x.unknown.chunk(2, dim), x.value.chunk(2, dim)[0]
    unknown = (gate[0] | gate[1]) & (gate[0] | (level != 0))
    return state_of(call.values(), unknown, (*x.axes[:dim], a, *x.axes[dim + 1 :]))


def np_halves(x: State, dim: int) -> Any:
    """The channels of the two halves of an axis."""
    half = len(x.axes[dim]) // 2
    return x.axes[dim][:half], x.axes[dim][half:]


_SPECIAL: dict[str, Callable[[ChannelIds, Call], Any]] = {
    "prelu": elementwise.prelu,
    "_prelu_kernel": lambda ids, call: None,
    "batch_norm": elementwise.batch_norm,
    "_native_batch_norm_legit_no_training": elementwise.batch_norm,
    "embedding": normalisations.embedding,
    "embedding_bag": normalisations.embedding,
    "index": movement.indexed,
    "index_select": movement.indexed,
    "cat": movement.joined,
    "concat": movement.joined,
    "stack": movement.joined,
    "pad": movement.padded,
    "constant_pad_nd": movement.padded,
    "glu": _glu,
}
_READS: dict[str, Callable[[ChannelIds, Call, contractions.Reads], Any]] = {
    "linear": contractions.linear,
    "matmul": products.matmul,
    "bmm": products.matmul,
    "mm": products.matmul,
    "mv": products.matmul,
    "dot": products.matmul,
    "addmm": products.matmul,
    "baddbmm": products.matmul,
    "einsum": products.einsum,
    "bilinear": products.bilinear,
    "scaled_dot_product_attention": normalisations.attention,
    "sum": contractions.reduced_sum,
    "mean": contractions.reduced_sum,
    **dict.fromkeys(recurrent.GATES, recurrent.recurrent),
}
