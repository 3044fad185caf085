r"""One pass over data: batches go in one by one, a `Curvature` comes out.

Owns `Pass`. Next: `curvature.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmr.curvatures.factors import Curvature, LayerCurvature
from pyro_bmr.curvatures.network_batches import output_of
from pyro_bmr.curvatures.ranks import Ranks
from pyro_bmr.curvatures.recorder import Recorder
from pyro_bmr.curvatures.row_squares import row_squares
from pyro_bmr.curvatures.scores import Loss, output_gradients
from pyro_bmr.data.inputs import Inputs, called, described
from pyro_bmr.errors import CANNOT_RUN, DataError, ModelError, first_line
from pyro_bmr.likelihoods.likelihood import check_read, read_inputs


@dataclass
class Pass:
    """One pass over the data: what it has summed so far.

    `wanted`: the parameters. `kronecker`: whether weights have factors. `others`: whether all other
    parameters have diagonals.
    """

    net: nn.Module
    loss: Loss
    fisher: str
    draws: int
    wanted: Mapping[str, nn.Parameter]
    kronecker: bool
    others: bool = True

    def __post_init__(self) -> None:
        anchor = next(iter(self.wanted.values())).detach().new_zeros((), requires_grad=True)
        names = {id(parameter): name for name, parameter in self.wanted.items()}
        self.recorder = Recorder(names if self.kronecker else {}, anchor)
        self.squares: dict[str, Tensor] = {}

    def add(self, x: Inputs, y: Tensor | None) -> None:
        """Adds a batch."""
        check_read(self.loss.likelihood, x, "the data")
        inputs, read = read_inputs(self.loss.likelihood, x)
        with self.recorder.watching():
            output = output_of(_called(self.net, inputs))
        self.loss.check(output, y, read)
        others = {name: p for name, p in self.wanted.items() if name not in self._in_layers()}
        for g in output_gradients(self.loss, self.fisher, self.draws, output, y, read):
            if self.recorder.factors and output.requires_grad:
                torch.autograd.grad(
                    output, self.recorder.anchor, g, retain_graph=True, allow_unused=True
                )
                self.recorder.counting = False
            if others and self.others:
                for name, square in row_squares(self.net, others, inputs, g, output_of).items():
                    self.squares[name] = self.squares.get(name, 0) + square

    def _in_layers(self) -> set[str]:
        """The parameters that have Kronecker factors."""
        others, factors = self.recorder.others, self.recorder.factors
        weights = {name for name in factors if name not in others}
        biases = {factors[name].bias for name in weights}
        return weights | {name for name in biases if name is not None and name not in others}

    def sum_over(self, ranks: Ranks) -> None:
        """Gives all processes the sums over theirs; a call of all of them.

        Raises:
            ModelError: their networks use other parameters, or one has had no rows.
        """
        factors = self.recorder.factors
        found = {**{name: f.uses for name, f in factors.items()}, **self.recorder.others}
        ranks.check_same(
            (sorted(found.items(), key=str), sorted(self.squares)),
            "uses other parameters of the network than process 0, or a process has no rows; give"
            " all of them the same network and data",
        )
        for name in sorted(factors):
            factor = factors[name]
            factor.inputs, factor.outputs = ranks.sum(factor.inputs), ranks.sum(factor.outputs)
            factor.count = int(ranks.total(factor.count))
        for name in sorted(self.squares):
            self.squares[name] = ranks.sum(self.squares[name])

    def result(self, seen: int, rows: int) -> Curvature:
        """The curvature of `rows` rows from those that were `seen`.

        Raises:
            ModelError: a number of it is not finite.
        """
        inside, scale = self._in_layers(), rows / seen
        layers = {
            name: LayerCurvature(
                name,
                f.bias if f.bias in inside else None,
                f.outputs * scale,
                _without_bias(f.inputs, f.bias is not None and f.bias not in inside)
                / max(f.count, 1),
                tuple(self.wanted[name].shape),
                f.turned,
                f.uses,
            )
            for name, f in self.recorder.factors.items()
            if name in inside
        }
        diagonals = {name: square * scale for name, square in self.squares.items()}
        why = {name: self.recorder.others.get(name, "diagonal asked for") for name in diagonals}
        if self.kronecker:
            why |= {
                name: "not seen in the forward pass"
                for name in diagonals
                if name not in self.recorder.others
            }
        found = Curvature(layers, diagonals, why, rows)
        _check_finite(found)
        return found


def _called(net: nn.Module, x: Inputs) -> Any:
    """What the network returns.

    Raises:
        DataError: it does not run on these rows.
    """
    try:
        return called(net, x)
    except torch.OutOfMemoryError:
        raise
    except CANNOT_RUN as error:
        raise DataError(
            f"data: the network does not run on x of {described(x)}: {first_line(error)}; give it"
            " the rows that it was trained on, in their shape and dtype"
        ) from error


def _without_bias(inputs: Tensor, left_out: bool) -> Tensor:
    return inputs[:-1, :-1] if left_out else inputs


def _check_finite(found: Curvature) -> None:
    for name, layer in found.layers.items():
        if not bool(layer.outputs.isfinite().all() & layer.inputs.isfinite().all()):
            raise _infinite(name)
    for name, diagonal in found.diagonals.items():
        if not bool(diagonal.isfinite().all()):
            raise _infinite(name)


def _infinite(name: str) -> ModelError:
    return ModelError(
        f"'{name}': its curvature is not finite; the data or the outputs of the network have NaN or"
        " infinite values"
    )
