"""The step of every guide but the flat `MeanField`: both terms of the ELBO through autograd.

Owns `AutogradStep`. Next: `natural_gradient.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_bmr.fitting.elbo import masked_terms
from pyro_bmr.fitting.step import Draw
from pyro_bmr.fitting.unread_terms import number_of
from pyro_bmr.guides import MeanField, Point


class AutogradStep:
    """A step whose gradients are those of `elbo.masked_terms`; they lie in `.grad` after a run, and
    the guide is always up to date.

    Args:
        program, guide: of the fit, the program with the handlers that count a batch as all rows.
        rows: N, of the data.
        temperature: T.
        trained: the parameters of both that are trained.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        guide: Any,
        rows: int,
        temperature: float,
        trained: Iterable[Tensor],
    ) -> None:
        self.program, self.guide, self.rows, self.temperature = program, guide, rows, temperature
        self.trained, self.masks = list(trained), dict[str, Tensor]()
        self.no_noise = torch.empty(0)

    @property
    def parameters(self) -> list[Tensor]:
        return self.trained

    def run(self, batch: tuple[Any, ...], number: int) -> Draw:
        likelihood, kl = masked_terms(self.program, self.guide, batch, self.masks)
        ((self.temperature * kl - likelihood) / self.rows).backward()
        return Draw(number_of(likelihood), number_of(kl), [], [], [], self.no_noise, 1.0)

    def write_gradients(self, draw: Draw) -> None: ...

    def prune(self, masks: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        self.masks = dict(masks)

    def write_back(self) -> None: ...

    def release(self) -> None: ...

    def forget(self) -> None: ...

    def not_finite(self, draw: Draw) -> set[str]:
        return {name for name, vector in self._named() if not bool(vector.isfinite().all())}

    def _named(self) -> list[tuple[str, Tensor]]:
        """The values and gradients of the guide, by site where it has flat vectors."""
        if isinstance(self.guide, (MeanField, Point)):
            vectors = [t for p in self.guide.parameters() for t in (p.detach(), p.grad)]
            return [
                (latent.name, part)
                for vector in vectors
                if vector is not None
                for latent, part in zip(
                    self.guide.latents, vector.split(self.guide.sizes), strict=True
                )
            ]
        if isinstance(self.guide, nn.Module):
            return [(name, value_and_gradient(p)) for name, p in self.guide.named_parameters()]
        return []

    def to_average(self, draw: Draw) -> list[Tensor]:
        return []

    def averaged(self, draw: Draw, likelihood: float, kl: float, vectors: Sequence[Tensor]) -> Draw:
        return draw._replace(expected_log_likelihood=likelihood, kl=kl)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None: ...


def value_and_gradient(parameter: Tensor) -> Tensor:
    """Their sum, which is finite only if both are, up to an overflow."""
    value = parameter.detach()
    return value if parameter.grad is None else parameter.grad + value
