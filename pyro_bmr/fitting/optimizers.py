"""The optimiser and the schedule of a fit: the defaults, and how the optimiser is made for a step.

Owns `adam`, `cosine` and `optimizer_of`. Next: `arguments.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from pyro_bmr.errors import FitError
from pyro_bmr.fitting.fused_adam import ChunkedAdam, PointAdam
from pyro_bmr.fitting.mean_field_step import MeanFieldStep
from pyro_bmr.fitting.natural_gradient import NaturalGradient
from pyro_bmr.fitting.point_step import PointStep
from pyro_bmr.fitting.step import Step

MakeOptimizer = Callable[[Any], Optimizer]
MakeScheduler = Callable[[Optimizer, int], LRScheduler]


def adam(learning_rate: float = 3e-3) -> MakeOptimizer:
    """The default optimiser: Adam, fused where all parameters are real."""
    return _Adam(learning_rate)


@dataclass(frozen=True)
class _Adam:
    """What `adam` gives."""

    learning_rate: float

    def __call__(self, parameters: Any) -> Optimizer:
        parameters = list(parameters)
        return torch.optim.Adam(parameters, lr=self.learning_rate, fused=_are_real(parameters))

    def of_step(self, step: Step) -> Optimizer:
        """Adam for the parameters of `step`, as the fast steps take it if it is one."""
        real = _are_real(step.parameters)
        if real and isinstance(step, MeanFieldStep):
            return ChunkedAdam(step, self.learning_rate)
        if real and isinstance(step, PointStep):
            return PointAdam(step, self.learning_rate)
        return self(step.parameters)


def _are_real(parameters: Iterable[Any]) -> bool:
    return not any(isinstance(p, Tensor) and p.is_complex() for p in parameters)


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """The default schedule: the learning rate falls to 0 on half a cosine over the fit."""
    return CosineAnnealingLR(optimizer, T_max=steps)


def optimizer_of(
    make: MakeOptimizer | NaturalGradient, step: Step, rows: float, fresh: Iterable[str]
) -> Optimizer:
    """The optimiser of the parameters of `step`.

    Args:
        rows: N/T, as many rows as the data count.
        fresh: the sites that the natural gradient starts at the standard deviation of its own.

    Raises:
        FitError: no optimiser can be made, or its step takes a closure; the natural gradient is
            asked for another guide than `MeanField`.
    """
    if isinstance(make, NaturalGradient):
        if not isinstance(step, MeanFieldStep):
            raise FitError(
                'optimizer=natural_gradient(): expected guide=MeanField with estimator="weight" or'
                f' "antithetic", got {type(step.guide).__name__}; give another optimiser, such as'
                " adam()"
            )
        for name in fresh:
            part = step.log_scale.detach()[step.parts[name]]
            part.fill_(-0.5 * math.log(rows * make.curvature))
        return make.optimizer(step, step.trained)
    try:
        made = make.of_step(step) if isinstance(make, _Adam) else make(step.parameters)
    except (ValueError, TypeError) as error:
        raise FitError(f"optimizer: it cannot be made ({error})") from error
    if not isinstance(made, Optimizer) or isinstance(made, torch.optim.LBFGS):
        raise FitError(
            "optimizer: expected a torch optimiser whose step takes no closure, got"
            f" {type(made).__name__}"
        )
    return made
