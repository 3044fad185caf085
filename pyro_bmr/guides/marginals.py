r"""The marginal moments of the sites of a guide, also of sites that follow other sites.

Owns `trace_moments`. One trace of a guide shows the moments of each site *given* the draws before
it. Here every Gaussian draw is location + root · ε, with ε from outside (`gaussian_draws.py`). If
the parameters of a site are the same under two ε, it does not follow others, and its moments are
its parameters. Otherwise its value on the unconstrained scale is a function f(ε). If both draws
confirm that f is affine, the marginal is exactly N(f(0), J Jᵀ). Next: `autoguides.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import TransformedDistribution

from pyro_bmr.errors import ModelError
from pyro_bmr.guides.gaussian_draws import LARGEST, MEND, GaussianDraw, GuideRun, Moments, guide_run
from pyro_bmr.guides.latent_sites import SUPPORTS, base_distribution, support_name

# how far a draw may be from the affine function, in standard deviations; such a gap does not
# change the moments
_SLACK = 0.01


def trace_moments(
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    support: Callable[[str], str],
    skip: Collection[str],
) -> dict[str, Moments]:
    """Site → marginal moments, for the sites of the guide that are not in `skip`; the same at each
    call. `support`: site → its support in the program.

    Raises:
        ModelError: a site is not Gaussian on the unconstrained scale, or is in a subsampled plate.
    """
    first, second = (guide_run(guide, args, kwargs, seed, 1.0) for seed in (1, 2))
    if list(first.drawn) != list(second.drawn):
        raise ModelError(
            f"guide: expected the same sites at each call, got {', '.join(first.drawn)} and then"
            f" {', '.join(second.drawn)}; {MEND}"
        )
    fns = {name: first.fns[name] for name in first.latent if name not in skip}
    supports = {name: _support(name, fn, support(name)) for name, fn in fns.items()}
    moments = {name: _own(name, supports[name], first, second) for name in fns}
    if all(moments.values()):
        return {name: found for name, found in moments.items() if found}
    centre = guide_run(guide, args, kwargs, 0, 0.0)
    return {
        name: found or _following(name, supports[name], centre, (first, second))
        for name, found in moments.items()
    }


def _support(name: str, fn: Any, declared: str) -> str:
    """The `declared` support of a site in the program, if its distribution in the guide has the
    same one, or does not show which it has.

    Raises:
        ModelError: the distribution in the guide has another support.
    """
    base = base_distribution(fn)
    if isinstance(base, dist.Delta):
        return declared
    own = support_name(name, fn.support)  # a composed transform may say "real" where it is not
    if own != declared and not (own == "real" and isinstance(base, TransformedDistribution)):
        raise ModelError(
            f"site '{name}': expected the support of the program, {declared!r}, got {own!r} in the"
            " guide; give it a distribution of that support"
        )
    return declared


def _own(name: str, support: str, first: GuideRun, second: GuideRun) -> Moments | None:
    """The moments of a site whose parameters are the same in both runs; None if they are not, so
    that it follows other draws.
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
def _following(name: str, support: str, centre: GuideRun, runs: tuple[GuideRun, ...]) -> Moments:
    """The marginal moments of a site that follows other draws: f(0) and J Jᵀ, if both runs confirm
    that f is affine.

    Raises:
        ModelError: they do not, or J is too large.
    """
    drawn, location = _given_others(name, support, centre, runs)
    mean = location(centre)
    used = _used_noise(name, mean, centre)
    flat = mean.detach().flatten()
    noises = [torch.cat([run.noise[site][k].flatten() for site, k in used]) for run in runs]
    actual = [location(run).flatten() for run in runs]
    slope = torch.cat([noise.slope.flatten() for noise in used.values()])
    std = _entrywise(flat, slope, noises, actual)
    if std is not None:
        std = std.view(mean.shape)
        both = std if drawn.std is None else (drawn.std.square() + std.square()).sqrt()
        return drawn._replace(std=both).moments(mean, support)
    if len(flat) * len(slope) > LARGEST:
        raise _not_gaussian(
            name, f"its {len(flat)} entries follow {len(slope)} others, too many for a covariance"
        )
    jacobian = _jacobian(mean, [noise.leaf for noise in used.values()])
    predicted = [jacobian @ noise for noise in noises]
    if not _affine(flat, predicted, actual, jacobian.square().sum(1).sqrt()):
        raise _not_gaussian(name, "it is no linear function of other draws")
    return drawn.moments(mean, support, jacobian)


def _given_others(
    name: str, support: str, centre: GuideRun, runs: tuple[GuideRun, ...]
) -> tuple[GaussianDraw, Callable[[GuideRun], Tensor]]:
    """The draw of a site given the draws that it follows, and the function run → its location. A
    site without noise of its own is a point at its value.

    Raises:
        ModelError: the scale of the draw is not the same in all runs.
    """
    drawn = centre.drawn[name]
    random = centre.plain(name, support) and not (drawn.std is None and drawn.factor is None)
    if not random:
        point = GaussianDraw(centre.line(name, support), None, None)
        return point, lambda run: run.line(name, support)
    for run in runs:
        if not all(
            x is None or (y is not None and torch.allclose(x, y))
            for x, y in zip(drawn[1:3], run.drawn[name][1:3], strict=True)
        ):
            raise _not_gaussian(name, "its scale changes with other draws")
    return drawn, lambda run: run.drawn[name].loc


class _UsedNoise(NamedTuple):
    """Noise that a site depends on: the leaf of autograd, and the derivative of the sum of the
    site's entries.
    """

    leaf: Tensor
    slope: Tensor


def _used_noise(name: str, mean: Tensor, centre: GuideRun) -> dict[tuple[str, int], _UsedNoise]:
    """(Site, part) → its noise, for the noise that `mean` depends on.

    Raises:
        ModelError: it depends on none.
    """
    leaves = {
        (site, k): part for site, parts in centre.noise.items() for k, part in enumerate(parts)
    }
    slopes = (
        torch.autograd.grad(mean.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
        if mean.requires_grad and leaves
        else ()
    )
    used = {
        key: _UsedNoise(leaf, slope)
        for (key, leaf), slope in zip(leaves.items(), slopes, strict=False)
        if slope is not None
    }
    if not used:
        raise _not_gaussian(
            name,
            "it changes from call to call with nothing that the guide draws by pyro.sample (a"
            " network in training mode?)",
        )
    return used


def _entrywise(
    centre: Tensor, slope: Tensor, noises: list[Tensor], actual: list[Tensor]
) -> Tensor | None:
    """The standard deviations of a site each of whose entries follows one entry of the noise, in
    their order; None if it is no such site.
    """
    index = slope.nonzero().squeeze(1)
    if len(index) != len(centre):
        return None
    std = slope[index].abs()
    predicted = [slope[index] * noise[index] for noise in noises]
    return std if _affine(centre, predicted, actual, std) else None


def _affine(centre: Tensor, predicted: list[Tensor], actual: list[Tensor], spread: Tensor) -> bool:
    """Whether centre + predicted is the actual value, up to rounding and a part of the spread."""
    slack = _SLACK * spread + 16 * torch.finfo(centre.dtype).eps * (1 + centre.abs())
    return all(
        bool(((centre + step - value).abs() <= slack).all())
        for step, value in zip(predicted, actual, strict=True)
    )


def _jacobian(value: Tensor, leaves: list[Tensor]) -> Tensor:
    """The Jacobian of `value`, (entries of `value`, entries of `leaves`), by as many passes as the
    smaller of the two numbers.
    """
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


def _not_gaussian(name: str, why: str) -> ModelError:
    return ModelError(
        f"site '{name}': its marginal in the guide is not Gaussian, since {why}; {MEND}"
    )
