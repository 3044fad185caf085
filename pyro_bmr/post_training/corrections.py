r"""Steps that bring a pruned network nearer to the dense one, without labels.

Owns `corrected`, `Corrected` and `rates`. A conditional mean is exact for the Kronecker posterior
at the weights where the curvature was taken. Far from there, and between layers, it is not. The
steps are Adam's (Kingma & Ba 2015, arXiv 1412.6980) along the gradient of the divergence from the
dense network, each on one batch of the calibration rows. Next: `pruned.py`.

Adam moves every weight by about its rate η, whatever the scale of the loss. If all k kept weights
of a row w move by η towards the same side, the sum of the row over inputs of one size changes by
kη, where the sum itself is about ‖w‖. So a layer has the rate

.. math:: \eta = c \, \operatorname{median}_i \frac{\lVert w_i \rVert}{k_i},

and one number c serves layers of all widths and sizes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_bmr.data.inputs import rows_in
from pyro_bmr.errors import ModelError
from pyro_bmr.post_training.layer import Layer
from pyro_bmr.post_training.measure import Measure, write

_WARM_UP = 0.1  # of the steps
_TRIES = 3
_LESS = 3.0  # a rate that did not serve, over the next one


class Corrected(NamedTuple):
    """Whether steps led nearer to the dense network, c of these or of those that were tried last,
    and the divergence after them, nats.
    """

    nearer: bool
    rate: float
    divergence: float


def corrected(
    measure: Measure,
    net: nn.Module,
    layers: Mapping[str, Layer],
    moved: Mapping[str, nn.Parameter],
    steps: int,
    rate: float,
    seed: int,
) -> Corrected:
    """Moves the parameters `moved` of `net`; what is zero of a weight stays zero. Steps that lead
    away from the dense network are taken back and tried again at a third of the rate.
    """
    before = measure.divergence(net)
    if not math.isfinite(before):
        raise ModelError(
            f"prune: the outputs are {before} nats from those of the dense network; give rows for"
            " which its outputs are finite, or a network in float32"
        )
    values = {name: p.detach().clone() for name, p in moved.items()}
    for _ in range(_TRIES if before else 0):
        _descend(measure, net, layers, moved, rates(layers, moved, rate), steps, seed)
        after = measure.divergence(net)
        if after < before:
            return Corrected(True, rate, after)
        write(net, values)
        rate /= _LESS
    return Corrected(False, rate, before)


def rates(
    layers: Mapping[str, Layer], moved: Mapping[str, nn.Parameter], rate: float
) -> dict[str, float]:
    """Parameter → η. A bias has that of its layer, and what is in no layer the median of them."""
    found = {}
    for name, layer in layers.items():
        rows = layer.as_matrix(moved[name].detach()).float()
        counts = rows.count_nonzero(1)
        each = rows.norm(dim=1)[counts > 0] / counts[counts > 0]
        found[name] = rate * float(each.median()) if len(each) else 0.0
    of_others = median(found.values())
    of_biases = {layer.bias: found[name] for name, layer in layers.items()}
    return {name: found.get(name, of_biases.get(name, of_others)) for name in moved}


def _descend(
    measure: Measure,
    net: nn.Module,
    layers: Collection[str],
    moved: Mapping[str, nn.Parameter],
    each: Mapping[str, float],
    steps: int,
    seed: int,
) -> None:
    """Steps whose rates rise, and then fall to zero. Parameters of half precision are moved in
    float32.
    """
    values = {
        name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
        for name, p in moved.items()
    }
    # what was pruned, here or before, stays zero; what is zero throughout has not been trained
    pruned = {name: value != 0 for name, value in values.items()}
    stay = {name: kept for name, kept in pruned.items() if name in layers or bool(kept.any())}
    for value in values.values():
        value.requires_grad_(True)
    adam = torch.optim.Adam([{"params": [values[name]], "lr": each[name]} for name in values])
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _share(step, steps))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        if not order:
            order = torch.randperm(
                len(measure.rows.batches), generator=generator, device="cpu"
            ).tolist()
        _set_gradients(measure, net, moved, values, order.pop(), step)
        adam.step()
        schedule.step()
        with torch.no_grad():
            for name, mask in stay.items():
                values[name].mul_(mask)
    write(net, values)


def _share(step: int, steps: int) -> float:
    """Of the rate, in the step of that number."""
    return min((step + 1) / max(_WARM_UP * steps, 1), (steps - step) / ((1 - _WARM_UP) * steps), 1)


def _set_gradients(
    measure: Measure,
    net: nn.Module,
    moved: Mapping[str, nn.Parameter],
    values: Mapping[str, Tensor],
    number: int,
    step: int,
) -> None:
    """The gradient of the divergence on the batch of that number, summed over the processes, of
    which some may have no rows of it. Targets that are drawn are new in each step, so that their
    noise averages out.
    """
    found: list[Tensor | None] = [None] * len(values)
    if rows := rows_in(measure.rows.batches[number][0]):
        cast = {name: value.to(moved[name].dtype) for name, value in values.items()}
        apart = measure.apart(net, cast, number, seed=1 + step)
        found = list(torch.autograd.grad(apart, list(values.values()), allow_unused=True))
        measure.bar.update(rows)
    for value, slope in zip(values.values(), found, strict=True):
        own = torch.zeros_like(value) if slope is None else slope.to_dense()
        value.grad = measure.ranks.sum(own)
