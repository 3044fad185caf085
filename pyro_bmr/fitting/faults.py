"""What a fit does with a step that it cannot take: say where, and stop, or skip it and count.

Owns `Faults` and `diagnosis`. Next: `run.py`.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from pyro_bmr.errors import FitError
from pyro_bmr.fitting.mean_field_step import Draw, MeanFieldStep
from pyro_bmr.guides import MeanField, Point

# weight of a new step in the averages, steps before they are trusted, standard deviations
_FORGETS, _SURE, _JUMP = 0.01, 100, 20.0


class Faults:
    """The steps that were skipped, at most `allowed`, and what the expected log likelihood of a
    step has been lately, by which a jump is known.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed, self.skipped = allowed, 0
        self.forget()

    def forget(self) -> None:
        """Begins the averages anew, as after a reduction, which may lower the likelihood for
        good.
        """
        self.steps, self.mean, self.var = 0, 0.0, 0.0

    def jump(self, likelihood: float) -> str:
        """What is wrong with the expected log likelihood of a step if it lies twenty standard
        deviations below those of the last hundred or so, else nothing. Where no step may be
        skipped, none is.
        """
        if not self.allowed:
            return ""
        std = math.sqrt(self.var)
        if self.steps >= _SURE and likelihood < self.mean - _JUMP * std:
            return (
                f"the expected log likelihood fell to {likelihood:.6g}, of late it was"
                f" {self.mean:.6g} ± {std:.2g}"
            )
        self.steps += 1
        rate = max(_FORGETS, 1 / self.steps)
        deviation = likelihood - self.mean
        self.mean += rate * deviation
        self.var = (1 - rate) * (self.var + rate * deviation * deviation)
        return ""

    def skip(self, what: str) -> None:
        """Counts a step that is skipped.

        Raises:
            FitError: that is one too many.
        """
        if self.skipped >= self.allowed:
            raise FitError(
                what + (f"; steps skipped before: {self.skipped}" if self.allowed else "")
            )
        self.skipped += 1

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [self.skipped, self.steps, self.mean, self.var]

    def restore(self, state: list[float]) -> None:
        """Goes on from `state`."""
        self.skipped, self.steps = int(state[0]), int(state[1])
        self.mean, self.var = float(state[2]), float(state[3])


def diagnosis(
    guide: Any,
    program: Any,
    flat: MeanFieldStep | None,
    draw: Draw | None,
    likelihood: float,
    kl: float,
) -> str:
    """What to say of a step whose loss or gradient is not finite, with the sites where it is
    not.
    """
    named: dict[str, Tensor] = {}
    if flat is not None and draw is not None:
        named = flat.names(draw)
        named |= {
            f"{name} ": (flat.loc[part] + flat.log_scale[part]).detach()
            for name, part in flat.parts.items()
        }
    elif isinstance(guide, Point):
        named |= {
            f"{name} ": part
            for name, part in zip(
                (s.name for s in guide.latents), guide.loc.detach().split(guide.sizes), strict=True
            )
        }
        if guide.loc.grad is not None:
            named |= dict(
                zip((s.name for s in guide.latents), guide.loc.grad.split(guide.sizes), strict=True)
            )
    for module in (guide, program) if not isinstance(guide, (MeanField, Point)) else (program,):
        if isinstance(module, nn.Module):
            named |= {
                name: p.detach() if p.grad is None else p.grad + p.detach()
                for name, p in module.named_parameters()
            }
    bad = {name.strip() for name, values in named.items() if not bool(values.isfinite().all())}
    where = ", ".join(sorted(bad)) or "the observed site"
    return (
        f"the loss or its gradient is not finite at {where} (expected log likelihood"
        f" {likelihood:.6g}, KL {kl:.6g})"
    )
