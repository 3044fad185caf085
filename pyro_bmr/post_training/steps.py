r"""Gauss–Newton steps of the weights that are kept, towards the outputs of the dense network.

Owns `Measure`, `curvature_at`, `slopes_at` and `corrected`. A conditional mean is exact for the
Kronecker posterior at the weights where the curvature was taken. Far from there, and between
layers, it is not. A step moves all layers along

.. math:: \delta = -R D C / T \quad \text{given } \delta_S = 0

with D the gradient of the divergence from the dense network, and along the step before, by the two
amounts that minimise its quadratic model (Martens & Grosse 2015, sections 6 and 7). The model has
the exact Gauss–Newton matrix, from products with δ. No labels are used. Next: `pruned.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
from pyro_bmr.post_training.layer import Layer

_SMALL = 1e-3  # of the weights: a finite difference along a step
_HALVINGS = 6
_MOST_BYTES = 1 << 28  # of outputs that are kept
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Slopes:
    """Of a network on the calibration rows: the gradient of the divergence for each parameter of a
    layer, and the divergence, both summed over all N rows.
    """

    gradient: Mapping[str, Tensor]
    divergence: float


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

    def divergence(self, net: nn.Module, values: Mapping[str, Tensor] | None = None) -> float:
        """Nats, summed over all N rows."""
        total = 0.0
        with torch.no_grad():
            for number, (x, y) in enumerate(self.rows.batches):
                found, dense = self.run(net, values, x), self.target(number, x)
                read = read_inputs(self.loss.likelihood, x)[1]
                total += float(Divergence(self.loss).of(found, dense, y, read))
        return self.ranks.total(total) * self.scale


def curvature_at(measure: Measure, net: nn.Module, wanted: Mapping[str, nn.Parameter]) -> Curvature:
    """The factors of the layers of a network, by one pass over the calibration rows."""
    one = _pass(measure, net, wanted)
    for x, y in measure.rows.batches:
        one.add(x, y)
        measure.bar.update(rows_in(x))
    return _curvature(measure, one)


def slopes_at(measure: Measure, net: nn.Module, wanted: Mapping[str, nn.Parameter]) -> Slopes:
    """The divergence and its gradient, by one pass over the calibration rows."""
    return _slopes(measure, net, wanted, lambda x, _: measure.run(net, None, x))


def curvature_and_slopes_at(
    measure: Measure, net: nn.Module, wanted: Mapping[str, nn.Parameter]
) -> tuple[Curvature, Slopes]:
    """`curvature_at` and `slopes_at` by one pass."""
    one = _pass(measure, net, wanted)
    slopes = _slopes(measure, net, wanted, one.add)
    return _curvature(measure, one), slopes


def _pass(measure: Measure, net: nn.Module, wanted: Mapping[str, nn.Parameter]) -> Pass:
    return Pass(net, measure.loss, measure.fisher, measure.draws, wanted, True, others=False)


def _curvature(measure: Measure, one: Pass) -> Curvature:
    one.sum_over(measure.ranks)
    return one.result(measure.rows.rows, measure.rows.size)


def _slopes(
    measure: Measure,
    net: nn.Module,
    wanted: Mapping[str, nn.Parameter],
    run: Callable[[Any, Tensor | None], Tensor],
) -> Slopes:
    """`run`: a batch → the output of the network, with its graph."""
    total, divergence = {name: torch.zeros_like(p) for name, p in wanted.items()}, 0.0
    for p in wanted.values():
        p.requires_grad_(True)
    for number, (x, y) in enumerate(measure.rows.batches):
        output, dense = run(x, y), measure.target(number, x)
        read = read_inputs(measure.loss.likelihood, x)[1]
        apart = Divergence(measure.loss).of(output, dense, y, read)
        found = torch.autograd.grad(apart, list(wanted.values()), allow_unused=True)
        for name, slope in zip(wanted, found, strict=True):
            if slope is not None:
                total[name] += slope
        divergence += float(apart.detach())
        measure.bar.update(rows_in(x))
    for p in wanted.values():
        p.requires_grad_(False)
    scale, ranks = measure.scale, measure.ranks
    gradient = {name: ranks.sum(slope) * scale for name, slope in total.items()}
    return Slopes(gradient, ranks.total(divergence) * scale)


def corrected(
    measure: Measure,
    net: nn.Module,
    layers: Mapping[str, Layer],
    found: Slopes,
    temperature: float,
    before: Values | None,
) -> Values:
    """Moves the weights of `net` by a step, which is returned: 0 if none was found that brings the
    outputs nearer to those of the dense network. `before`: the step before this one.
    """
    step = directions(layers, found.gradient, temperature, measure.ranks)
    steps = [step] if before is None else [step, before]
    amounts = _amounts(measure, net, layers, found.gradient, steps, temperature)
    whole = {
        name: torch.stack([a * one[name] for a, one in zip(amounts, steps, strict=True)]).sum(0)
        for name in step
    }
    parameters = dict(net.named_parameters())
    taken = 1.0
    for _ in range(_HALVINGS):
        values = {name: parameters[name].detach() + taken * whole[name] for name in whole}
        if measure.divergence(net, values) < found.divergence:
            write(net, values)
            return {name: taken * part for name, part in whole.items()}
        taken /= 2
    return {name: torch.zeros_like(part) for name, part in whole.items()}


def write(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Puts values in the place of parameters."""
    parameters = dict(net.named_parameters())
    for name, value in values.items():
        parameters[name].data.copy_(value)


def directions(
    layers: Mapping[str, Layer], gradient: Mapping[str, Tensor], temperature: float, ranks: Ranks
) -> Values:
    """Parameter → δ."""

    def moved_of(name: str) -> list[Tensor]:
        layer = layers[name]
        slope = layer.as_matrix(gradient[layer.name])
        if layer.bias is not None:
            slope = torch.cat([slope, gradient[layer.bias][:, None]], 1)
        return [layer.moved(slope.to(layer.mean.dtype), temperature)]

    out, every = {}, ranks.shared_out({n: one.cost for n, one in layers.items()}, moved_of)
    for layer in layers.values():
        (moved,) = every[layer.name]
        out[layer.name] = layer.as_parameter(moved[:, : layer.columns]).to(gradient[layer.name])
        if layer.bias is not None:
            out[layer.bias] = moved[:, -1].to(gradient[layer.bias])
    return out


def _amounts(
    measure: Measure,
    net: nn.Module,
    layers: Mapping[str, Layer],
    gradient: Mapping[str, Tensor],
    steps: list[Values],
    temperature: float,
) -> list[float]:
    r"""The amounts c of each step that minimise bᵀc + ½ cᵀQc, with b = Dᵀδ and Q = δᵀ(JᵀHJ + TΠ)δ,
    Π = 1/s².
    """
    count = len(steps)
    slope, model = torch.zeros(count).double(), torch.zeros(count, count).double()
    for k, one in enumerate(steps):
        slope[k] = sum(float((gradient[name] * one[name]).sum()) for name in one)
        for j, other in enumerate(steps):
            for layer in layers.values():
                product = float((one[layer.name] * other[layer.name]).sum())
                model[k, j] += temperature * product / layer.scale**2
    model += _output_products(measure, net, steps) * measure.scale
    # steps that are nearly the same have no amounts of their own
    solved = torch.linalg.pinv(model, hermitian=True, rtol=1e-6) @ -slope
    if not bool(solved.isfinite().all()) or float(slope @ solved) > 0:
        return [0.0] * count
    return [float(a) for a in solved]


def _output_products(measure: Measure, net: nn.Module, steps: Iterable[Values]) -> Tensor:
    """Σ over rows of (Jδ)ᵀH(Jδ), with Jδ a finite difference and H the Hessian of the divergence at
    the output.
    """
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    moved, lengths = [], []
    for one in steps:
        size = _norm([parameters[name] for name in one])
        length = _SMALL * size / max(_norm(list(one.values())), 1e-30)
        lengths.append(length)
        moved.append({name: parameters[name] + length * part for name, part in one.items()})
    model = torch.zeros(len(moved), len(moved)).double()
    for number, (x, y) in enumerate(measure.rows.batches):
        dense = measure.target(number, x)
        with torch.no_grad():
            output = measure.run(net, None, x)
            changes = [
                (measure.run(net, values, x) - output) / length
                for values, length in zip(moved, lengths, strict=True)
            ]
        leaf = output.requires_grad_()
        read = read_inputs(measure.loss.likelihood, x)[1]
        apart = Divergence(measure.loss).of(leaf, dense, y, read)
        (slope,) = torch.autograd.grad(apart, leaf, create_graph=True)
        for k, change in enumerate(changes):
            (curved,) = torch.autograd.grad(slope, leaf, change, retain_graph=True)
            for j, other in enumerate(changes):
                model[k, j] += float((curved * other).sum())
    return measure.ranks.sum((model + model.mT) / 2).cpu()


def _norm(parts: list[Tensor]) -> float:
    return float(torch.stack([part.double().square().sum() for part in parts]).sum().sqrt())
