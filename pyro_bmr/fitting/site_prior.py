"""The prior of a site as the fast step sees it: a Gaussian on the unconstrained scale where it is
one, its KL in closed form, and its pull on the means.

Owns `SitePrior`, `Pull`, `read_prior`, `site_in` and `closed_kl`. Next: `chunks.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ModelError
from pyro_bmr.fitting.sums import dot
from pyro_bmr.fitting.unread_terms import Number, number_of
from pyro_bmr.guides.latent_sites import Latent, base_distribution, gaussian_on_the_line
from pyro_bmr.tracing import Values, collapsed, does_not_split

# a guide with more numbers evaluates its KL, a slow quantity that is only reported, in every 16th
# step
_LARGE, _KL_EVERY = 10_000, 16


class SitePrior(NamedTuple):
    """N(`loc`, 1/`precision`) on the unconstrained scale, each a number or flat over the kept
    entries; `precision` is 0 where the prior has no closed form.

    `log_scales` is Σ log s over those entries, `weight` how often the program counts the site.
    """

    loc: float | Tensor
    precision: float | Tensor
    log_scales: float
    weight: float


class Pull(NamedTuple):
    """The prior of a chunk: its mean η, its precision times how often the program counts the site,
    and that count. Each is a number or has one value per entry.
    """

    loc: float | Tensor
    precision: float | Tensor
    weight: float | Tensor

    @property
    def decay(self) -> float | None:
        """p where the pull is p μ with one p for all entries, as weight decay has it."""
        if not isinstance(self.precision, float) or not isinstance(self.loc, float):
            return None
        return self.precision if self.loc == 0 or self.precision == 0 else None

    def add_to(self, g: Tensor, loc: Tensor, factor: float, out: Tensor) -> Tensor:
        """g + factor · p (μ − η), the gradient of a mean with the pull of its prior."""
        if isinstance(self.precision, float) and isinstance(self.loc, float):
            if not self.precision:
                return out.copy_(g)
            torch.add(g, loc, alpha=factor * self.precision, out=out)
            return out.sub_(factor * self.precision * self.loc) if self.loc else out
        return torch.add(g, (loc - self.loc) * self.precision, alpha=factor, out=out)

    def halfway(self, other: Pull) -> Pull:
        """The prior whose pull is the mean of both, at every mean and standard deviation of the
        entries.
        """
        precision, weight = (self.precision + other.precision) / 2, (self.weight + other.weight) / 2
        total = (
            (2 * precision).clamp_min(torch.finfo(precision.dtype).tiny)
            if isinstance(precision, Tensor)
            else 2 * precision or 1.0
        )
        return Pull(
            (self.precision * self.loc + other.precision * other.loc) / total, precision, weight
        )


class ReadPrior(NamedTuple):
    """What one run of the program says of a site's prior.

    `sampled_kl`: log q aside, the site's part of the KL at the draw, if it has no closed form.
    `moving`: the mean and the scale of the prior, if they depend on other sites.
    """

    prior: SitePrior
    sampled_kl: Tensor | None = None
    moving: tuple[Tensor, Tensor] | None = None


def read_prior(
    latent: Latent, msg: Any, value: Tensor, leaf: Tensor, kept: Tensor | None
) -> ReadPrior:
    """The prior of `latent` in a run of the program, `msg` being the site in its trace.

    Args:
        value: of the site in that run.
        leaf: that value on the unconstrained scale.
        kept: the indices of the kept entries; None for all.
    """
    weight, base = float(msg["scale"]), base_distribution(msg["fn"])
    base = base.base_dist if hasattr(base, "kept") else base  # a program under `pruning.Masked`
    gaussian = gaussian_on_the_line(base, latent.transform)
    if gaussian is None:
        log_p = _log_density(latent, base, value, leaf, kept)
        return ReadPrior(SitePrior(0.0, 0.0, 0.0, weight), sampled_kl=-weight * log_p.sum())
    mean, scale = (
        t if t.ndim == 0 else _kept_values(t, value.shape, kept)
        for t in (collapsed(gaussian.loc), collapsed(gaussian.scale))
    )
    eta, s = mean.detach(), scale.detach()
    size = value.numel() if kept is None else len(kept)
    prior = SitePrior(
        float(eta) if eta.ndim == 0 else eta,
        float(s) ** -2 if s.ndim == 0 else s.square().reciprocal(),
        float(s.log()) * size if s.ndim == 0 else float(s.log().sum()),
        weight,
    )
    moving = (mean, scale) if mean.requires_grad or scale.requires_grad else None
    return ReadPrior(prior, moving=moving)


def closed_kl(
    prior: SitePrior, part: slice, loc: Tensor, log_scale: Tensor, std: Tensor, noise: Tensor
) -> Number:
    """The KL divergence of a site, nats; for a prior without a closed form, log q at the draw.

    Args:
        part: the place of the site in the flat vectors, which the others are.
    """
    size, log_scales = part.stop - part.start, number_of(log_scale[part].sum())
    if isinstance(prior.precision, float) and prior.precision == 0:  # log q alone
        return -prior.weight * (
            log_scales
            + 0.5 * number_of(noise[part].square().sum())
            + 0.5 * size * math.log(2 * math.pi)
        )
    ratio = squared_distance(prior, loc.detach()[part], std[part])
    return prior.weight * (prior.log_scales - log_scales + 0.5 * (ratio - size))


def kl_is_due(size: int, number: int) -> bool:
    """Whether step `number` of a guide of `size` numbers evaluates its KL."""
    return size <= _LARGE or number % _KL_EVERY == 0


def squared_distance(prior: SitePrior, point: Tensor, std: Tensor | None = None) -> Number:
    """Σ p ((x − η)² + σ²) of a flat point x with the standard deviations σ, if there are any."""
    deviation = point if isinstance(prior.loc, float) and prior.loc == 0 else point - prior.loc
    if isinstance(prior.precision, float):
        total = number_of(dot(deviation, deviation))
        return prior.precision * (total if std is None else total + number_of(dot(std, std)))
    square = deviation.square() if std is None else deviation.square() + std.square()
    return number_of((square * prior.precision).sum())


def _log_density(
    latent: Latent, base: Any, value: Tensor, leaf: Tensor, kept: Tensor | None
) -> Tensor:
    """log p of the kept entries, counted on the unconstrained scale."""
    log_p: Tensor = base.log_prob(value)
    if base.event_shape and kept is not None and len(kept) < value.numel():
        raise ModelError(does_not_split(latent.name, base))
    if latent.transform is not None:
        jacobian = latent.transform.log_abs_det_jacobian(leaf, value)
        log_p = log_p + (
            jacobian.flatten(-len(base.event_shape)).sum(-1) if base.event_shape else jacobian
        )
    return log_p if base.event_shape else _kept_values(log_p, value.shape, kept)


def _kept_values(values: Tensor, shape: torch.Size, kept: Tensor | None) -> Tensor:
    flat = values.expand(shape).reshape(-1)
    return flat if kept is None else flat[kept]


def site_in(run: Values, name: str) -> Any:
    """A site in a run of the program."""
    msg = run.latent.get(name)
    if msg is None:
        raise ModelError(
            f"site '{name}': the program has it for some batches or draws only; give it a place in"
            " every run"
        )
    return msg
