"""Whether two networks are one function: their outputs on the example and on random inputs of its
shape.

Owns `Answers`, `answers`, `inputs_like`, `leaves`, `difference`, `disagreement` and
`check_same_function`. Next: `plan.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_bmr.errors import ShrinkError
from pyro_bmr.shrinking.graphs import MASKED, first_line

FLOOR = 1e-3  # outputs smaller than this are compared as if they were of this size


@dataclass(frozen=True)
class Answers:
    """What a network gave on each input: its tensors in order, or None where it raised `error`.
    `double`: in float64.

    `eps`, `eps_of_weights`: of the coarsest type among its steps and among its weights.
    """

    outputs: list[list[Tensor] | None]
    error: str
    double: bool
    eps: float
    eps_of_weights: float


class _Steps(TorchFunctionMode):
    """The coarsest floating type among the steps of a network: `.float()` in a forward rounds
    whatever comes in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.eps = max(self.eps, _coarsest(leaves(result)))
        return result


def _coarsest(tensors: Iterable[Tensor]) -> float:
    return max(
        (torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point() or t.is_complex()),
        default=0.0,
    )


def leaves(output: Any) -> list[Tensor]:
    """The tensors of an output of any structure, in order."""
    if isinstance(output, Tensor):
        return [output]
    parts = (
        output.values()
        if isinstance(output, Mapping)
        else output
        if isinstance(output, (tuple, list))
        else ()
    )
    return [t for part in parts for t in leaves(part)]


@torch.no_grad()
def answers(net: nn.Module, inputs: Sequence[Tensor], double: bool | None = None) -> Answers:
    """The outputs of `net`, which is left as it is; in float64 where it runs in that (or where
    `double` says so), else in its own types.

    Every input is met with the same random numbers, which come back to where they were.
    """
    if double is None:
        first = answers(net, inputs, True)
        return first if first.outputs[0] is not None else answers(net, inputs, False)
    eps = _coarsest((*net.parameters(), *net.buffers()))
    run = copy.deepcopy(net).double() if double and eps > torch.finfo(torch.float64).eps else net
    steps, outputs, reason = _Steps(), list[list[Tensor] | None](), ""
    with torch.random.fork_rng(devices=[x.device for x in inputs[:1] if x.is_cuda]), steps:
        for x in inputs:
            torch.manual_seed(0)
            try:
                outputs.append(
                    [
                        t.clone()
                        for t in leaves(
                            run(
                                x.to(torch.float64, copy=True)
                                if double and x.is_floating_point()
                                else x.clone()
                            )
                        )
                    ]
                )
            # whatever a user's forward raises on rows that are not its own
            except Exception as error:
                outputs.append(None)
                reason = reason or first_line(error)
    return Answers(outputs, reason, double, steps.eps, eps)


@torch.no_grad()
def inputs_like(example: Tensor, net: nn.Module) -> list[Tensor]:
    """Rows of `example`, and random ones of their shape: at its scale, a third and three times
    that; whole numbers in their range.
    """
    rows, generator = example[:3], torch.Generator().manual_seed(0)
    shape = (2, *rows.shape[1:])
    if rows.is_floating_point() and rows.numel():
        scale = rows.std(correction=0)
        scale = scale if bool(scale.isfinite()) and float(scale) > 0 else torch.ones_like(scale)
        center = rows.mean().nan_to_num(0, 0, 0)
        draws = [
            torch.randn(shape, generator=generator).to(rows) * (factor * scale) + center
            for factor in (1, 3, 1 / 3)
        ]
        return [rows, *draws]
    if rows.dtype == torch.bool:
        return [rows, torch.rand(shape, generator=generator).to(rows.device) < 0.5]
    if rows.is_complex() or not rows.numel():
        return [rows]
    low, high = (t.expand(shape).cpu() for t in (example.amin(0).clamp(max=0), example.amax(0)))
    sizes = [
        m.num_embeddings for m in net.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))
    ]
    shuffled = example.gather(
        0, torch.randint(len(example), shape, generator=generator).to(example.device)
    )
    # on a GPU an index out of range ends the process
    tables = [high.clamp(min=min(sizes) - 1)] if sizes and not rows.is_cuda else []
    drawn = [
        low
        + (torch.rand(shape, generator=generator, dtype=torch.float64) * (top - low + 1))
        .floor()
        .to(low.dtype)
        for top in (high, *tables)
    ]
    return [rows, shuffled, *(t.to(rows) for t in drawn)]


def difference(want: Sequence[Tensor], got: Sequence[Tensor]) -> tuple[float, float]:
    """The largest difference between the outputs of two networks that is large for its tensor, and
    the largest entry of that tensor.

    Infinite where their number, their shapes, or the places that are not finite are not the same.
    """
    if len(want) != len(got) or any(a.shape != b.shape for a, b in zip(want, got, strict=True)):
        return float("inf"), 0.0
    pairs = [_difference(a, b) for a, b in zip(want, got, strict=True)]
    return max(pairs, key=lambda pair: pair[0] / max(pair[1], FLOOR), default=(0.0, 0.0))


def _difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    kind = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    p, q = a.to(kind), b.to(a.device, kind)
    finite = p.isfinite()
    if not torch.equal(finite, q.isfinite()) or not torch.equal(
        p[~finite].nan_to_num(), q[~finite].nan_to_num()
    ):
        return float("inf"), 0.0
    return (
        (float((p - q)[finite].abs().max()), float(p[finite].abs().max()))
        if bool(finite.any())
        else (0.0, 0.0)
    )


def disagreement(want: Answers, got: Answers) -> str:
    """How the answers of two networks differ, by how much; empty if they are those of one
    function.
    """
    # a folded constant is rounded to the type of the network; the steps, to theirs: 4e-10 in
    # float64, 7e-5 in float32
    tolerance = max(100 * got.eps_of_weights, max(want.eps, got.eps) ** 0.6)
    for k, (a, b) in enumerate(zip(want.outputs, got.outputs, strict=True)):
        where = "the example" if k == 0 else "random inputs of its shape"
        if a is None:
            continue
        if b is None:
            return f"it does not run on {where} ({got.error})"
        error, size = difference(a, b)
        if not error <= tolerance * max(size, FLOOR):
            return f"on {where} its outputs differ by {error:.2g}, where the largest is {size:.2g}"
    return ""


def check_same_function(want: Answers, small: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Nothing, if `small` gives the answers `want` on `inputs`.

    Raises:
        ShrinkError: it does not, by how much.
    """
    reason = disagreement(want, answers(small, inputs, want.double))
    if reason:
        raise ShrinkError(
            f"the smaller network is not the same function as the masked one: {reason}; {_MEND}"
        )


_MEND = (
    "a forward that computes with the sizes of its layers, draws random numbers or changes a layer"
    f" by a hook cannot be shrunk as it is: write such a number as a constant; {MASKED}"
)
