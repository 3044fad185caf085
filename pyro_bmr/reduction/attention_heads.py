"""The heads of attention layers, by the names of their projections.

Owns `Heads`, the names that are known, `head_labels` and `heads_of`. Next: `groups.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_bmr.checks import is_whole
from pyro_bmr.errors import ReductionError, described

Shapes = Mapping[str, tuple[int, ...]]
Counts = int | Mapping[str, int] | None


@dataclass(frozen=True)
class Heads:
    """Groups that are whole heads of attention layers whose projections have these names below the
    path of the layer: ``reduce(..., per=Heads(("wq", "wk", "wv"), "wo"), heads=8)``.

    A head has its rows of the weights and biases of queries, keys and values, and its columns of
    the weight of `output`. Where keys and values have fewer heads than queries, a head of theirs is
    in one group with all the queries that read it.

    Args:
        inputs: the projections of queries, keys and values, or the one of all three, which has
            first all queries, then all keys, then all values.
        output: the projection of what the heads give.
        transposed: whether the weights are (inputs, outputs), as GPT-2's at Hugging Face.
    """

    inputs: tuple[str, ...]
    output: str
    transposed: bool = False

    def __post_init__(self) -> None:
        inputs, output = self.inputs, self.output
        named = isinstance(inputs, (tuple, list)) and len(inputs) in (1, 3)
        if not named or not all(isinstance(name, str) and name for name in (*inputs, output)):
            raise ReductionError(
                f"{described(self)}: expected the names of three projections, or of one for all"
                " three, and that of the output, as in Heads(('wq', 'wk', 'wv'), 'wo')"
            )


KNOWN = (
    Heads(("self.query", "self.key", "self.value"), "output.dense"),
    Heads(("attention.query", "attention.key", "attention.value"), "output.dense"),
    Heads(("q_proj", "k_proj", "v_proj"), "o_proj"),
    Heads(("q_proj", "k_proj", "v_proj"), "out_proj"),
    Heads(("q_lin", "k_lin", "v_lin"), "out_lin"),
    Heads(("q", "k", "v"), "o"),
    Heads(("qkv",), "proj"),
    Heads(("c_attn",), "c_proj", transposed=True),
)
"""The names in the networks of Hugging Face (BERT and its kin; vision transformers; Llama; BART,
OPT and CLIP; DistilBERT; T5; GPT-2) and of timm (``qkv``). torch's own attention is known as well.
"""

_TORCH_INPUTS = (
    *("in_proj_weight", "in_proj_bias"),
    *("q_proj_weight", "k_proj_weight", "v_proj_weight"),
)


_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")
"""The attributes that have the number of heads."""


@dataclass(frozen=True)
class _Side:
    """One site of a layer. `axis`: along which its heads lie; `parts`: how many widths it has
    there, 3 of queries, keys and values in one; `reads`: whether it belongs to keys or values.
    """

    name: str
    axis: int
    parts: int = 1
    reads: bool = False


def head_labels(shapes: Shapes, heads: Counts, names: Heads | None = None) -> dict[str, Tensor]:
    """Site → the number of each entry's head, unique over the layers; −1 for what is of no head.

    Args:
        heads: how many the queries have, in all layers, or by the path of a layer, of those layers
            alone.
        names: of the projections; None for torch's attention and the `KNOWN` names.

    Raises:
        ReductionError: there is no such layer, or the heads do not divide its widths.
    """
    layers = dict(_layers(shapes, names))
    if isinstance(heads, Mapping) and not layers.keys().isdisjoint(heads):
        layers = {path: sides for path, sides in layers.items() if path in heads}
    if not layers:
        raise ReductionError(
            "per: no site is a projection of an attention layer"
            + (f" with the names of {names}" if names else "")
            + f"; the sites are: {', '.join(shapes)}; name the projections, as in"
            " per=Heads(('wq', 'wk', 'wv'), 'wo'), or pass labels of your own"
        )
    labels, used = {name: torch.tensor(-1).expand(shape) for name, shape in shapes.items()}, 0
    for path, sides in layers.items():
        count = heads.get(path) if isinstance(heads, Mapping) else heads
        if count is not None and not is_whole(count, 1):
            raise ReductionError(f"heads={described(count)}: expected a whole number > 0")
        if count is None:
            raise ReductionError(
                f"per='head': how many heads has '{path}'? pass heads=8, or heads={{'{path}': 8}}"
            )
        width = _width(shapes, sides, count)
        here = {side.name: shapes[side.name][side.axis] // side.parts // width for side in sides}
        groups = min(here.values())
        for side in sides:
            shape, own = shapes[side.name], here[side.name]
            head = torch.arange(shape[side.axis]) // width % own
            before, after = (1,) * side.axis, (1,) * (len(shape) - side.axis - 1)
            group = (head * groups // own + used).view(*before, -1, *after)
            labels[side.name] = group.expand(shape)
        used += groups
    return labels


def _width(shapes: Shapes, sides: list[_Side], count: int) -> int:
    """The width of a head, which the heads of keys and values have too."""
    queries = next(side for side in sides if not side.reads)
    whole = shapes[queries.name][queries.axis] // queries.parts
    width = whole // count if count > 0 and whole % count == 0 else 0
    for side in sides:
        own = shapes[side.name][side.axis] // side.parts
        if not width or own % width or count % (own // width):
            raise ReductionError(
                f"heads={count}: the width {own} of site '{side.name}' does not divide into so many"
                " heads"
            )
    return width


def _layers(shapes: Shapes, names: Heads | None) -> Iterator[tuple[str, list[_Side]]]:
    """The path of each attention layer, and its sites."""
    if names is None:
        found: dict[str, list[_Side]] = {}
        for name in shapes:
            path, _, leaf = name.rpartition(".")
            if leaf in _TORCH_INPUTS:
                parts = 3 if leaf.startswith("in_proj") else 1
                found.setdefault(path, []).append(_Side(name, 0, parts, leaf[0] in "kv"))
        for path, sides in found.items():
            output = f"{path}.out_proj.weight".removeprefix(".")
            yield path, [*sides, *([_Side(output, 1)] if output in shapes else [])]
    for each in KNOWN if names is None else (names,):
        yield from _named(shapes, each, names is None)


def _named(shapes: Shapes, names: Heads, known: bool) -> Iterator[tuple[str, list[_Side]]]:
    first, parts = names.inputs[0], 3 if len(names.inputs) == 1 else 1
    for site in shapes:
        if not f".{site}".endswith(f".{first}.weight"):
            continue
        path = site[: -len(f"{first}.weight")]
        weights = [f"{path}{name}.weight" for name in (*names.inputs, names.output)]
        if any(len(shapes.get(name, ())) != 2 for name in weights):
            continue
        rows, columns = (1, 0) if names.transposed else (0, 1)
        if parts == 3 and shapes[weights[0]][rows] != 3 * shapes[weights[-1]][columns]:
            if known:  # such as the keys and values of cross attention
                continue
            raise ReductionError(
                f"{names}: expected '{weights[0]}' to have three times the {names.output} width"
                f" {shapes[weights[-1]][columns]}, got {shapes[weights[0]][rows]}; queries, keys"
                " and values in one must have as many heads, else pass labels of your own"
            )
        sides = [_Side(weights[-1], columns)]
        for name in names.inputs:
            reads = name != first
            sides.append(_Side(f"{path}{name}.weight", rows, parts, reads))
            if f"{path}{name}.bias" in shapes:
                sides.append(_Side(f"{path}{name}.bias", 0, parts, reads))
        yield path.removesuffix("."), sides


def heads_of(net: nn.Module) -> dict[str, int]:
    """Module path → the number of heads that the module there, or one below it, says it has."""
    found: dict[str, int] = {}
    for path, module in net.named_modules():
        for source in (module, getattr(module, "config", None)):
            count = next((c for c in (getattr(source, n, None) for n in _COUNTS) if c), None)
            if isinstance(count, int):
                parts = path.split(".")
                for k in range(len(parts), 0, -1):
                    found.setdefault(".".join(parts[:k]), count)
                break
    return found
