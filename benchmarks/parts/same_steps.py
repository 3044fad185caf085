"""Other rules with the steps of `prune` between their rounds: what is left of a difference between
rules if all of them are given these steps.

Owns `with_steps`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.parts import one_shot
from pyro_bmr.curvatures.scores import Loss
from pyro_bmr.post_training.calibration import Calibration
from pyro_bmr.post_training.corrections import corrected
from pyro_bmr.post_training.layer import layers_of
from pyro_bmr.post_training.measure import Measure

RATE, BATCH = 0.05, 128  # the defaults of `prune`
Rule = Callable[[nn.Module, float], nn.Module]


def with_steps(
    rule: Rule,
    net: nn.Module,
    data: tuple[Tensor, Tensor],
    path: Sequence[float],
    scored: Sequence[float],
    steps: tuple[int, int],
    likelihood: Any,
) -> list[tuple[float, nn.Module]]:
    """The networks of the sizes in `scored`: after each round the first number of steps, and of
    what is scored a copy with the second.
    """
    parts = zip(*(part.split(BATCH) for part in data), strict=True)
    rows = Calibration(tuple(parts), len(data[0]), len(data[0]))
    measure = Measure(net, rows, Loss(likelihood, {}), "true", 1, tqdm(disable=True))
    curved = one_shot.factors(net, data, "true", likelihood)
    names = one_shot.weights_of(curved)
    layers = layers_of(curved, dict(net.named_parameters()), dict.fromkeys(names, 1.0), {}, 1.0)

    def moved(one: nn.Module, count: int, seed: int) -> nn.Module:
        corrected(measure, one, layers, dict(one.named_parameters()), count, RATE, seed)
        return one

    found = []
    for number, kept in enumerate(path):
        net = rule(net, kept)
        if kept in scored:
            found.append((kept, moved(copy.deepcopy(net), steps[1], number)))
        net = moved(copy.deepcopy(net), steps[0], number)
    return found
