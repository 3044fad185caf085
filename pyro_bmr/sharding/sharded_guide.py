"""The mean-field guide of a process's parts of the weights, and of the scales that they share.

Owns `sharded_guide` and `check_priors`, which refuses what is not shared out yet. Next:
`sharded_step.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_bmr.errors import FitError, described
from pyro_bmr.guides import MeanField
from pyro_bmr.guides.latent_sites import Latent, latent_sites
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.priors import Gaussian, Prior
from pyro_bmr.sharding.layers import ShardedLayers


def check_priors(program: BayesianNetwork) -> None:
    """Raises FitError unless a sharded fit knows all priors and the likelihood."""
    for name, prior in program.priors.items():
        one_scale = type(prior) is Gaussian and prior.per == "layer"
        if not one_scale or not isinstance(prior.mean, (int, float)):  # type: ignore[attr-defined]
            raise FitError(
                f"site '{name}': a sharded fit expects a Gaussian(...) with one scale for the"
                f" tensor and a number as its mean, got {described(prior)}; give that, or use fit"
            )
    likelihood = program.likelihood
    if not program.has_log_likelihood:
        raise FitError(
            "likelihood: a sharded fit expects one with a log_prob and without latent sites, such"
            f" as Categorical() or Normal(noise=0.3), got {described(likelihood)}; give that, or"
            " use fit"
        )


def sharded_guide(layers: ShardedLayers, estimator: str) -> MeanField:
    """The guide that starts where `MeanField` starts for the whole network: first the parts of the
    weights, then the sites that are whole in each process; a call of all processes.
    """
    return MeanField.of_latents([*_parts(layers), *_shared(layers)], estimator=estimator)


def _parts(layers: ShardedLayers) -> Iterator[Latent]:
    """The sites of the weights, of which the process has a part."""
    network, sizes = layers.network, layers.layout.shapes
    starts = {name: layers.own(name).detach() / network.forms[name].unit for name in network.priors}
    squares = torch.stack([start.square().sum(dtype=torch.float64) for start in starts.values()])
    total = layers.layout.sum(squares)
    for (name, start), square in zip(starts.items(), total, strict=True):
        prior, one = network.priors[name], start.new_ones(())
        is_given = isinstance(prior, Gaussian) and not isinstance(prior.scale, str)
        yield Latent(
            name=name,
            shape=start.shape,
            event_dim=start.ndim,
            transform=None,
            plates=(),
            start=start,
            rms=(square / sizes[name].numel()).sqrt().to(start.dtype),
            prior_scale=one * prior.scale if is_given else one,  # type: ignore[attr-defined]
            prior=prior,
            normal=True,
            mask=None,
        )


def _shared(layers: ShardedLayers) -> Iterator[Latent]:
    """The sites of scales, of one number each."""
    for name, prior in layers.network.priors.items():
        wanted = {site.name for site in layers.network.forms[name].scale_sites}
        if wanted:
            like = layers.own(name)

            def program(prior: Prior = prior, name: str = name, like: Tensor = like) -> None:
                prior.sample(name, (1,) * like.ndim, like.new_zeros((1,) * like.ndim))

            yield from (latent for latent in latent_sites(program) if latent.name in wanted)
