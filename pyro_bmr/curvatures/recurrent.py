r"""Recurrent layers written out step by step, so that each of their multiplications is seen.

Owns `RECURRENT` and `unrolled`. torch calls the whole of an `nn.LSTM`, `nn.GRU` or `nn.RNN` as one
function, with the equations of its documentation. Next: `recorder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = tuple[Tensor, ...]  # h, and of an LSTM c
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Step = Callable[[Tensor, Tensor, State], State]


def _lstm(given: Tensor, back: Tensor, state: State) -> State:
    into, forget, new, out = (given + back).chunk(4, -1)
    cell = forget.sigmoid() * state[1] + into.sigmoid() * new.tanh()
    return out.sigmoid() * cell.tanh(), cell


def _gru(given: Tensor, back: Tensor, state: State) -> State:
    (reset, update, new), (reset_b, update_b, new_b) = given.chunk(3, -1), back.chunk(3, -1)
    proposed = (new + (reset + reset_b).sigmoid() * new_b).tanh()
    share = (update + update_b).sigmoid()
    return (share * state[0] + (1 - share) * proposed,)


def _tanh(given: Tensor, back: Tensor, state: State) -> State:
    return ((given + back).tanh(),)


def _relu(given: Tensor, back: Tensor, state: State) -> State:
    return ((given + back).relu(),)


_LAYERS: dict[Any, Step] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _tanh,
    torch.rnn_relu: _relu,
}
_CELLS: dict[Any, Step] = {
    torch.lstm_cell: _lstm,
    torch.gru_cell: _gru,
    torch.rnn_tanh_cell: _tanh,
    torch.rnn_relu_cell: _relu,
}
RECURRENT = frozenset({*_LAYERS, *_CELLS})
"""The torch functions that `unrolled` can write out."""


def unrolled(function: Any, args: tuple[Any, ...], named: Mapping[str, Any], linear: Linear) -> Any:
    """What a call of one of `RECURRENT` returns; None if it drops units at random between layers,
    or has keywords for a whole layer.

    Args:
        linear: what multiplies by a weight and adds a bias.
    """
    if function in _CELLS:
        return _cell(_CELLS[function], linear, *args, **named)
    if named:
        return None
    packed = isinstance(args[3], (list, tuple))
    if packed:
        data, sizes, first, weights, has_biases, depth, dropout, training, both_ways = args
        batch_first, steps = False, sizes.tolist()
    else:
        data, first, weights, has_biases, depth, dropout, training, both_ways, batch_first = args
        data = data.transpose(0, 1) if batch_first else data
        steps = [data.shape[1]] * data.shape[0]
    if training and dropout and depth > 1:
        return None
    first = (first,) if isinstance(first, Tensor) else tuple(first)
    layers = _Layers(_LAYERS[function], linear, steps, has_biases, 1 + both_ways)
    output, last = layers.run(data if packed else data.flatten(0, 1), first, weights, depth)
    if not packed:
        output = output.unflatten(0, data.shape[:2])
        output = output.transpose(0, 1) if batch_first else output
    return output, *last


def _cell(
    step: Step,
    linear: Linear,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """The arguments have torch's names."""
    first = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    found = step(linear(input, w_ih, b_ih), linear(first[0], w_hh, b_hh), first)
    return found[0] if isinstance(hx, Tensor) else found


@dataclass(frozen=True)
class _Layers:
    """Layers over sequences that are packed: the rows of all first places, of all second ones, and
    so on. `sizes`: how many sequences reach each place.
    """

    step: Step
    linear: Linear
    sizes: Sequence[int]
    has_biases: bool
    ways: int

    def run(
        self, data: Tensor, first: State, weights: Sequence[Tensor], depth: int
    ) -> tuple[Tensor, State]:
        """The outputs of the last layer, and the last states of all layers and ways."""
        each = len(weights) // (depth * self.ways)
        ends: list[State] = []
        for _ in range(depth):
            outputs = []
            for way in range(self.ways):
                number = len(ends)
                own = weights[number * each : (number + 1) * each]
                output, end = self._way(data, tuple(s[number] for s in first), own, way == 1)
                outputs.append(output)
                ends.append(end)
            data = torch.cat(outputs, -1)
        return data, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))

    def _way(
        self, data: Tensor, state: State, weights: Sequence[Tensor], backwards: bool
    ) -> tuple[Tensor, State]:
        inner, across = weights[:2]
        bias, bias_across = weights[2:4] if self.has_biases else (None, None)
        narrow = weights[-1] if len(weights) % 2 else None  # of an LSTM with projections
        given = self.linear(data, inner, bias).split(list(self.sizes))
        outputs: list[Tensor] = [data] * len(given)
        places = range(len(given))
        for place in reversed(places) if backwards else places:
            count = self.sizes[place]
            live = tuple(part[:count] for part in state)
            new = self.step(given[place], self.linear(live[0], across, bias_across), live)
            if narrow is not None:
                new = (self.linear(new[0], narrow, None), *new[1:])
            outputs[place] = new[0]
            state = tuple(
                torch.cat([part, old[count:]]) for part, old in zip(new, state, strict=True)
            )
        return torch.cat(outputs), state
