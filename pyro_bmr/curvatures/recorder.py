r"""The Kronecker factors of each weight, collected while a network is run and differentiated.

Owns `Recorder` and `Factors`. Next: `row_squares.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_bmr.curvatures.multiplications import LINEAR, Multiplication, multiplication_of
from pyro_bmr.curvatures.recurrent import RECURRENT, unrolled


@dataclass
class Factors:
    r"""Sums over the uses of one weight: Σ a aᵀ and Σ g gᵀ over rows and positions.

    `inputs`: (m, m), or with a bias (m + 1, m + 1), whose last column belongs to the constant 1; of
    an embedding the count of each index, (m,). `outputs`: (n, n). `count`: the positions whose
    gradient is not zero. `turned`: the weight is (in, out). `uses`: the calls of a forward pass.
    """

    turned: bool
    bias: str | None
    inputs: Tensor
    outputs: Tensor
    count: int = 0
    uses: int = 0


@dataclass
class Recorder:
    """Sees each torch function that is called with one of the `parameters` (id → name).

    The multiplications give `factors`. `others`: parameter → the function that used it in another
    way, or why it has no factors. The forward pass must run inside `watching`; a backward pass from
    its result to `anchor` adds to the factors. `counting`: whether it adds to those of the inputs
    too, as the first of each forward pass does.
    """

    parameters: Mapping[int, str]
    anchor: Tensor
    factors: dict[str, Factors] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    counting: bool = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for one forward pass."""
        self.counting = True
        for factor in self.factors.values():
            factor.uses = 0
        with _Mode(self):
            yield

    def call(self, function: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The result of a torch function, which is recorded if it uses a parameter."""
        if function is F.multi_head_attention_forward:
            return self._attention(args, named)
        used = {
            self.parameters[id(leaf)]
            for leaf in tree_leaves((args, named))
            if isinstance(leaf, Tensor) and id(leaf) in self.parameters
        }
        if used and function in RECURRENT:
            result = unrolled(function, args, named, self._linear)
            if result is not None:
                return result
        found = multiplication_of(function, args, named)
        weight = None if found is None else self._rows_of(found.weight)
        if not used and weight is None:
            return function(*args, **named)
        result = function(*args, **named)
        if found is not None and weight is not None:
            return self._recorded(found, weight, used, result)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            for name in used:
                self._note(name, getattr(function, "__name__", str(function)))
        return result

    def _attention(self, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Attention calls `linear` by its name in its module, unseen by the mode."""
        F.linear = self._linear  # type: ignore[assignment]
        try:
            result = F.multi_head_attention_forward(*args, **named)
        finally:
            F.linear = LINEAR
        whole = {id(named.get("bias_k")): "bias_k", id(named.get("bias_v")): "bias_v"}
        for key, word in whole.items():
            if key in self.parameters:
                self._note(self.parameters[key], word)
        return result

    def _linear(self, *args: Any, **named: Any) -> Tensor:
        return self.call(LINEAR, args, named)  # type: ignore[no-any-return]

    def _note(self, name: str, why: str) -> None:
        self.others.setdefault(name, why)

    def _rows_of(self, t: Tensor) -> tuple[Tensor, int] | None:
        """The parameter that a tensor is, or some rows of, and the first of these rows."""
        if id(t) in self.parameters:
            return t, 0
        base = t._base
        if base is None or id(base) not in self.parameters:
            return None
        if t.shape[1:] != base.shape[1:] or t.stride() != base.stride():
            return None
        return base, (t.storage_offset() - base.storage_offset()) // max(base.stride(0), 1)

    def _recorded(
        self, found: Multiplication, rows: tuple[Tensor, int], used: set[str], result: Tensor
    ) -> Tensor:
        weight, first = rows
        name = self.parameters[id(weight)]
        added = None if found.bias is None else self._rows_of(found.bias)
        bias = None if added is None else self.parameters[id(added[0])]
        for other in used - {name, bias}:
            self._note(other, "another multiplication")
        in_layer = None if found.turned else bias
        if bias is not None and found.turned:
            self._note(bias, "addmm")
        factor = self.factors.get(name)
        if factor is None:
            factor = self.factors[name] = _empty(found, weight, in_layer)
        elif (
            factor.turned != found.turned
            or factor.bias != in_layer
            or (found.turned and found.weight is not weight)
        ):
            self._note(name, "uses of two kinds")
            return result
        factor.uses += 1
        signal = found.signal.detach()
        seen = result + self.anchor.to(result.dtype)  # no leaf, so that a later call may change it
        if not seen.requires_grad:
            self._note(name, "a call without gradients, as under no_grad or vmap")
            return result

        def hook(g: Tensor) -> None:
            _add(factor, found, signal, g.detach(), first, self.counting)

        seen.register_hook(hook)
        return seen


class _Mode(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.recorder.call(func, args, kwargs or {})


def _empty(found: Multiplication, weight: Tensor, bias: str | None) -> Factors:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    outputs, inputs = len(weight), weight[0].numel()
    if found.turned:
        outputs, inputs = inputs, outputs
    inputs += bias is not None
    shape = (inputs,) if found.indices else (inputs, inputs)
    return Factors(
        found.turned,
        bias,
        torch.zeros(shape, dtype=dtype, device=weight.device),
        torch.zeros(outputs, outputs, dtype=dtype, device=weight.device),
    )


@torch.no_grad()
def _add(
    factor: Factors,
    found: Multiplication,
    signal: Tensor,
    gradient: Tensor,
    first: int,
    counting: bool,
) -> None:
    """Adds the positions whose gradient is not zero; the others have no curvature. `first`: the
    row of the parameter at which the outputs begin.
    """
    groups = found.gradients(gradient.to(factor.outputs.dtype))
    for number, g in enumerate(groups):
        width = g.shape[1]
        place = slice(first + number * width, first + (number + 1) * width)
        factor.outputs[place, place].addmm_(g.mT, g)
    if not counting:
        return
    rows = found.inputs(signal if found.indices else signal.to(factor.inputs.dtype))
    for g, a in zip(groups, rows, strict=True):
        active = g.ne(0).any(-1)
        _add_inputs(factor, found, a if bool(active.all()) else a[active])


def _add_inputs(factor: Factors, found: Multiplication, a: Tensor) -> None:
    factor.count += len(a)
    if found.indices:
        factor.inputs.index_add_(0, a, torch.ones_like(a, dtype=factor.inputs.dtype))
        return
    width = a.shape[1]
    factor.inputs[:width, :width].addmm_(a.mT, a)
    if factor.bias is not None:
        total = a.sum(0)
        factor.inputs[-1, :width] += total
        factor.inputs[:width, -1] += total
        factor.inputs[-1, -1] += len(a)
