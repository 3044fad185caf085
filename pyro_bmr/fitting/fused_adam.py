"""Adam for the fast steps: the kernel of torch's fused Adam without what torch does around it, and
with the pull of a prior as weight decay, which takes no pass of its own.

Owns `ChunkedAdam`, of `MeanFieldStep`, and `PointAdam`, of `PointStep`. Checkpoints know both as
`kind`, torch's Adam, whose state they have. Next: `optimizers.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from pyro_bmr.fitting.chunks import log_scale_gradient
from pyro_bmr.fitting.mean_field_step import MeanFieldStep
from pyro_bmr.fitting.point_step import PointStep
from pyro_bmr.fitting.step import Draw, TakesDraws

_MOMENTS = "exp_avg", "exp_avg_sq"
_SLOW = 4e-3  # the largest learning rate at which standard deviations may be some steps old


class ChunkedAdam(TakesDraws, Adam):  # type: ignore[misc]
    """Its results are those of torch's fused Adam after `write_gradients`, but for standard
    deviations of some steps ago.

    A chunk is updated as soon as its gradients are there, which are never whole. Parameters that
    are no sites have theirs in their `.grad`. After 500 steps, of more than 10,000 numbers on a
    CPU and at a learning rate of 0.004 or less, the standard deviation in a draw may be three steps
    old. Log σ moved by up to three times the rate a step in fits that were looked at, so that is
    less than four per cent.
    """

    kind = Adam

    def __init__(self, step: MeanFieldStep, learning_rate: float) -> None:
        super().__init__(step.parameters, lr=learning_rate, fused=True)
        self._vectors = step
        self._moments: list[Tensor] = []
        self._cuts: list[list[Tensor]] = []  # the moments of each chunk

    def take(self, draw: Draw) -> None:
        vectors = self._vectors
        if vectors.loc not in self.state:  # torch makes the moments
            vectors.write_gradients(draw)
            Adam.step(self)
            vectors.loc.grad = vectors.log_scale.grad = None
            return
        if vectors.trained:
            Adam.step(self)
        self._update(draw, self.param_groups[0])
        # elsewhere the number of the step is on the device, and exp costs little
        slow = vectors.loc.device.type == "cpu" and self.param_groups[0]["lr"] <= _SLOW
        steps = int(self.state[vectors.loc]["step"]) if slow and vectors.may_lag else 0
        every = vectors.period(steps)
        vectors.stale = [(steps + k) % every == 0 for k in range(len(vectors.chunks))]

    def _update(self, draw: Draw, group: Mapping[str, Any]) -> None:
        """Takes the step of the vectors."""
        vectors, kl_weight = self._vectors, self._vectors.kl_weight
        states = self.state[vectors.loc], self.state[vectors.log_scale]
        of_mean, of_log = ([state["step"].add_(1)] for state in states)
        cuts = self._cut([state[key] for state in states for key in _MOMENTS])
        noise = draw.noise.split(vectors.sizes)
        for chunk, g, odd, own, pull, (m, v, m_log, v_log) in zip(
            vectors.chunks, draw.gradients, draw.odd, noise, draw.pulls, cuts, strict=True
        ):
            slope = log_scale_gradient(chunk, odd, own, draw.sign, pull, kl_weight, chunk.scratch)
            decay = pull.decay
            if decay is None:
                decay, g = 0.0, pull.add_to(g, chunk.loc, kl_weight, g)
            _update(group, [chunk.loc], [g], [m], [v], of_mean, kl_weight * decay)
            _update(group, [chunk.log_scale], [slope], [m_log], [v_log], of_log, 0.0)

    def _cut(self, moments: list[Tensor]) -> list[list[Tensor]]:
        """The moments of each chunk: first and second of the mean, first and second of log σ."""
        if list(map(id, moments)) != list(map(id, self._moments)):
            self._moments = moments
            self._cuts = [[m[c.part] for m in moments] for c in self._vectors.chunks]
        return self._cuts


class PointAdam(TakesDraws, Adam):  # type: ignore[misc]
    """Its results are those of torch's fused Adam after `write_gradients`."""

    kind = Adam

    def __init__(self, step: PointStep, learning_rate: float) -> None:
        super().__init__(step.parameters, lr=learning_rate, fused=True)
        self._point = step

    def take(self, draw: Draw) -> None:
        group, decays = self.param_groups[0], self._point.decay_of
        moved = [p for p in group["params"] if p.grad is not None]
        if self._point.masks or any(p not in self.state for p in moved):
            self._point.write_gradients(draw)
            Adam.step(self)
            return
        alike = defaultdict[Any, list[Tensor]](list)
        for p in moved:  # the kernel is for parameters of one kind
            alike[decays.get(p, 0.0), p.dtype, p.device].append(p)
        for (decay, *_), parameters in alike.items():
            states = [self.state[p] for p in parameters]
            steps = [state["step"].add_(1) for state in states]
            m, v = ([state[key] for state in states] for key in _MOMENTS)
            _update(group, parameters, [p.grad for p in parameters], m, v, steps, decay)  # type: ignore[misc]


def _update(
    group: Mapping[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    decay: float,
) -> None:
    """One update of the `parameters`, their moments among it, with the settings of a parameter
    group; `decay` times a parameter is added to its gradient.
    """
    beta1, beta2 = group["betas"]
    torch._fused_adam_(
        parameters,
        gradients,
        means,
        squares,
        [],
        steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=decay,
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
