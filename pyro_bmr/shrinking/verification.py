"""Whether two networks are the same function, by their outputs on the example and on random inputs.

Owns `Answers`, `answers`, `in_double`, `inputs_like`, `leaves`, `difference`, `disagreement` and
`check_same_function`. Next: `masked_network.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from pyro_bmr.data.inputs import Inputs, called, device_of, of_each, parts_of
from pyro_bmr.errors import ShrinkError
from pyro_bmr.isolation import seed_generator
from pyro_bmr.shrinking.refusals import MASKED, first_line

FLOOR = 1e-3  # a tensor whose largest entry is smaller is compared as if its largest were this


@dataclass(frozen=True)
class Answers:
    """The outputs of a network on each input: its tensors, or None where it raised `error`.

    `double`: whether it ran in float64. `eps` and `eps_of_weights`: the machine epsilon of the
    coarsest type among its steps and among its weights.
    """

    outputs: list[list[Tensor] | None]
    error: str
    double: bool
    eps: float
    eps_of_weights: float


class _Steps(TorchFunctionMode):
    """The machine epsilon of the coarsest type among the steps of a network.

    A forward with `.float()` in it rounds its inputs, whatever their type.
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
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, (tuple, list)):
        return []
    return [t for part in output for t in leaves(part)]


@torch.no_grad()
def answers(net: nn.Module, inputs: Sequence[Inputs], double: bool | None = None) -> Answers:
    """The outputs of `net` on each input; neither the network nor the inputs are changed.

    It runs in float64 where it can (or where `double` says so), else in its own types. Every input
    gets the same random numbers; the state of the generators is restored.
    """
    if double is None:
        first = answers(net, inputs, True)
        return first if first.outputs[0] is not None else answers(net, inputs, False)
    eps = _coarsest((*net.parameters(), *net.buffers()))
    run = _doubled(net) if double and eps > torch.finfo(torch.float64).eps else net
    steps, outputs, reason = _Steps(), list[list[Tensor] | None](), ""
    cards = [d for d in map(device_of, inputs[:1]) if d.type == "cuda"]

    def copied(part: Tensor) -> Tensor:
        rounded = double and part.is_floating_point()
        return part.to(torch.float64, copy=True) if rounded else part.clone()

    with torch.random.fork_rng(devices=cards), steps:
        for x in inputs:
            for device in (torch.device("cpu"), *cards):
                seed_generator(device, 0)
            try:
                output = called(run, of_each(copied, x))
                outputs.append([t.clone() for t in leaves(output)])
            # A user's forward may raise anything on rows that are not its own.
            except Exception as error:
                outputs.append(None)
                reason = reason or first_line(error)
    return Answers(outputs, reason, double, steps.eps, eps)


def _doubled(net: nn.Module) -> nn.Module:
    """A copy of `net` in float64; in a graph of operations, types that are written down too."""
    run = copy.deepcopy(net).double()
    for module in run.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.args, node.kwargs = in_double(node.args), in_double(node.kwargs)
            module.recompile()
    return run


def in_double(arguments: Any) -> Any:
    """Arguments of an operation with float64 in the place of a coarser type."""

    def double(part: Any) -> Any:
        coarse = isinstance(part, torch.dtype) and part.is_floating_point
        return torch.float64 if coarse else part

    return fx.node.map_aggregate(arguments, double)


@torch.no_grad()
def inputs_like(example: Inputs, net: nn.Module) -> list[Any]:
    """Rows of `example`, and random rows of the same shape, two at a time.

    Real numbers are drawn at the scale of the example, then a row at three times and a row at a
    third of it; whole numbers from their range. Of several inputs each is drawn by itself.
    """
    if isinstance(example, Tensor):
        return _rows_like(example, net)
    drawn = {name: _rows_like(part, net) for name, part in parts_of(example, "").items()}
    count = max(map(len, drawn.values()))
    # an input of which fewer are drawn is given again
    numbers = [
        iter([_two(rows[min(k, len(rows) - 1)]) if k else rows[0] for rows in drawn.values()])
        for k in range(count)
    ]
    return [of_each(lambda part, some=some: next(some), example) for some in numbers]  # type: ignore[misc]


def _two(rows: Tensor) -> Tensor:
    return rows if len(rows) == 2 else rows[:1].repeat(2, *[1] * (rows.ndim - 1))


def _rows_like(example: Tensor, net: nn.Module) -> list[Tensor]:
    rows, generator = example[:3], torch.Generator().manual_seed(0)
    shape = (2, *rows.shape[1:])
    if rows.is_floating_point() and rows.numel():
        scale = rows.std(correction=0)
        scale = scale if bool(scale.isfinite()) and float(scale) > 0 else torch.ones_like(scale)
        center = rows.mean().nan_to_num(0, 0, 0)
        factors = torch.tensor([[1, 1], [3, 1 / 3]]).view(2, 2, *[1] * (rows.ndim - 1))
        draws = torch.randn((2, *shape), generator=generator, device="cpu") * factors
        return [rows, *(draws.to(rows) * scale + center)]
    if rows.dtype == torch.bool:
        chances = torch.rand(shape, generator=generator, device="cpu")
        return [rows, (chances < 0.5).to(rows.device)]
    if rows.is_complex() or not rows.numel():
        return [rows]
    return [rows, *_whole_numbers_like(example, net, shape, generator)]


def _whole_numbers_like(
    example: Tensor, net: nn.Module, shape: tuple[int, ...], generator: torch.Generator
) -> list[Tensor]:
    """Entries of the example shuffled over its rows; numbers in the range of the example, and up to
    the size of the smallest embedding.
    """
    low, high = (t.expand(shape).cpu() for t in (example.amin(0).clamp(max=0), example.amax(0)))
    chosen = torch.randint(len(example), shape, generator=generator, device="cpu")
    tops = [high]
    tables = [m for m in net.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    if tables and not example.is_cuda:  # on a GPU an index out of range ends the process
        tops.append(high.clamp(min=min(m.num_embeddings for m in tables) - 1))
    drawn = []
    for top in tops:
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        drawn.append(low + (uniform * (top - low + 1)).floor().to(low.dtype))
    return [example.gather(0, chosen.to(example.device)), *(t.to(example) for t in drawn)]


def difference(want: Sequence[Tensor], got: Sequence[Tensor]) -> tuple[float, float]:
    """The largest difference between two networks' outputs, and the largest entry of that tensor.

    "Largest" is relative to the tensor that the difference is in. The difference is infinite if the
    outputs differ in number, in shape, or in the entries that are not finite.
    """
    if len(want) != len(got) or any(a.shape != b.shape for a, b in zip(want, got, strict=True)):
        return float("inf"), 0.0
    pairs = [_difference(a, b) for a, b in zip(want, got, strict=True)]
    return max(pairs, key=lambda pair: pair[0] / max(pair[1], FLOOR), default=(0.0, 0.0))


def _difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    kind = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    p, q = a.to(kind), b.to(a.device, kind)
    finite = p.isfinite()
    if not torch.equal(finite, q.isfinite()):
        return float("inf"), 0.0
    if not torch.equal(p[~finite].nan_to_num(), q[~finite].nan_to_num()):
        return float("inf"), 0.0
    if not bool(finite.any()):
        return 0.0, 0.0
    return float((p - q)[finite].abs().max()), float(p[finite].abs().max())


def disagreement(want: Answers, got: Answers) -> str:
    """How and by how much the answers of two networks differ; empty if they agree to rounding."""
    # A folded constant is rounded to the type of the weights, a step to its own type; the power
    # 0.6 of its epsilon is 4e-10 in float64 and 7e-5 in float32.
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


def check_same_function(want: Answers, small: nn.Module, inputs: Sequence[Inputs]) -> None:
    """Compares the answers of `small` on `inputs` with `want`.

    Raises:
        ShrinkError: they differ; it says by how much.
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
