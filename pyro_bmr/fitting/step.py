"""What a fit asks of a step: a draw, the gradient of the loss at it, and the two terms of the ELBO.

Owns the protocol `Step`, the `Draw` of one run, and `TakesDraws`, for optimisers of draws.
`MeanFieldStep` has the gradients written out; `AutogradStep` takes every other guide. Next:
`mean_field_step.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_bmr.fitting.site_prior import Pull
from pyro_bmr.fitting.unread_terms import Number


class Draw(NamedTuple):
    """What one run gives: both terms of the ELBO in nats, and for the fast step the gradient g and
    the prior of each chunk. The closed part of `kl` may be up to sixteen steps old.

    `gradients` is g as the mean has it, `odd` is g as it multiplies the noise. They are the same at
    one draw. At two draws with opposite signs they are half the sum and half the difference.
    """

    expected_log_likelihood: Number
    kl: Number
    gradients: list[Tensor]
    odd: list[Tensor]
    pulls: list[Pull]
    noise: Tensor
    sign: float


class Step(Protocol):
    """The gradient of (T·KL − E[log p(y|θ)])/N at one draw, for one guide.

    `trained` are the parameters whose gradient a run leaves in their `.grad`; the caller clears
    them before. `parameters` are all that an optimiser moves.
    """

    guide: Any
    trained: list[Tensor]

    @property
    def parameters(self) -> list[Tensor]: ...

    def run(self, batch: tuple[Any, ...], number: int) -> Draw:
        """The draw of step `number` at the rows of `batch`."""

    def write_gradients(self, draw: Draw) -> None:
        """Puts the gradient of the loss into the `.grad` of all parameters: one call per run."""

    def prune(self, masks: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        """Puts `masks` (site → bool tensor) in force, in the state of `optimizer` as well."""

    def write_back(self) -> None:
        """Brings the guide up to date."""

    def release(self) -> None:
        """Frees memory that the next run takes again."""

    def forget(self) -> None:
        """Has the program declare its priors again, as after a change of the empirical scales."""

    def not_finite(self, draw: Draw) -> set[str]:
        """The sites, or parameters of the guide, whose value or gradient is not finite."""

    def to_average(self, draw: Draw) -> list[Tensor]:
        """What several processes average of a draw, beside the `.grad` of `trained`."""

    def averaged(self, draw: Draw, likelihood: float, kl: float, vectors: Sequence[Tensor]) -> Draw:
        """The draw with these terms, and with the averages of `to_average`."""

    def state(self) -> dict[str, Any]:
        """What the steps so far have changed beside the guide, for a checkpoint."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, after `prune` with its masks."""


class TakesDraws(Optimizer):
    """An optimiser whose step is that of a `Draw`, which it spends: `step(closure)` takes the one
    that the closure gives.

    A fit calls `take_next`. From the second step on that leaves out what torch wraps around each
    `step`, its profiler and hooks, which cost a thirtieth of a step.
    """

    _stepped = False

    @abstractmethod
    def take(self, draw: Draw) -> None:
        """Takes the step, under `torch.no_grad`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Draw]) -> Draw:  # type: ignore[override]
        draw = closure()
        self.take(draw)
        self._stepped = True  # schedules warn unless this was called before them
        return draw

    @torch.no_grad()
    def take_next(self, draw: Draw) -> None:
        """Takes the step of `draw`."""
        if self._stepped:
            self.take(draw)
        else:
            self.step(lambda: draw)
