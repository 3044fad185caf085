"""The latent sites of a program, as a guide needs them: shape, support, plates, start value, prior.

Owns `Latent` and `latent_sites`, the supports that can have a Gaussian posterior (`SUPPORTS`), and
the table of a guide. Next: `site_normal.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import ExpTransform, SigmoidTransform

from pyro_bmr.errors import ModelError
from pyro_bmr.isolation import isolated

if TYPE_CHECKING:
    import pandas as pd

SUPPORTS: dict[str, Transform | None] = {
    "real": None,
    "positive": ExpTransform(),
    "unit_interval": SigmoidTransform(),
}
"""The supports with a Gaussian posterior, and the transform from the real line to each."""


class Latent(NamedTuple):
    """A latent site as its program declared it."""

    name: str
    shape: torch.Size
    event_dim: int
    transform: Transform | None  # from the real line to the site's support; None for real sites
    plates: tuple[Any, ...]
    start: Tensor  # on the unconstrained scale
    rms: Tensor  # the root mean square of `start` where the program gave it, else 0; 0-d
    prior_scale: Tensor  # the prior's standard deviation where it is Normal, else 1; 0-d
    prior: Any  # the object that declared the site, if one did
    # whether the prior is Normal on the unconstrained scale, so that the KL of a Gaussian has a
    # closed form
    normal: bool
    mask: Tensor | None  # of the program under `pruning.Masked`; None without one


@isolated()
def latent_sites(program: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Latent]:
    """The latent sites of `program(*args, **kwargs)` in order, with start values. The random state
    does not change.

    A site starts at its `infer["init"]` (the value of a lifted parameter) if it has one, or where
    the function `infer["start"]` says, on the unconstrained scale, if it returns a tensor.
    Otherwise Normal sites start at the mean of the prior, and others at its median, since a
    half-Cauchy has no mean.

    Raises:
        ModelError: a site is discrete, has a support other than the reals, the positives or the
            unit interval, or is in a subsampled plate.
    """
    with torch.no_grad():
        trace = prune_subsample_sites(poutine.trace(program).get_trace(*args, **kwargs))
        latents = [_latent(name, site) for name, site in trace.iter_stochastic_nodes()]
    if not latents:
        raise ModelError(
            "the program has no latent site: give it at least one pyro.sample statement without obs"
        )
    return latents


def _latent(name: str, site: Any) -> Latent:
    """The latent site of a trace."""
    fn = site["fn"]
    base = base_distribution(fn)
    mask = getattr(base, "kept", None)  # of a program under `pruning.Masked`
    base = base if mask is None else base.base_dist
    transform = SUPPORTS[support_name(name, base.support)]
    frame = subsampled_plate(site["cond_indep_stack"])
    if frame is not None:
        raise ModelError(
            f"site '{name}': expected a global latent site, got one in the subsampled plate"
            f" '{frame.name}', so that each batch has latents of its own; use plates of all rows"
        )
    start = _start(site, base, transform)
    given = site["infer"].get("init") is not None
    normal = isinstance(base, torch.distributions.Normal)
    return Latent(
        name=name,
        shape=start.shape,
        event_dim=fn.event_dim,
        transform=transform,
        plates=tuple(frame for frame in site["cond_indep_stack"] if frame.vectorized),
        start=start,
        rms=start.square().mean().sqrt() if given else start.new_zeros(()),
        prior_scale=base.stddev.mean() if normal else start.new_ones(()),
        prior=site["infer"].get("prior"),
        normal=gaussian_on_the_line(base, transform) is not None,
        mask=mask,
    )


def _start(site: Any, base: Any, transform: Transform | None) -> Tensor:
    """The start value of a site on the unconstrained scale."""
    given = site["infer"].get("start", lambda: None)()
    if site["infer"].get("init") is not None:
        start = site["infer"]["init"]
    elif given is not None:
        start = given
    elif isinstance(base, torch.distributions.Normal):
        start = base.mean
    elif transform is None:
        start = torch.zeros_like(site["value"])
    else:
        start = transform.inv(_median(base))
    return start.detach().expand(site["value"].shape).clone()


def subsampled_plate(frames: Any) -> Any:
    """The first plate that takes a part of its rows at each call; None if there is none."""
    return next((f for f in frames if f.full_size not in (None, f.size)), None)


@contextmanager
def in_plates(latent: Latent) -> Iterator[None]:
    """The plates around a latent site, opened."""
    with ExitStack() as stack:
        for frame in latent.plates:
            stack.enter_context(pyro.plate(frame.name, frame.size, dim=frame.dim))
        yield


def gaussian_on_the_line(prior: Any, transform: Transform | None) -> Any:
    """The Normal that `prior` is on the unconstrained scale (itself, or the base of a log-normal);
    None if it is none.
    """
    if (
        transform is not None
        and isinstance(prior, torch.distributions.TransformedDistribution)
        and prior.transforms == [transform]
    ):
        prior, transform = prior.base_dist, None
    return prior if transform is None and isinstance(prior, torch.distributions.Normal) else None


def start_scale(latent: Latent, init_scale: float) -> Tensor:
    """The standard deviation at the start, 0-d: `init_scale` times the root mean square of the
    start values that the program gave, or, without such values, a tenth of the prior's scale.
    """
    return init_scale * latent.rms if latent.rms > 0 else 0.1 * latent.prior_scale


def base_distribution(fn: Any) -> Any:
    """The distribution under any `Independent` wrappers."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def support_name(name: str, support: Any) -> str:
    """The key of `SUPPORTS` for a site's support.

    Raises:
        ModelError: it is none of them.
    """
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    known = {
        constraints.real: "real",
        constraints.positive: "positive",
        constraints.nonnegative: "positive",
        constraints.unit_interval: "unit_interval",
    }
    if support not in known:
        raise ModelError(
            f"site '{name}': expected the reals, the positives or the unit interval, which can have"
            " a Gaussian posterior (on the log and logit scale), got the support"
            f" {support}; use one of Pyro's autoguides, or reparametrise the site"
        )
    return known[support]


def _median(base: Any) -> Tensor:
    try:
        return base.icdf(torch.full_like(base.sample(), 0.5))
    except NotImplementedError:
        entries = base.batch_shape.numel() * base.event_shape.numel()
        # fewer draws of a large site, to save memory
        return base.sample((min(1001, 1 + 10_000_000 // entries),)).median(0).values


def site_table(latents: Sequence[Latent], parts: Sequence[tuple[str, int]]) -> pd.DataFrame:
    """The table of a guide. `parts`: the structure and the number of parameters of each site."""
    import pandas as pd

    rows = [
        (latent.name, latent.start.numel(), *part, "closed form" if latent.normal else "sampled")
        for latent, part in zip(latents, parts, strict=True)
    ]
    return pd.DataFrame(rows, columns=["site", "size", "structure", "parameters", "kl"])
