"""The natural-gradient fit of `MeanField`: one vector of optimiser state instead of four, and steps
that follow the variances of the posterior, which are one more.

Owns `natural_gradient`, which `fit` takes as its optimiser, and the optimiser behind it. Next:
`optimizers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from pyro_bmr.errors import FitError, described, holds
from pyro_bmr.fitting.mean_field_step import MeanFieldStep
from pyro_bmr.fitting.step import Draw, TakesDraws

# Bounds of one step of the log precision. A gradient out of all proportion narrows more than it
# widens, which is the stable side.
_LARGEST_WIDENING, _LARGEST_NARROWING = 0.1, 0.5
_FIRST_AVERAGE = 100  # steps that the start value of the curvature counts for


@dataclass(frozen=True)
class NaturalGradient:
    """The settings of `natural_gradient`, which documents them."""

    learning_rate: float
    momentum: float
    averaging: float
    curvature: float
    cap: float
    adam_rate: float

    def __post_init__(self) -> None:
        for name in ("learning_rate", "averaging", "curvature", "cap", "adam_rate"):
            if not holds(lambda x: 0 < x < math.inf, getattr(self, name)):
                raise FitError(
                    f"natural_gradient({name}={described(getattr(self, name))}): expected a finite"
                    " number > 0"
                )
        if not holds(lambda x: 0 <= x < 1, self.momentum):
            raise FitError(
                f"natural_gradient(momentum={described(self.momentum)}): expected a number >= 0 and"
                " below 1"
            )

    def optimizer(self, step: MeanFieldStep, others: Iterable[Tensor]) -> OnlineNewton:
        """The optimiser of the vectors of `step`; Adam takes the parameters `others`, which are no
        sites.
        """
        return OnlineNewton(self, step, others)


def natural_gradient(
    learning_rate: float = 0.1,
    *,
    momentum: float = 0.9,
    averaging: float = 1e-4,
    curvature: float = 0.1,
    cap: float = 0.05,
    adam_rate: float = 3e-3,
) -> NaturalGradient:
    r"""The natural-gradient descent of the negative ELBO, as the optimiser of a `MeanField` fit:
    `fit(..., optimizer=natural_gradient())`.

    With ℓ the loss of `fit` (in nats per row), λ = N/T, and s the standard deviation of a weight's
    prior, each step is

    .. math:: \mu \leftarrow \mu - \alpha\, \sigma^2 \lambda\, \overline{\nabla_\mu \ell}, \qquad
        \log\sigma \leftarrow \log\sigma - \tfrac{\rho}{2}\, \lambda\, \nabla_{\log\sigma} \ell
        = \log\sigma - \tfrac{\rho}{2} \left(\frac{\hat h + \delta}{h + \delta} - 1\right)

    where 1/σ² = λ(h + δ), λδ = 1/s², and ĥ = gε/σ estimates the curvature of the mean loss from its
    gradient g at the draw μ + σε. So h is a running average of ĥ, and no second vector is trained:
    variational online Newton (Khan et al. 2018, arXiv 1806.04854), in the form that keeps σ
    positive (Lin, Schmidt & Khan 2020, arXiv 2002.10060; IVON, Shen et al. 2024, arXiv 2402.17641),
    here with ρ acting on log σ. It holds for every site of the guide, whatever its prior; real
    sites start with the standard deviation of `curvature`. Parameters that are no sites, such as
    gains of norm layers, are trained by Adam.

    Args:
        learning_rate: α, of the means; the schedule of the fit scales it.
        momentum: of the gradient of the means, bias-corrected.
        averaging: the least ρ, the weight of a new ĥ; in step t it is max(ρ, 2/(t + 100)), a
            growing average that forgets the start.
        curvature: h at the start, in nats per row and squared unit of the weight.
        cap: the largest change of a mean in one step, in units of the site. Without it fits can
            diverge.
        adam_rate: the learning rate of that Adam.

    Raises:
        FitError: an argument is out of range; in `fit`, the guide is not `MeanField`.

    Example:
        >>> fit(program, data, optimizer=natural_gradient())
    """
    return NaturalGradient(learning_rate, momentum, averaging, curvature, cap, adam_rate)


class OnlineNewton(TakesDraws):
    """The optimiser of `natural_gradient`. Two parameter groups, so that
    schedules reach both: the vectors, and what Adam trains.
    """

    def __init__(
        self, settings: NaturalGradient, step: MeanFieldStep, others: Iterable[Tensor]
    ) -> None:
        self.settings, self.vectors, self.steps = settings, step, 0
        super().__init__([{"params": [step.loc, step.log_scale], "lr": settings.learning_rate}], {})
        trained = list(others)
        fused = not any(p.is_complex() for p in trained)
        self.adam = Adam(trained, lr=settings.adam_rate, fused=fused) if trained else None
        if self.adam:
            self.add_param_group({"params": trained, "lr": settings.adam_rate})
        self.state[step.loc]["average"] = torch.zeros_like(step.loc)
        # σ² of each chunk, the vector σ, and the chunks in which it has changed
        self._variances: list[Tensor] = []
        self._std, self._changed = step.std.new_empty(0), list[bool]()

    def take(self, draw: Draw) -> None:
        settings, vectors = self.settings, self.vectors
        self.steps += 1
        unbiased = 1 - settings.momentum**self.steps
        rate = self.param_groups[0]["lr"] / (vectors.kl_weight * unbiased)
        # the curvature is an average over thousands of steps; of many weights, not all are needed
        every = vectors.period(self.steps)
        rho = every * max(settings.averaging, 2 / (self.steps + _FIRST_AVERAGE))
        average = self.state[vectors.loc]["average"]
        if self._std is not vectors.std:
            self._std = vectors.std
            self._variances = [torch.empty_like(chunk.std) for chunk in vectors.chunks]
            self._changed = [True] * len(vectors.chunks)
        noise, averages = draw.noise.split(vectors.sizes), average.split(vectors.sizes)
        weight, limit = vectors.kl_weight * unbiased, settings.cap / rate
        for k, (chunk, g, odd, prior, smooth) in enumerate(
            zip(vectors.chunks, draw.gradients, draw.odd, draw.pulls, averages, strict=True)
        ):
            std, variance = chunk.std, self._variances[k]
            if self._changed[k]:
                torch.mul(std, std, out=variance)
            due = self._changed[k] = (self.steps + k) % every == 0
            if due:
                # change = σ(λgε + pσ) = (ĥ + δ)/(h + δ)
                change = torch.mul(std, prior.precision, out=chunk.scratch)
                change.addcmul_(odd, noise[k], value=draw.sign / vectors.kl_weight).mul_(std)
                change.sub_(prior.weight).clamp_(-_LARGEST_WIDENING / rho, _LARGEST_NARROWING / rho)
                chunk.log_scale.sub_(change, alpha=0.5 * rho)
                vectors.stale[k] = True
            # pull = ḡ + δ(μ − η), up to the factor of the bias correction
            smooth.lerp_(g, 1 - settings.momentum)
            pull = prior.add_to(smooth, chunk.loc, weight, chunk.scratch)
            chunk.loc.sub_(pull.mul_(variance).clamp_(-limit, limit), alpha=rate)
        if self.adam:
            self.adam.param_groups[0]["lr"] = self.param_groups[1]["lr"]
            self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "steps": self.steps,
            "adam": self.adam.state_dict() if self.adam else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.steps = state_dict["steps"]
        if self.adam:
            self.adam.load_state_dict(state_dict["adam"])
