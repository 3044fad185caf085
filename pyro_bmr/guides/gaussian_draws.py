r"""Gaussian draws of a guide on noise from outside, each location + root · ε.

Owns `Moments`, `GaussianDraw`, and `GuideRun`, an effect handler that keeps the draw of each site
with its noise. Next: `marginals.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import (
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)
from torch.distributions.transforms import ComposeTransform

from pyro_bmr.errors import ModelError
from pyro_bmr.formulas.dense import Dense
from pyro_bmr.formulas.low_rank import LowRank
from pyro_bmr.guides.latent_sites import SUPPORTS, base_distribution, subsampled_plate
from pyro_bmr.isolation import seed_generators

LARGEST = 1 << 25  # entries of a Jacobian or a covariance: 256 MB in float64
MEND = "draw from the guide some thousand times and read the draws with Posterior.from_samples"


class Moments(NamedTuple):
    """Mean and variance of each entry on the unconstrained scale, the site's support, and the
    correlations of its entries, if any.
    """

    mean: Tensor
    var: Tensor
    support: str
    joint: Dense | LowRank | None = None


class GaussianDraw(NamedTuple):
    """A Gaussian draw: the `transforms` of loc + std · ε + factor @ ε'. `std` or `factor` is None
    if the draw has no such part; a point has neither.
    """

    loc: Tensor
    std: Tensor | None
    factor: Tensor | None  # (..., d, k) for events of d entries
    transforms: tuple[Any, ...] = ()

    def noise(self, scale: float) -> list[Tensor]:
        """ε and ε', `scale` times standard normal."""
        shapes = ([] if self.std is None else [self.loc.shape]) + (
            [] if self.factor is None else [self.factor.shape[:-2] + self.factor.shape[-1:]]
        )
        return [
            scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
            for shape in shapes
        ]

    def value(self, noise: list[Tensor]) -> Tensor:
        """The value that the draw has at this noise."""
        value = self.loc if self.std is None else self.loc + self.std * noise[0]
        value = (
            value
            if self.factor is None
            else value + (self.factor @ noise[-1].unsqueeze(-1)).squeeze(-1)
        )
        for transform in self.transforms:
            value = transform(value)
        return value

    def moments(self, mean: Tensor, support: str, slope: Tensor | None = None) -> Moments:
        """The moments with this mean. The variance of the location is added to the variance of the
        draw if its Jacobian is given as `slope` (entries, noise).
        """
        std = mean.new_zeros(()) if self.std is None else self.std
        own = std.square().expand(mean.shape).flatten()
        factors = (
            []
            if self.factor is None
            else [torch.block_diag(*self.factor.reshape(-1, *self.factor.shape[-2:]))]
        )
        factors += [] if slope is None else [slope]
        if not factors:
            return Moments(mean.detach().clone(), own.view(mean.shape).detach().clone(), support)
        factor, flat = torch.cat(factors, 1).detach(), mean.detach().flatten().clone()
        var = own + factor.square().sum(1)
        return Moments(
            flat.view(mean.shape),
            var.view(mean.shape).detach().clone(),
            support,
            _joint(flat, own.detach(), factor),
        )


def gaussian_draw(name: str, fn: Any) -> GaussianDraw:
    """The draw of a site whose distribution in the guide is Gaussian, a point or a transform of
    these.

    Raises:
        ModelError: it is another one, or the guide is under `Masked`.
    """
    base = base_distribution(fn)
    if hasattr(base, "kept"):
        raise ModelError(
            f"site '{name}': the guide is under Masked; read it without, and give its masks to"
            f" from_guide, masks={{'{name}': ...}}"
        )
    if isinstance(base, Normal):
        return GaussianDraw(base.loc, base.scale, None)
    if isinstance(base, dist.Delta):
        return GaussianDraw(base.v, None, None)
    if isinstance(base, MultivariateNormal):
        return GaussianDraw(base.loc, None, base.scale_tril)
    if isinstance(base, LowRankMultivariateNormal):
        return GaussianDraw(base.loc, base.cov_diag.sqrt(), base.cov_factor)
    if isinstance(base, TransformedDistribution):
        inner = gaussian_draw(name, base.base_dist)
        # Pyro's identity has no parts
        parts = [
            t for t in base.transforms if not (isinstance(t, ComposeTransform) and not t.parts)
        ]
        return inner._replace(transforms=(*inner.transforms, *parts))
    raise ModelError(
        f"site '{name}': the guide's {type(base).__name__} cannot be read as Gaussian moments; use"
        f" MeanField or AutoNormal, or a guide with a Normal or log-normal per site; or {MEND}"
    )


class GuideRun(Messenger):
    """Draws each Gaussian site on noise of its own, `scale` times standard normal, and keeps draw
    and noise; the rest of the guide runs as usual.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.drawn: dict[str, GaussianDraw] = {}
        self.noise: dict[str, list[Tensor]] = {}
        self.values: dict[str, Tensor] = {}
        self.fns: dict[str, Any] = {}
        self.latent: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or isinstance(msg["fn"], _Subsample):
            return
        name, drawn = msg["name"], gaussian_draw(msg["name"], msg["fn"])
        self.drawn[name], self.fns[name] = drawn, msg["fn"]
        self.noise[name] = (
            [part.requires_grad_() for part in drawn.noise(self.scale)]
            if self.scale == 0
            else drawn.noise(self.scale)
        )
        msg["value"], msg["done"] = drawn.value(self.noise[name]), True
        self.values[name] = msg["value"]
        if not (msg["infer"] or {}).get("is_auxiliary"):
            self.latent.append(name)
            check_plates(name, msg["cond_indep_stack"])

    def line(self, name: str, support: str) -> Tensor:
        """The value of a site on the unconstrained scale."""
        transform = SUPPORTS[support]
        return self.values[name] if transform is None else transform.inv(self.values[name])

    def plain(self, name: str, support: str) -> bool:
        """Whether the draw has no other transform than the one to its support."""
        transform = SUPPORTS[support]
        return self.drawn[name].transforms == (() if transform is None else (transform,))


def guide_run(
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    seed: int,
    scale: float,
) -> GuideRun:
    """A run of the guide on noise from this seed, `scale` times standard normal; with scale 0 it
    can be differentiated.
    """
    with (
        torch.random.fork_rng(),
        torch.set_grad_enabled(scale == 0),
        poutine.block(),
        GuideRun(scale) as run,
    ):
        seed_generators(seed)
        guide(*args, **kwargs)
    return run


def check_plates(name: str, frames: Any) -> None:
    """Raises ModelError if the latent site `name` is in a subsampled plate."""
    frame = subsampled_plate(frames)
    if frame is not None:
        raise ModelError(
            f"site '{name}': expected a plate that takes all its rows, got the subsampled plate"
            f" '{frame.name}', which takes {frame.size} of {frame.full_size}, so that each call has"
            " latents of its own; make the guide and read it with all rows of the plate"
        )


def _joint(mean: Tensor, var: Tensor, factor: Tensor) -> Dense | LowRank | None:
    """The structure of the covariance diag(var) + factor factorᵀ; None if the entries are
    independent, or there is one only.
    """
    size = len(mean)
    if size == 1:
        return None
    if bool((var > 0).all()) and factor.shape[1] < size:
        return LowRank(mean.clone(), var.clone(), factor)
    if size * size > LARGEST:
        raise ModelError(
            f"a site of {size} correlated entries takes a covariance of {size} × {size}; use a"
            f" guide with fewer correlations, or {MEND}"
        )
    cov = factor @ factor.mT + var.diag()
    return Dense(mean.clone(), cov) if bool(cov.triu(1).any()) else None
