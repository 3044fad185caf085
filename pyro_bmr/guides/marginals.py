r"""A guide as a function of standard-normal noise: the marginal moments of its sites, also of those
that follow other sites.

Owns `trace_moments`. One trace of a guide shows each site's moments *given* the draws before it.
Here every Gaussian draw is location + root · ε with ε from outside. A site whose parameters are the
same under two ε does not follow others, and is read as it stands. For any other the value on the
unconstrained scale is some f(ε); where f is affine, which both draws must confirm, the marginal is
exactly N(f(0), J Jᵀ). Next: `autoguides.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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
from pyro_bmr.formulas.gaussian import Dense
from pyro_bmr.formulas.low_rank import LowRank
from pyro_bmr.guides.mean_field import SUPPORTS, base_distribution, support_name
from pyro_bmr.isolation import seed_generators

_ENTRIES = 1 << 25  # of a Jacobian or a covariance: 256 MB in float64
# standard deviations by which a draw may miss the affine function: far less moves no moment
_SLACK = 0.01
MEND = "draw from the guide some thousand times and read the draws with Posterior.from_samples"


class Moments(NamedTuple):
    """Mean and variance of each entry on the unconstrained scale, the site's support, and the
    correlations of its entries, if any.
    """

    mean: Tensor
    var: Tensor
    support: str
    joint: Dense | LowRank | None = None


class Drawn(NamedTuple):
    """A Gaussian draw: the `transforms` of loc + std · ε + factor @ ε'. `std` or `factor` is None
    where there is none, both for a point.
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
        """What `noise` draws."""
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
        """Moments about `mean` from the draw's own roots, and from the Jacobian `slope` (entries,
        noise) of its location.
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


def trace_moments(
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    support: Callable[[str], str],
    skip: Collection[str],
) -> dict[str, Moments]:
    """Site → marginal moments, for the sites of the guide but `skip`; the same at each call.
    `support`: that of a site in the program.

    Raises:
        ModelError: a site is not Gaussian on the unconstrained scale, or stands in a subsampled
            plate.
    """
    first, second = (_run(guide, args, kwargs, seed, 1.0) for seed in (1, 2))
    if list(first.drawn) != list(second.drawn):
        raise ModelError(
            f"the guide has other sites from one call to the next, {', '.join(first.drawn)} and"
            f" {', '.join(second.drawn)}; {MEND}"
        )
    fns = {name: first.fns[name] for name in first.latent if name not in skip}
    supports = {name: _support(name, fn, support(name)) for name, fn in fns.items()}
    moments = {name: _own(name, supports[name], first, second) for name in fns}
    if all(moments.values()):
        return {name: found for name, found in moments.items() if found}
    centre = _run(guide, args, kwargs, 0, 0.0)
    return {
        name: found or _following(name, supports[name], centre, (first, second))
        for name, found in moments.items()
    }


class _Noise(Messenger):
    """Draws each Gaussian site on noise of its own and keeps both; the rest of a guide runs as it
    is.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.drawn: dict[str, Drawn] = {}
        self.noise: dict[str, list[Tensor]] = {}
        self.values: dict[str, Tensor] = {}
        self.fns: dict[str, Any] = {}
        self.latent: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or isinstance(msg["fn"], _Subsample):
            return
        name, drawn = msg["name"], _drawn(msg["name"], msg["fn"])
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
        """Whether the draw has no transform but that of its support."""
        transform = SUPPORTS[support]
        return self.drawn[name].transforms == (() if transform is None else (transform,))


def check_plates(name: str, frames: Any) -> None:
    """Raises a ModelError for a latent in a plate that is subsampled."""
    for frame in frames:
        if frame.full_size not in (None, frame.size):
            raise ModelError(
                f"site '{name}': it stands in the plate '{frame.name}' of {frame.full_size}, of"
                f" which a call takes {frame.size}, so each call has latents of its own; make the"
                " guide and read it with all rows of the plate"
            )


def _support(name: str, fn: Any, declared: str) -> str:
    """The support of the site in the program, if its distribution in the guide is of that support
    or of none that can be seen.
    """
    base = base_distribution(fn)
    if isinstance(base, dist.Delta):
        return declared
    own = support_name(name, fn.support)  # a composed transform may say "real" where it is not
    if own != declared and not (own == "real" and isinstance(base, TransformedDistribution)):
        raise ModelError(
            f"site '{name}': its support is {declared!r} in the program and {own!r} in the guide;"
            " they must be the same"
        )
    return declared


def _drawn(name: str, fn: Any) -> Drawn:
    base = base_distribution(fn)
    if hasattr(base, "kept"):
        raise ModelError(
            f"site '{name}': the guide is under Masked; read it without, and give its masks to"
            f" from_guide, masks={{'{name}': ...}}"
        )
    if isinstance(base, Normal):
        return Drawn(base.loc, base.scale, None)
    if isinstance(base, dist.Delta):
        return Drawn(base.v, None, None)
    if isinstance(base, MultivariateNormal):
        return Drawn(base.loc, None, base.scale_tril)
    if isinstance(base, LowRankMultivariateNormal):
        return Drawn(base.loc, base.cov_diag.sqrt(), base.cov_factor)
    if isinstance(base, TransformedDistribution):
        inner = _drawn(name, base.base_dist)
        # Pyro's identity has no parts
        parts = [
            t for t in base.transforms if not (isinstance(t, ComposeTransform) and not t.parts)
        ]
        return inner._replace(transforms=(*inner.transforms, *parts))
    raise ModelError(
        f"site '{name}': the guide's {type(base).__name__} cannot be read as Gaussian moments; use"
        f" MeanField or AutoNormal, or a guide with a Normal or log-normal per site; or {MEND}"
    )


def _run(
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    seed: int,
    scale: float,
) -> _Noise:
    with (
        torch.random.fork_rng(),
        torch.set_grad_enabled(scale == 0),
        poutine.block(),
        _Noise(scale) as run,
    ):
        seed_generators(seed)
        guide(*args, **kwargs)
    return run


def _own(name: str, support: str, first: _Noise, second: _Noise) -> Moments | None:
    """The moments of a site whose parameters are the same in both runs; None if it follows other
    draws.
    """
    a, b = first.drawn[name], second.drawn[name]
    if a.std is None and a.factor is None and torch.equal(a.loc, b.loc):  # a point
        return a.moments(first.line(name, support), support)
    raw = f"{name}_unconstrained"
    if raw in first.drawn:  # AutoNormal: the site is a point that follows this draw alone
        transform = SUPPORTS[support]
        pairs = [
            (run.values[raw] if transform is None else transform(run.values[raw]), run.values[name])
            for run in (first, second)
        ]
        if not all(x.shape == y.shape and torch.allclose(x, y) for x, y in pairs):
            return None
        a, b = first.drawn[raw], second.drawn[raw]
        plain = not a.transforms
    else:
        plain = first.plain(name, support) and not (a.std is None and a.factor is None)
    same = all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a[:3], b[:3], strict=True)
    )
    return a.moments(a.loc, support) if plain and same else None


@torch.enable_grad()
def _following(name: str, support: str, centre: _Noise, runs: tuple[_Noise, ...]) -> Moments:
    """The marginal of a site that follows other draws: f(0) and J Jᵀ, after both runs have
    confirmed that f is affine.
    """
    drawn = centre.drawn[name]
    # its own draw comes on top of what it follows
    random = centre.plain(name, support) and not (drawn.std is None and drawn.factor is None)

    def location(run: _Noise) -> Tensor:
        return run.drawn[name].loc if random else run.line(name, support)

    drawn = drawn if random else Drawn(location(centre), None, None)
    for run in runs if random else ():
        if not all(
            x is None or (y is not None and torch.allclose(x, y))
            for x, y in zip(drawn[1:3], run.drawn[name][1:3], strict=True)
        ):
            raise _not_gaussian(name, "its scale changes with other draws")
    mean = location(centre)
    leaves = {
        (site, k): part for site, parts in centre.noise.items() for k, part in enumerate(parts)
    }
    slopes = (
        torch.autograd.grad(mean.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
        if mean.requires_grad and leaves
        else ()
    )
    used = {
        key: slope.flatten()
        for key, slope in zip(leaves, slopes, strict=False)
        if slope is not None
    }
    if not used:
        raise _not_gaussian(
            name,
            "it changes from call to call with nothing that the guide draws by pyro.sample (a"
            " network in training mode?)",
        )
    flat, slope = mean.detach().flatten(), torch.cat(list(used.values()))
    noises = [torch.cat([run.noise[site][k].flatten() for site, k in used]) for run in runs]
    actual = [location(run).flatten() for run in runs]
    index = slope.nonzero().squeeze(1)
    if len(index) == len(flat) and _affine(
        flat, [slope[index] * noise[index] for noise in noises], actual, slope[index].abs()
    ):
        std = slope[index].abs().view(mean.shape)
        return drawn._replace(
            std=std if drawn.std is None else (drawn.std.square() + std.square()).sqrt()
        ).moments(mean, support)
    if len(flat) * len(slope) > _ENTRIES:
        raise _not_gaussian(
            name, f"its {len(flat)} entries follow {len(slope)} others, too many for a covariance"
        )
    jacobian = _jacobian(mean, [leaves[key] for key in used])
    if not _affine(
        flat, [jacobian @ noise for noise in noises], actual, jacobian.square().sum(1).sqrt()
    ):
        raise _not_gaussian(name, "it is no linear function of other draws")
    return drawn.moments(mean, support, jacobian)


def _affine(centre: Tensor, predicted: list[Tensor], actual: list[Tensor], spread: Tensor) -> bool:
    """Whether centre + predicted is the actual value, to a part of the spread and to rounding."""
    slack = _SLACK * spread + 16 * torch.finfo(centre.dtype).eps * (1 + centre.abs())
    return bool(
        torch.stack(
            [
                ((centre + step - value).abs() <= slack).all()
                for step, value in zip(predicted, actual, strict=True)
            ]
        ).all()
    )


def _jacobian(value: Tensor, leaves: list[Tensor]) -> Tensor:
    """(entries of `value`, entries of `leaves`), by as many passes as the smaller of the two."""
    size = sum(leaf.numel() for leaf in leaves)

    def flat(grads: Any) -> Tensor:
        return torch.cat([grad.flatten() for grad in grads])

    if value.numel() <= size:
        rows = [
            torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True)
            for entry in value.flatten()
        ]
        return torch.stack([flat(row) for row in rows]).detach()
    # Jᵀ w is linear in w, and its gradients are the columns of J
    weight = torch.zeros_like(value, requires_grad=True)
    products = flat(
        torch.autograd.grad(value, leaves, weight, create_graph=True, materialize_grads=True)
    )
    columns = [
        torch.autograd.grad(product, weight, retain_graph=True, materialize_grads=True)[0].flatten()
        for product in products
    ]
    return torch.stack(columns, 1).detach()


def _joint(mean: Tensor, var: Tensor, factor: Tensor) -> Dense | LowRank | None:
    """The structure of diag(var) + factor factorᵀ; None for one entry, or independent ones."""
    size = len(mean)
    if size == 1:
        return None
    if bool((var > 0).all()) and factor.shape[1] < size:
        return LowRank(mean.clone(), var.clone(), factor)
    if size * size > _ENTRIES:
        raise ModelError(
            f"a site of {size} correlated entries takes a covariance of {size} × {size}; use a"
            f" guide with fewer correlations, or {MEND}"
        )
    cov = factor @ factor.mT + var.diag()
    return Dense(mean.clone(), cov) if bool(cov.triu(1).any()) else None


def _not_gaussian(name: str, why: str) -> ModelError:
    return ModelError(
        f"site '{name}': its marginal in the guide is not Gaussian, since {why}; {MEND}"
    )
