r"""How a network is measured while it is pruned: on which rows, against which dense network.

Owns `Measure`, `curvature_at` and `write`. Next: `corrections.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_bmr.curvatures.factors import Curvature
from pyro_bmr.curvatures.network_batches import output_of
from pyro_bmr.curvatures.passes import Pass
from pyro_bmr.curvatures.ranks import Ranks
from pyro_bmr.curvatures.scores import Loss
from pyro_bmr.data.inputs import call_arguments, rows_in
from pyro_bmr.likelihoods.likelihood import read_inputs
from pyro_bmr.post_training.calibration import Calibration
from pyro_bmr.post_training.divergence import Divergence

_MOST_BYTES = 1 << 28  # of outputs that are kept


@dataclass(frozen=True)
class Measure:
    """How networks are measured: on which rows, against which dense network, by which loss. The
    outputs of the dense network are kept in memory if they are small. In a group of processes each
    runs its rows, and what is measured is that of all of them.
    """

    dense: nn.Module
    rows: Calibration
    loss: Loss
    fisher: str
    draws: int
    bar: Any
    ranks: Ranks = field(default_factory=Ranks)
    kept: dict[int, Tensor] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """N over the calibration rows."""
        return self.rows.size / self.rows.rows

    def about(self, read: bool) -> dict[str, Any]:
        """What tells this measure from those of other arguments, and with `read` of other rows; a
        call of all processes.
        """
        return {
            "likelihood": re.sub(r" at 0x\w+", "", repr(self.loss.likelihood)),
            "values": dict(self.loss.values),
            "curvature": f"{self.fisher} {self.draws}",
            "rows": f"{self.rows.rows} of {self.rows.size}, {len(self.rows.batches)} batches",
            "read": self.ranks.of_each(self.rows.digest() if read else ""),
        }

    def run(self, net: nn.Module, values: Mapping[str, Tensor] | None, x: Any) -> Tensor:
        """The output of the network with `values` in the place of its parameters."""
        inputs, _ = read_inputs(self.loss.likelihood, x)
        args, named = call_arguments(net, inputs)
        return output_of(functional_call(net, dict(values or {}), args, named))

    @torch.no_grad()
    def target(self, number: int, x: Any) -> Tensor:
        """What the dense network returns for the batch of that number."""
        if number in self.kept:
            return self.kept[number]
        output = self.run(self.dense, None, x)
        if output.numel() * output.element_size() * len(self.rows.batches) < _MOST_BYTES:
            self.kept[number] = output
        return output

    def apart(
        self, net: nn.Module, values: Mapping[str, Tensor] | None, number: int, seed: int = 0
    ) -> Tensor:
        """The divergence on the batch of that number, nats, with its graph. `seed`: of targets that
        are drawn.
        """
        x, y = self.rows.batches[number]
        read = read_inputs(self.loss.likelihood, x)[1]
        found, dense = self.run(net, values, x), self.target(number, x)
        return Divergence(self.loss, seed).of(found, dense, y, read)

    @torch.no_grad()
    def divergence(self, net: nn.Module) -> float:
        """Nats, summed over all N rows."""
        there = [number for number, (x, _) in enumerate(self.rows.batches) if rows_in(x)]
        total = sum(float(self.apart(net, None, number)) for number in there)
        return self.ranks.total(total) * self.scale

    @torch.no_grad()
    def loss_on(self, rows: Calibration, net: nn.Module) -> float:
        """−log p(y | outputs), nats per row, on rows with targets."""
        total = 0.0
        for x, y in rows.some():
            assert y is not None
            read = read_inputs(self.loss.likelihood, x)[1]
            output = self.run(net, None, x)
            self.loss.check(output, y, read)
            total += float(self.loss.nll(output, y, read))
        return self.ranks.total(total) / rows.rows


def curvature_at(measure: Measure, net: nn.Module, wanted: Mapping[str, nn.Parameter]) -> Curvature:
    """The factors of the layers of a network, by one pass over the calibration rows."""
    one = Pass(net, measure.loss, measure.fisher, measure.draws, wanted, True, others=False)
    for x, y in measure.rows.some():
        one.add(x, y)
        measure.bar.update(rows_in(x))
    one.sum_over(measure.ranks)
    return one.result(measure.rows.rows, measure.rows.size)


def write(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Puts values in the place of parameters."""
    parameters = dict(net.named_parameters())
    for name, value in values.items():
        parameters[name].data.copy_(value)
