"""Posterior predictive distributions, averaged over draws of the weights, with their epistemic and aleatoric parts apart.

Owns `predict`, and `prediction_of`, which averages over draws or members of any origin. Next: `calibration.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_bmr.elbo import Values
from pyro_bmr.errors import DataError, ModelError
from pyro_bmr.fit_arguments import check_labels, check_rows
from pyro_bmr.guides.mean_field import base_distribution
from pyro_bmr.memory import check_memory
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
        check_labels(self.probs, y)
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
        if y.shape != self.locs.shape[1:]:
            raise DataError(f"y has shape {tuple(y.shape)}, the prediction is of {self.locs.shape[1]} rows; one number per row is wanted")
        return torch.distributions.Normal(self.locs, self.scales).log_prob(y.to(self.locs.device)).logsumexp(0) - math.log(len(self.locs))


Prediction = ClassPrediction | RealPrediction


@torch.no_grad()
def predict(program: Callable[..., Any], posterior: Posterior, x: Tensor, *, draws: int = 32, seed: int = 0, batch_size: int = 10_000) -> Prediction:
    """The posterior predictive of the observed site of `program(x)` at every row of `x`.

    Args:
        draws: of the latent sites; the same ones for all rows. 0 stands for one run at the posterior's point (means, medians of scales).
        batch_size: rows times draws at once, which bounds the memory. With fewer rows than that, several draws go through the program at once, by
            `torch.func.vmap` if the program allows it.

    Raises:
        DataError: `x` has no rows, or is not finite.
        ModelError: draws times rows of a real target are more than the memory that is free.
        ModelError: the program has no single observed site, or that site is neither Categorical nor Normal.
    """
    if not isinstance(draws, int) or draws < 0 or batch_size < 1:
        raise ModelError(f"predict(draws={draws}, batch_size={batch_size}): draws >= 0 and batch_size >= 1 are wanted")
    check_rows(x, x, "the rows to predict")
    check_callable_without_y(program, x)
    like = next(iter(posterior.sites.values())).mean
    x = x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)
    generator = torch.Generator(device=like.device).manual_seed(seed)
    was_training = isinstance(program, nn.Module) and program.training
    if isinstance(program, nn.Module):
        program.eval()
    try:
        with torch.random.fork_rng():
            if draws:
                parts = _over_draws(program, (posterior.draw(generator) for _ in range(draws)), draws, x, batch_size)
            else:
                parts = iter([_parameters(_observed(program, posterior.point(), x, batch_size)[1])])
            return prediction_of(parts, max(draws, 1))
    finally:
        if was_training:
            program.train()  # type: ignore[attr-defined]


Parameters = tuple[Tensor, ...]  # (probs,) of a Categorical, (loc, scale) of a Normal; several draws are stacked in front


def _over_draws(program: Callable[..., Any], values: Iterator[dict[str, Tensor]], draws: int, x: Tensor, batch_size: int) -> Iterator[Parameters]:
    """The parameters of the observed site, for one draw or several at a time."""
    at_once = min(batch_size // max(len(x), 1), draws)
    name, fns = _observed(program, next(values), x, batch_size)  # raises what is wrong with the program
    alone = _parameters(fns)
    if len(alone) > 1:  # those of classes are averaged as they come
        needed = 2 * draws * sum(t.numel() * t.element_size() for t in alone)
        check_memory(f"a prediction of {draws} draws at {len(x)} rows", needed, x.device, "predict fewer rows at a time, or with fewer draws")
    yield alone
    while group := list(islice(values, max(at_once, 1))):
        stacked = _together(program, name, group, x, alone) if len(group) > 1 else None
        if stacked is None:
            yield from (_parameters([_reached(program, name, value, batch) for batch in x.split(batch_size)]) for value in group)
        else:
            yield stacked


def _together(program: Callable[..., Any], name: str, group: list[dict[str, Tensor]], x: Tensor, alone: Parameters) -> Parameters | None:
    """Several draws at once; None where the program cannot be vectorised, as with branches that depend on a value."""
    try:
        values = {site: torch.stack([one[site] for one in group]) for site in group[0]}
        stacked = torch.func.vmap(lambda one: _parameters([_reached(program, name, one, x)]), randomness="different")(values)
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    return stacked if all(t.shape[1:] == a.shape for t, a in zip(stacked, alone, strict=True)) else None


def _parameters(fns: list[Any]) -> Parameters:
    if isinstance(fns[0], torch.distributions.Categorical):
        return (torch.cat([fn.probs for fn in fns]),)
    return torch.cat([fn.loc for fn in fns]), torch.cat([fn.scale for fn in fns])


def prediction_of(parts: Iterable[Parameters], draws: int) -> Prediction:
    """The prediction of `draws` whose parameters come in `parts`, several stacked or one at a time; those of classes are never all in memory."""
    kept: list[Parameters] = []
    probs: Tensor | None = None
    aleatoric = torch.zeros(())
    for part in parts:
        if len(part) == 1:
            stacked = part[0] if part[0].ndim == 3 else part[0][None]
            total, entropy = stacked.sum(0), _entropy(stacked).sum(0)
            probs, aleatoric = (total, entropy) if probs is None else (probs.add_(total), aleatoric.add_(entropy))
        else:
            kept.append(tuple(t if t.ndim == 2 else t[None] for t in part))
    if probs is None:
        locs, scales = (torch.cat(tensors) for tensors in zip(*kept, strict=True))
        return RealPrediction(locs, scales)
    mean, aleatoric = probs / draws, aleatoric / draws
    return ClassPrediction(mean, aleatoric, (_entropy(mean) - aleatoric).clamp_min(0))


def check_callable_without_y(program: Callable[..., Any], x: Tensor) -> None:
    """Raises a ModelError unless `program(x)` can be called: its targets need a default."""
    try:
        inspect.signature(program).bind(x)
    except TypeError:
        raise ModelError("prediction calls program(x); give the targets a default: def program(x, y=None)") from None


class _Until(Messenger):
    """Ends the run at the site `name`, whose draw would be for nothing."""

    class Reached(Exception):
        """Carries the distribution of the site."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            raise self.Reached(base_distribution(msg["fn"]))


def _reached(program: Callable[..., Any], name: str, values: dict[str, Tensor], x: Tensor) -> Any:
    """The distribution of the observed site `name`, given the latent values."""
    try:
        with _Until(name), Values(values):
            program(x)
    except _Until.Reached as reached:
        return reached.args[0]
    raise ModelError(f"site '{name}' of the program is reached for some draws only; prediction needs it in every run")


def _observed(program: Callable[..., Any], values: dict[str, Tensor], x: Tensor, batch_size: int) -> tuple[str, list[Any]]:
    """The name of the one observed site, and its distribution batch by batch, given the latent values."""
    parts = []
    name = ""
    for batch in x.split(batch_size):
        try:
            with Values(values) as run:
                program(batch)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ModelError(f"the program does not run on x of shape {tuple(batch.shape)} and {batch.dtype}: {str(error).splitlines()[0]}") from error
        fns = [base_distribution(msg["fn"]) for msg in run.observed.values()]
        if len(fns) != 1 or not isinstance(fns[0], (torch.distributions.Categorical, torch.distributions.Normal)):
            found = ", ".join(f"{name} ({type(base_distribution(msg['fn'])).__name__})" for name, msg in run.observed.items()) or "none"
            raise ModelError(
                f"prediction needs one observed site, Categorical or Normal, that is drawn when the program is called as program(x); found: {found}"
            )
        parts.append(fns[0])
        name = next(iter(run.observed))
    return name, parts


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(-1)
