"""Products of two tensors, summed over a common axis: matrix products and Einstein sums.

Axes are labelled, as in an Einstein sum: an axis of both tensors that the result does not have is
summed over. Owns `matmul`, `einsum` and
`bilinear`. Next: `normalisations.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.shrinking.channel_ids import FIXED, ChannelIds, Ids
from pyro_bmr.shrinking.contractions import Read, Reads, array
from pyro_bmr.shrinking.elementwise import broadcast
from pyro_bmr.shrinking.states import Call, State, state_of


def matmul(ids: ChannelIds, call: Call, reads: Reads) -> State:
    """The state of a product of matrices, and what it reads; leading axes are broadcast."""
    a, b = call.states[-2:]
    left = "k" if a.value.ndim == 1 else "…ik"
    right = "k" if b.value.ndim == 1 else "…kj"
    out = "…" + ("i" if a.value.ndim > 1 else "") + ("j" if b.value.ndim > 1 else "")
    product = _product(ids, call, reads, a, b, left, right, out)
    if call.name not in ("addmm", "baddbmm", "addmv"):
        return product
    added = call.states[0]
    axes = broadcast(ids, [product.axes, added.axes], call.layer)
    return state_of(call.values(), product.unknown | added.unknown, axes)


def einsum(ids: ChannelIds, call: Call, reads: Reads) -> Any:
    """The state of a product by Einstein's convention; None if it is not of two tensors."""
    equation, states = str(call.args[0]).replace(" ", ""), call.states
    if len(states) != 2 or "->" not in equation:
        return None
    terms, out = equation.replace("...", "…").split("->")
    left, right = terms.split(",")
    if any(len(set(labels)) < len(labels) for labels in (left, right, out)):
        return None
    return _product(ids, call, reads, states[0], states[1], left, right, out)


def bilinear(ids: ChannelIds, call: Call, reads: Reads) -> Any:
    """The state of x₁ᵀ W x₂ + b for each output, and what it reads; None if W is not known."""
    one, two, weight = call.states[:3]
    if bool(weight.unknown.any()):
        return None
    outputs, number = weight.axes[0], weight.value.dtype
    ids.tie(one.axes[-1], weight.axes[1])
    ids.tie(two.axes[-1], weight.axes[2])
    for other in call.states[3:]:
        ids.tie(outputs, other.axes[0])
    axes = broadcast(ids, [one.axes[:-1], two.axes[:-1]], call.layer)
    nonzero = weight.nonzero().to(number)
    flags = [
        (one.unknown.to(number), two.nonzero().to(number)),
        (one.nonzero().to(number), two.unknown.to(number)),
    ]
    products = [torch.nn.functional.bilinear(a, b, nonzero) for a, b in flags]
    unknown = products[0] + products[1] > 0.5
    seen = [state.nonzero().flatten(0, -2).any(0).to(number) for state in (one, two)]
    triples = torch.einsum("oij,i,j->oij", nonzero, *seen) > 0.5
    for axis, state in ((1, one), (2, two)):
        table = array(triples.any(3 - axis).T)
        none = np.zeros(state.shape[-1], dtype=bool)
        reads.append(Read(call.node, call.layer, state.axes[-1], [(table, outputs)], none))
    return state_of(call.values(), unknown, (*axes, outputs))


def _labelled(labels: str, ndim: int, most: int) -> list[str]:
    """One label for each axis; those of `…` are numbers, counted from the last."""
    rest = ndim - len(labels.replace("…", ""))
    numbers = [str(k) for k in range(most)][:rest][::-1]
    found: list[str] = []
    for label in labels:
        found += numbers if label == "…" else [label]
    return found


def _product(
    ids: ChannelIds, call: Call, reads: Reads, a: State, b: State, left: str, right: str, out: str
) -> State:
    """The state of Σ a·b over the labels that are in `left` and `right` and not in `out`."""
    one, two = _labelled(left, a.value.ndim, 20), _labelled(right, b.value.ndim, 20)
    numbers = sorted((n for n in {*one, *two} if n.isdigit()), key=int, reverse=True)
    end = [n for label in out for n in (numbers if label == "…" else [label])]
    lines: dict[str, list[Ids]] = {}
    for labels, axes in ((one, a.axes), (two, b.axes)):
        for label, axis in zip(labels, axes, strict=True):
            lines.setdefault(label, []).append(axis)
    met = {label: _met(ids, found, call.layer) for label, found in lines.items()}
    letters = {label: chr(97 + k) for k, label in enumerate(met)}

    def total(p: Tensor, q: Tensor, labels: list[str]) -> Tensor:
        equation = ",".join("".join(letters[n] for n in part) for part in (one, two))
        pair = (_squeezed(t, part, met) for t, part in ((p, one), (q, two)))
        return torch.einsum(f"{equation}->{''.join(letters[n] for n in labels)}", *pair)

    number = torch.float64 if a.value.dtype == torch.float64 else torch.float32
    flags = [t.to(number) for t in (a.unknown, b.nonzero(), a.nonzero(), b.unknown)]
    unknown = total(flags[0], flags[1], end) + total(flags[2], flags[3], end) > 0.5
    summed = [n for n in met if n not in end]
    for label in summed:
        reads.append(_product_read(ids, call, (a, b), (one, two), label, end, met, total, flags))
    value = call.values() if call.name not in ("addmm", "baddbmm", "addmv") else None
    if value is None:
        value = total(a.value, b.value, end)
    unknown = unknown.view(value.shape)
    if a.sums_to_one and one[-1:] == summed and summed[0] in two:
        same, average = _average(b, two.index(summed[0]), two, end, met)
        value = torch.where(same & unknown, average.to(value.dtype), value)
        unknown = unknown & ~same
    return state_of(value, unknown, tuple(met[n] for n in end))


def _met(ids: ChannelIds, lines: list[Ids], layer: str) -> Ids:
    return broadcast(ids, [(line,) for line in lines], layer)[0]


def _squeezed(t: Tensor, labels: list[str], axes: dict[str, Ids]) -> Tensor:
    return t.expand([len(axes[n]) for n in labels])


def _average(
    b: State, axis: int, labels: list[str], end: list[str], axes: dict[str, Ids]
) -> tuple[Tensor, Tensor]:
    """Where an average of `b` over `axis` is known, because all of its terms are the same; and that
    number.
    """
    first = b.value.select(axis, 0)
    same = (b.value == b.value.narrow(axis, 0, 1)).all(axis) & ~b.unknown.any(axis)
    rest = [n for n in labels if n != labels[axis]]
    shape = [len(axes[n]) if n in rest else 1 for n in end]
    order = [rest.index(n) for n in end if n in rest]
    sizes = [len(axes[n]) for n in rest]
    found = (t.expand(sizes).permute(order).reshape(shape) for t in (same, first))
    return next(found), next(found)


def _product_read(
    ids: ChannelIds, call: Call, pair: tuple[State, State], labels: tuple[list[str], list[str]],
    label: str, end: list[str], axes: dict[str, Ids], total: Any, flags: list[Tensor],
) -> Read:  # fmt: skip
    """What a product reads along `label`."""
    (a, b), (one, two), inputs = pair, labels, axes[label]
    foldable = torch.zeros(len(inputs), dtype=torch.bool)
    effect = None
    for (x, mine), (w, other) in (((a, one), (b, two)), ((b, two), (a, one))):
        if label in mine and label in other and not bool(w.unknown.any()):
            alone = [n for n in mine if n not in other]
            foldable |= _constant_along(x, mine, label, alone)
            effect = _effect_of(x is a, pair, labels, label, alone, total, end)
            break
    columns = [n for n in end if ids.prunable(axes[n])]
    tables = [(array(total(flags[2], flags[1], [label, n]) > 0.5), axes[n]) for n in columns] or [
        (array(total(flags[2], flags[1], [label])[:, None] > 0.5), np.array([FIXED]))
    ]
    return Read(call.node, call.layer, inputs, tables, array(foldable), effect=effect)


def _constant_along(x: State, labels: list[str], label: str, alone: list[str]) -> Tensor:
    """Which positions of `label` are known, and the same along the axes `alone`."""
    value, unknown = x.value, x.unknown
    same = ~unknown
    for k, n in enumerate(labels):
        if n in alone:
            same = same & (value == value.narrow(k, 0, 1))
    others = [k for k, n in enumerate(labels) if n != label]
    return same.all(dim=others) if others else same


def _effect_of(
    first: bool, pair: tuple[State, State], labels: tuple[list[str], list[str]], label: str,
    alone: list[str], total: Any, end: list[str],
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """What removed positions of `label` add to the outputs, with size 1 along `alone`."""
    (a, b), mine = pair, labels[0 if first else 1]

    def effect(removed: Tensor) -> Tensor:
        shape = [-1 if n == label else 1 for n in mine]
        p, q = (a.value, b.value)
        masked = (p if first else q) * removed.view(shape)
        result: Tensor = total(masked if first else p, q if first else masked, end)
        for k, n in enumerate(end):
            if n in alone:
                result = result.narrow(k, 0, 1)
        return result

    return effect
