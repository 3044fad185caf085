"""Which entries of which sites are pruned or kept together: the group of each entry, as an integer
tensor in the shape of its site.

Owns `group_labels`, which makes them of a word such as "unit", and the patterns `Block` and `NofM`.
Imports torch only. Next: `label_sums.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError, described, holds
from pyro_bmr.reduction.attention_heads import Heads, head_labels

Shapes = Mapping[str, tuple[int, ...]]

GROUPS = ("unit", "channel", "input", "head", "layer")
"""The groups that `group_labels` knows by name."""

_RECURRENT = re.compile(r"(weight|bias)_(ih|hh)")


@dataclass(frozen=True)
class Block:
    """Groups that are tiles of `rows` × `columns` entries of a matrix (out, in·...), for
    block-sparse kernels.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if not holds(lambda r, c: r >= 1 and c >= 1, self.rows, self.columns):
            raise ReductionError(f"{described(self)}: a tile has at least one row and one column")


@dataclass(frozen=True)
class NofM:
    """`n` of every `m` neighbours along the inputs of a matrix (out, in·...) are kept: those with
    the smallest ΔF of being zero. NofM(2, 4) is the 2:4 pattern.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not holds(lambda n, m: 0 < n < m, self.n, self.m):
            raise ReductionError(
                f"NofM: expected 0 < n < m, as in NofM(2, 4), got {described(self)}"
            )

    def mask(self, drop: Tensor) -> Tensor:
        """True for the n entries of each m with the smallest `drop`; pruned entries (infinite
        `drop_log_odds`) stay pruned, vectors are left whole.

        Raises:
            ReductionError: the inputs of the matrix do not divide by m.
        """
        if drop.ndim < 2:
            return drop.isfinite() | (drop < 0)
        rows = drop.flatten(1)
        if rows.shape[1] % self.m:
            raise ReductionError(
                f"{rows.shape[1]} inputs do not divide by m = {self.m}; leave the site out with"
                " to={'<site>': None, ...}"
            )
        tiles = rows.unflatten(1, (-1, self.m))
        rank = tiles.argsort(dim=-1, stable=True).argsort(dim=-1)
        return ((rank < self.n) & (tiles < math.inf)).view(drop.shape)

    def undivided(self, shapes: Shapes) -> dict[str, int]:
        """The matrices whose inputs m does not divide, with the number of their inputs."""
        inputs = {name: math.prod(shape[1:]) for name, shape in shapes.items() if len(shape) > 1}
        return {name: count for name, count in inputs.items() if count % self.m}

    def left_out(self, shapes: Shapes) -> str | None:
        """What to say of those, which the pattern leaves as they are; None if there are none."""
        listed = [
            f"site '{name}' ({count} inputs)" for name, count in self.undivided(shapes).items()
        ]
        if not listed:
            return None
        more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        return (
            f"NofM({self.n}, {self.m}) leaves {', '.join(listed[:5])}{more} out: the inputs do not"
            f" divide by m = {self.m}"
        )


def group_labels(
    shapes: Shapes,
    per: str | Block | Heads | Mapping[str, Tensor],
    heads: int | Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Site → the number of each entry's group, −1 for entries that are in none and kept. Groups may
    have entries in several sites.

    Args:
        shapes: site → shape.
        per: what a group is.

            - ``"unit"`` or ``"channel"``: the weights into one output unit or channel, `weight[i]`
              of a site (out, in, ...), with its bias, the entry i of the site of the same module
              path that ends in ``bias``. A unit of a recurrent layer (``weight_ih_l0``, ...) has
              the rows of all its gates, from the inputs and from the other units, with its biases.
              Entries of other vectors are groups of their own.
            - ``"input"``: the weights out of one input, `weight[:, j]`. Vectors are in no group.
            - ``"head"``: a head of a `torch.nn.MultiheadAttention`, or of an attention layer whose
              projections have the names of Hugging Face or timm (`attention_heads.KNOWN`): its rows
              of the projections of query, key and value, its entries of their bias, and its columns
              of the output projection's weight. All other entries are in no group. `Heads` names
              other projections.
            - ``"layer"``: all sites of one module path.
            - `Block`: a tile of a matrix. Vectors are in no group.
            - a mapping from sites to integer tensors that broadcast to the site: entries with one
              number, in whatever site, are one group; negative: in none.
        heads: for ``"head"`` and `Heads`: the number of heads, of all attention layers, or module
            path → number, of these layers.

    Raises:
        ReductionError: `per` is none of these, a label does not fit its site, there are no labels,
            or the heads do not divide the width.
    """
    if isinstance(per, Mapping):
        return _own_labels(shapes, per)
    if isinstance(per, Block):
        return _numbered(shapes, {name: _tiles(shape, per) for name, shape in shapes.items()})
    kinds = {"unit": _units, "channel": _units, "input": _inputs, "layer": _layers}
    if isinstance(per, Heads) or (isinstance(per, str) and per == "head"):
        return head_labels(shapes, heads, per if isinstance(per, Heads) else None)
    if not isinstance(per, str) or per not in kinds:
        raise ReductionError(
            f"per={described(per)}: one of 'weight', {', '.join(map(repr, GROUPS))}, Block(...),"
            " Heads(...), NofM(...) or a mapping from sites to labels"
        )
    return kinds[per](shapes)


def _numbered(shapes: Shapes, local: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Labels of each site's own counting made unique over the sites; None: in no group."""
    labels, used = {}, 0
    for name, shape in shapes.items():
        own = local[name]
        labels[name] = (
            torch.full((1,) * len(shape), -1).expand(shape)
            if own is None
            else (own + used).expand(shape)
        )
        used += 0 if own is None or not own.numel() else int(own.max()) + 1
    return labels


def _units(shapes: Shapes) -> dict[str, Tensor]:
    biases, cells = {}, _recurrent_cells(shapes)
    for name, shape in shapes.items():
        weight = _sibling(name, "bias", "weight")
        if len(shape) == 1 and len(shapes.get(weight, ())) > 1 and shapes[weight][0] == shape[0]:
            biases[name] = weight
    rows = {
        name: torch.arange(math.prod(shape[:1])).view(shape[:1] + (1,) * len(shape[1:]))
        for name, shape in shapes.items()
    }
    for name, (across, units) in cells.items():
        biases |= {name: across} if name != across else {}
        rows[across] = (torch.arange(shapes[across][0]) % units).view(-1, 1)
    labels = _numbered(
        shapes, {name: None if name in biases else own for name, own in rows.items()}
    )
    for name, weight in biases.items():
        first = labels[weight].flatten(1)[:, 0]
        labels[name] = first.view(-1, *(1,) * (len(shapes[name]) - 1)).expand(shapes[name])
    return labels


def _recurrent_cells(shapes: Shapes) -> dict[str, tuple[str, int]]:
    """The weights and biases of recurrent layers → the weight that reads the last outputs of their
    layer, (gates · units, outputs), and the number of units. There are as many outputs as units, or
    those of a projection, ``weight_hr_l0`` (outputs, units).
    """
    found = {}
    for name, shape in shapes.items():
        path, dot, leaf = name.rpartition(".")
        across = f"{path}{dot}{_RECURRENT.sub('weight_hh', leaf)}"
        if _RECURRENT.match(leaf) and len(shapes.get(across, ())) == 2:
            rows, outputs = shapes[across]
            projection = shapes.get(f"{path}{dot}{_RECURRENT.sub('weight_hr', leaf)}", ())
            units = projection[1] if len(projection) == 2 else outputs
            if rows == shape[0] and rows in (units, 3 * units, 4 * units):
                found[name] = across, units
    return found


def is_recurrent(name: str) -> bool:
    """Whether a site has the name of a weight or a bias of a recurrent layer or cell."""
    return bool(re.match(r"(weight|bias)_(ih|hh|hr)", name.rpartition(".")[2]))


def _inputs(shapes: Shapes) -> dict[str, Tensor]:
    columns = {
        name: torch.arange(shape[1]).view(-1, *(1,) * (len(shape) - 2)) if len(shape) > 1 else None
        for name, shape in shapes.items()
    }
    return _numbered(shapes, columns)


def _layers(shapes: Shapes) -> dict[str, Tensor]:
    paths = [
        name.rpartition(".")[0] if "." in name or name in ("weight", "bias") else f"{name}."
        for name in shapes
    ]
    order = {path: k for k, path in enumerate(dict.fromkeys(paths))}
    return {
        name: torch.tensor(order[path]).expand(shape)
        for (name, shape), path in zip(shapes.items(), paths, strict=True)
    }


def _tiles(shape: tuple[int, ...], block: Block) -> Tensor | None:
    if len(shape) < 2:
        return None
    columns = math.prod(shape[1:])
    across = -(-columns // block.columns)
    labels = (
        torch.arange(shape[0])[:, None] // block.rows * across
        + torch.arange(columns) // block.columns
    )
    return labels.view(shape)


def check_labels(per: Mapping[str, Tensor]) -> None:
    """Raises ReductionError where labels are not tensors, or there are none."""
    for name, own in per.items():
        if not isinstance(own, Tensor):
            raise ReductionError(
                f"per: expected a tensor of integers for site '{name}', the group of each entry,"
                f" got {described(own)}"
            )
    if not per:
        raise ReductionError("per: expected labels for one site at least, got an empty mapping")


def _own_labels(shapes: Shapes, per: Mapping[str, Tensor]) -> dict[str, Tensor]:
    check_labels(per)
    for name, own in per.items():
        if name not in shapes:
            raise ReductionError(
                f"per: there is no reduced site '{name}'; the reduced sites are:"
                f" {', '.join(shapes)}"
            )
        fits = own.ndim <= len(shapes[name]) and all(
            a in (1, b) for a, b in zip(own.shape[::-1], shapes[name][::-1], strict=False)
        )
        if own.is_floating_point() or own.dtype == torch.bool or not fits:
            raise ReductionError(
                f"per: expected groups of site '{name}' that are integers that broadcast to"
                f" {tuple(shapes[name])}, got {own.dtype} of shape {tuple(own.shape)}"
            )
    distinct = torch.unique(torch.cat([own.flatten().long().cpu() for own in per.values()]))
    distinct = distinct[distinct >= 0]
    labels = {}
    for name, shape in shapes.items():
        own = per[name].long().cpu() if name in per else torch.tensor(-1)
        labels[name] = torch.where(
            own >= 0, torch.searchsorted(distinct, own.contiguous()), -1
        ).expand(shape)
    return labels


def _sibling(name: str, leaf: str, other: str) -> str:
    """`name` with its last part `other` in the place of `leaf`; "" if it does not end so."""
    path, dot, last = name.rpartition(".")
    return f"{path}{dot}{other}" if last == leaf else ""
