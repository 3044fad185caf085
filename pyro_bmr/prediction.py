"""Posterior predictive distributions, averaged over draws of the weights, with their epistemic and aleatoric parts apart.

Owns `predict`. Next: `metrics.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmr.elbo import Values
from pyro_bmr.errors import ModelError
from pyro_bmr.guides.mean_field import base_distribution
from pyro_bmr.posterior import Posterior


@dataclass(frozen=True)
class ClassPrediction:
    """`probs` (n, classes), the average over draws. In nats, (n,): `aleatoric`, the mean entropy of the draws; `epistemic`, what the draws disagree by
    (mutual information; their sum is the entropy of `probs`)."""

    probs: Tensor
    aleatoric: Tensor
    epistemic: Tensor

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y | x, data), (n,), nats."""
        return self.probs.gather(1, y.to(self.probs.device).long()[:, None])[:, 0].clamp_min(torch.finfo(self.probs.dtype).tiny).log()


@dataclass(frozen=True)
class RealPrediction:
    """A mixture of Normals over draws: `locs` and `scales` (draws, n), in the units of y."""

    locs: Tensor
    scales: Tensor

    @property
    def mean(self) -> Tensor:
        return self.locs.mean(0)

    @property
    def aleatoric(self) -> Tensor:
        """The mean noise variance, (n,), squared units of y."""
        return self.scales.square().mean(0)

    @property
    def epistemic(self) -> Tensor:
        """The variance of the draws' means, (n,), squared units of y."""
        return self.locs.var(0, correction=0)

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y | x, data), (n,), nats."""
        return torch.distributions.Normal(self.locs, self.scales).log_prob(y.to(self.locs.device)).logsumexp(0) - math.log(len(self.locs))


Prediction = ClassPrediction | RealPrediction


@torch.no_grad()
def predict(program: Callable[..., Any], posterior: Posterior, x: Tensor, *, draws: int = 32, seed: int = 0, batch_size: int = 10_000) -> Prediction:
    """The posterior predictive of the observed site of `program(x)` at every row of `x`.

    Args:
        draws: of the latent sites; the same ones for all rows. 0 stands for one run at the posterior's point (means, medians of scales).
        batch_size: rows at once, which bounds the memory.

    Raises:
        ModelError: the program has no single observed site, or that site is neither Categorical nor Normal.
    """
    if draws < 0 or batch_size < 1:
        raise ModelError(f"predict(draws={draws}, batch_size={batch_size}): draws >= 0 and batch_size >= 1 are wanted")
    check_callable_without_y(program, x)
    like = next(iter(posterior.sites.values())).mean
    x = x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)
    generator = torch.Generator(device=like.device).manual_seed(seed)
    was_training = isinstance(program, nn.Module) and program.training
    if isinstance(program, nn.Module):
        program.eval()
    try:
        with torch.random.fork_rng():
            runs = [_observed(program, posterior.draw(generator) if draws else posterior.point(), x, batch_size) for _ in range(max(draws, 1))]
    finally:
        if was_training:
            program.train()  # type: ignore[attr-defined]
    if isinstance(runs[0][0], torch.distributions.Categorical):
        probs = torch.stack([torch.cat([fn.probs for fn in run]) for run in runs])
        mean = probs.mean(0)
        aleatoric = _entropy(probs).mean(0)
        return ClassPrediction(mean, aleatoric, (_entropy(mean) - aleatoric).clamp_min(0))
    return RealPrediction(*(torch.stack([torch.cat([getattr(fn, part) for fn in run]) for run in runs]) for part in ("loc", "scale")))


def check_callable_without_y(program: Callable[..., Any], x: Tensor) -> None:
    """Raises a ModelError unless `program(x)` can be called: its targets need a default."""
    try:
        inspect.signature(program).bind(x)
    except TypeError:
        raise ModelError("prediction calls program(x); give the targets a default: def program(x, y=None)") from None


def _observed(program: Callable[..., Any], values: dict[str, Tensor], x: Tensor, batch_size: int) -> list[Any]:
    """The distribution of the observed site, batch by batch, given the latent values."""
    parts = []
    for batch in x.split(batch_size):
        with Values(values) as run:
            program(batch)
        fns = [base_distribution(msg["fn"]) for msg in run.observed.values()]
        if len(fns) != 1 or not isinstance(fns[0], (torch.distributions.Categorical, torch.distributions.Normal)):
            found = ", ".join(f"{name} ({type(base_distribution(msg['fn'])).__name__})" for name, msg in run.observed.items()) or "none"
            raise ModelError(
                f"prediction needs one observed site, Categorical or Normal, that is drawn when the program is called as program(x); found: {found}"
            )
        parts.append(fns[0])
    return parts


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(-1)
