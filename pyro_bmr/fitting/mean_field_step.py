"""One step of a `MeanField` fit: the draw, the gradient of the loss and the two terms of the ELBO,
in few passes over the weights.

Owns `MeanFieldStep`. `elbo.elbo_terms` gives the same numbers through autograd, for any guide;
tests hold the two together. Here autograd runs from the loss to the drawn weights only. The rest is
written out, in chunks that stay in the cache. Next: `autograd_step.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_bmr.fitting.chunks import log_scale_gradient, number_tensor, pull_of
from pyro_bmr.fitting.flat_vectors import FlatVectors
from pyro_bmr.fitting.live_network import LiveNetworks
from pyro_bmr.fitting.network import Network
from pyro_bmr.fitting.network_weights import NetworkWeights, live_weights, whole_weights
from pyro_bmr.fitting.noise import Noise
from pyro_bmr.fitting.site_prior import (
    Pull,
    ReadPrior,
    SitePrior,
    closed_kl,
    kl_is_due,
    read_prior,
    site_in,
)
from pyro_bmr.fitting.step import Draw
from pyro_bmr.fitting.unread_terms import Number, number_of
from pyro_bmr.guides import MeanField
from pyro_bmr.tracing import Values, likelihood_of


class MeanFieldStep(FlatVectors):
    r"""The gradient of (T·KL − E[log p(y|θ)])/N at one draw, for the flat vectors `loc` and
    `log_scale`.

    With g the gradient, at the draw z = μ + σε, of everything that has no closed form, and η, p the
    mean and precision of the prior:

    .. math:: \nabla_\mu = g + \tfrac{T}{N}\, p (\mu - \eta), \qquad
        \nabla_{\log\sigma} = \sigma\left(g\varepsilon + \tfrac{T}{N}\,
        p\sigma\right) - \tfrac{T}{N}

    The vectors are the guide's own until `prune` is called. Then they hold the kept entries alone,
    and a step costs what is kept. `write_back` brings the guide up to date.

    With the estimator "antithetic" a run takes two draws, μ ± σε. Their mean gradient of μ has no
    part that is odd in ε, the largest part of its noise.

    With a `network` (the `BayesianNetwork` inside `program`) the sites of the priors that have a
    form are declared in the first run alone. After that the network gets its weights as they are
    written out (`written_weights.py`), and where it has no other sites, only its likelihood is
    run. `forget` has them declared again, as after a change of the empirical scales.

    `trained` are the parameters of the program that are no sites. Autograd gives their gradients.
    `may_lag`: whether the standard deviation in a draw may be some steps old.
    """

    may_lag = True

    def __init__(
        self,
        program: Callable[..., Any],
        guide: MeanField,
        rows: int,
        temperature: float,
        seed: int,
        network: Network | None = None,
        trained: Iterable[Tensor] = (),
    ) -> None:
        super().__init__(guide)
        self.program, self.rows, self.kl_weight = program, rows, temperature / rows
        self.seed, self.network, self.trained = seed, network, list(trained)
        self.written_out = network is not None and network.has_log_likelihood
        self.noise = self._new_noise()
        self.declared: dict[str, SitePrior] = {}
        self.priors: dict[str, SitePrior] = {}
        self.pulls: list[Pull] = []
        self.kl: Number = 0.0
        self.live_networks = None if network is None else LiveNetworks(network)
        self._read_weights()

    def _new_noise(self) -> Noise:
        """The noise of vectors of this size."""
        return Noise(self.std, self.seed)

    def _read_weights(self) -> None:
        """Finds the parameters that are written out; those of the live network wait for a batch."""
        self.whole = whole_weights(self.network, self)
        self.live: NetworkWeights | None = None
        self.live_is_due = self.kept is not None

    @property
    def parameters(self) -> list[Tensor]:
        return [self.loc, self.log_scale, *self.trained]

    def release(self) -> None:
        super().release()
        self.noise.release()

    def forget(self) -> None:
        """Has every site declared again in the next run."""
        self.declared = {}

    @torch.no_grad()
    def run(self, batch: tuple[Any, ...], number: int) -> Draw:
        """The draw of step `number`. The parameters `trained` get their `.grad`."""
        noise, sign = self.noise.at(number)
        if self.guide.estimator != "antithetic":
            return self._at(batch, number, noise, sign, 1.0)
        one, other = (self._at(batch, number, noise, s, 0.5) for s in (sign, -sign))
        odd = [a - b for a, b in zip(one.gradients, other.gradients, strict=True)]
        even = [a.add_(b) for a, b in zip(one.gradients, other.gradients, strict=True)]
        pulls = (
            one.pulls
            if one.pulls is other.pulls
            else [a.halfway(b) for a, b in zip(one.pulls, other.pulls, strict=True)]
        )
        likelihood = (one.expected_log_likelihood + other.expected_log_likelihood) / 2
        return Draw(likelihood, (one.kl + other.kl) / 2, even, odd, pulls, noise, sign)

    def _at(
        self, batch: tuple[Any, ...], number: int, noise: Tensor, sign: float, share: float
    ) -> Draw:
        """One draw, whose gradients are multiplied by `share`."""
        # the KL of old standard deviations would be off by more than late steps gain
        due = kl_is_due(self.loc.numel(), number)
        self.stale = [True] * len(self.chunks) if due else self.stale
        self.fill(noise, sign)
        weights, network = self._weights(batch), self.network
        open_kl: Number = 0.0
        with torch.enable_grad():
            if weights is not None and network is not None and self._needs_network_alone:
                priors, size = self.declared, len(batch[1])
                of_batch = network.log_likelihood(
                    weights.tensors, batch[0], batch[1], weights.placed
                )
                of_batch.backward(number_tensor(-share / size, of_batch))
                weights.settle()
                likelihood = number_of(of_batch) * (self.rows / size)
            else:
                likelihood, priors, open_kl = self._run_program(
                    batch, share, weights.given if weights is not None else {}
                )
        if due or priors is not self.priors:
            vectors = self.loc, self.log_scale, self.std, noise
            self.kl = sum(closed_kl(p, self.parts[name], *vectors) for name, p in priors.items())
            self.kl -= weights.log_p() if weights is not None else 0.0
        self._follow(priors)
        found = {} if weights is None else weights.gradients(share * self.kl_weight)
        g, kl = self.gradients(found), open_kl + self.kl
        return Draw(likelihood, kl, g, g, self.pulls, noise, sign)

    @property
    def _needs_network_alone(self) -> bool:
        """Whether all sites are known without a run of the program."""
        return self.written_out and len(self.declared) == len(self.parts)

    def _weights(self, batch: tuple[Any, ...]) -> NetworkWeights | None:
        """The parameters that are written out, at the draw; None until the sites are declared."""
        weights = (self.live or self.whole) if self.declared else None
        if self.live_is_due and self.live_networks is not None and self._needs_network_alone:
            self.live = live_weights(self.live_networks, self, batch[0])
            self.live_is_due, weights = False, self.live or self.whole
        if weights is None or weights is self.whole:
            self.scatter()
        if weights is not None:
            weights.weigh(self)
        return weights

    def _follow(self, priors: dict[str, SitePrior]) -> None:
        """Has the means pulled by `priors`."""
        if priors is not self.priors:
            self.pulls = [
                pull_of(chunk, [priors[name] for name in chunk.names], self.parts)
                for chunk in self.chunks
            ]
        self.priors = priors

    def _run_program(
        self, batch: tuple[Any, ...], share: float, weights: dict[str, Tensor]
    ) -> tuple[Number, dict[str, SitePrior], Number]:
        """The log likelihood, the priors and the open part of the KL, from the whole program but
        for the `weights` that are known; with the backward pass.
        """
        values = {
            s.name: self.leaves[s.name] if s.transform is None else s.transform(self.leaves[s.name])
            for s in self.guide.latents
            if s.name not in self.declared
        }
        with Values(values) as run:
            self.program(*batch, **({"weights": weights} if weights else {}))
        likelihood = likelihood_of(run)
        priors: dict[str, SitePrior] = {}
        loss, moving = likelihood / -self.rows, False
        open_kl: Number = 0.0
        for latent in self.guide.latents:
            name = latent.name
            if name in self.declared:
                priors[name] = self.declared[name]
                continue
            kept = None if self.kept is None else self.kept[name]
            read = read_prior(latent, site_in(run, name), values[name], self.leaves[name], kept)
            priors[name] = read.prior
            if read.sampled_kl is not None:
                loss = loss + self.kl_weight * read.sampled_kl
                open_kl += number_of(read.sampled_kl)
            if read.moving is not None:
                loss, moving = loss + self.kl_weight * self._moving_kl(name, read), True
        if loss.requires_grad:  # not if the data say nothing of the sites
            (share * loss).backward()  # type: ignore[no-untyped-call]
        if not self.declared and not moving:
            sites = self.whole.sites
            known = {name: prior for name, prior in priors.items() if name in sites}
            self.declared = known if all(prior.weight == 1 for prior in known.values()) else {}
        return number_of(likelihood), priors, open_kl

    def _moving_kl(self, name: str, read: ReadPrior) -> Tensor:
        """What the loss alone needs where the moments of the prior depend on other sites."""
        assert read.moving is not None
        (mean, scale), part = read.moving, self.parts[name]
        deviation = self.loc.detach()[part] - mean
        ratio = (deviation.square() + self.std[part].square()) / scale.square()
        return read.prior.weight * (scale.log().expand(ratio.shape) + 0.5 * ratio).sum()

    @torch.no_grad()
    def write_gradients(self, draw: Draw) -> None:
        """The gradient of the loss in `loc.grad` and `log_scale.grad`, for any optimiser. It takes
        the place of the draw: one call per run.
        """
        for chunk, g, odd, pull in zip(
            self.chunks, draw.gradients, draw.odd, draw.pulls, strict=True
        ):
            noise = draw.noise[chunk.part]
            log_scale_gradient(chunk, odd, noise, draw.sign, pull, self.kl_weight, chunk.std)
            pull.add_to(g, chunk.loc, self.kl_weight, chunk.draw)
        self.stale = [True] * len(self.chunks)
        self.loc.grad, self.log_scale.grad = self.draw, self.std

    def prune(self, masks: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        """Keeps only the entries that `masks` (site → bool tensor) keep, in the vectors and in the
        state of `optimizer`.
        """
        if self.take_out(masks, optimizer):
            self.noise = self._new_noise()
            self._read_weights()
            self.forget()

    def not_finite(self, draw: Draw) -> set[str]:
        return self.not_finite_with(draw.gradients)

    def to_average(self, draw: Draw) -> list[Tensor]:
        """Per chunk g and g ε, the gradients of a mean and of a standard deviation."""
        times_noise = [
            odd * draw.noise[chunk.part] * draw.sign
            for chunk, odd in zip(self.chunks, draw.odd, strict=True)
        ]
        return [*draw.gradients, *times_noise]

    def averaged(self, draw: Draw, likelihood: float, kl: float, vectors: Sequence[Tensor]) -> Draw:
        half, ones = len(draw.gradients), draw.noise.new_ones(1).expand_as(draw.noise)
        g, odd = list(vectors[:half]), list(vectors[half:])
        return Draw(likelihood, kl, g, odd, draw.pulls, ones, 1.0)

    def state(self) -> dict[str, Any]:
        """What the steps so far have changed, for a checkpoint. The KL is up to sixteen steps old,
        and is evaluated anew when the declared priors change.
        """
        declared = {name: tuple(prior) for name, prior in self.declared.items()}
        return {
            "loc": self.loc,
            "log_scale": self.log_scale,
            # a copy: torch no longer lets storage be released that numpy has seen
            "std": self.std.clone() if self._lags() else None,
            "stale": list(self.stale),
            "kl": float(self.kl),
            "declared": declared,
            "settled": self.priors is self.declared,
        }

    def _lags(self) -> bool:
        """Whether a standard deviation for the next step is not that of the vectors now."""
        return any(
            not stale and not torch.equal(chunk.std, chunk.log_scale.exp())
            for stale, chunk in zip(self.stale, self.chunks, strict=True)
        )

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, after `prune` with its masks."""
        self.loc.copy_(state["loc"])
        self.log_scale.copy_(state["log_scale"])
        self.stale = [True] * len(self.chunks)
        if state["std"] is not None:
            self.std.copy_(state["std"])
            self.stale = state["stale"]
        self.kl = state["kl"]
        device = self.loc.device
        self.declared = {
            n: SitePrior._make(v.to(device) if isinstance(v, Tensor) else v for v in prior)
            for n, prior in state["declared"].items()
        }
        if state["settled"]:
            self._follow(self.declared)
