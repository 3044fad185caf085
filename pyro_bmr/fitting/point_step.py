"""The step of a `Point` fit of a network whose priors are written out: the gradient of the penalty
is added to that of the weights, without Pyro.

Owns `PointStep`. Next: `natural_gradient.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_bmr.fitting.autograd_step import AutogradStep, value_and_gradient
from pyro_bmr.fitting.chunks import number_tensor
from pyro_bmr.fitting.network import Network
from pyro_bmr.fitting.site_prior import Pull, SitePrior, kl_is_due, read_prior, squared_distance
from pyro_bmr.fitting.step import Draw
from pyro_bmr.fitting.unread_terms import Number, number_of
from pyro_bmr.fitting.written_weights import WrittenWeight
from pyro_bmr.guides import Point
from pyro_bmr.networks.placed_weights import PlacedWeights
from pyro_bmr.tracing import Values, likelihood_of


class PointStep(AutogradStep):
    r"""The gradient of −(T log p(θ) + log p(y|θ))/N at the point θ. The density is that of the
    constrained values, as `Point` has it. An optimiser moves one parameter for each site, a view of
    the guide's flat vector, so that the gradients stay where the backward pass has left them.

    Only the likelihood is run, and the latent sites of its own. −log p(θ) is evaluated in every
    16th step of a large network, since it is only reported. With masks in force the step is that
    of `AutogradStep`.

    Args:
        network: the `BayesianNetwork` inside `program`, all of whose priors have a form.
        example: rows with which the program declares its priors.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        guide: Point,
        rows: int,
        temperature: float,
        trained: Iterable[Tensor],
        network: Network,
        example: tuple[Any, ...],
    ) -> None:
        self.point = guide.loc.detach()
        self.leaves = {
            latent.name: nn.Parameter(part.view(latent.shape))
            for latent, part in zip(guide.latents, self.point.split(guide.sizes), strict=True)
        }
        others = [p for p in trained if p is not guide.loc]
        super().__init__(program, guide, rows, temperature, [*self.leaves.values(), *others])
        self.network, self.placed = network, PlacedWeights(network.net)
        self.penalty: Number | None = None  # −log p(θ) of the sites that are written out
        draws = {name: leaf.detach().view(-1) for name, leaf in self.leaves.items()}
        self.written = {
            name: WrittenWeight(form, name, draws, self.leaves[name], point=True)
            for name, form in network.forms.items()
        }
        self.weights = {name: weight.leaf for name, weight in self.written.items()}
        self.active = [weight for weight in self.written.values() if not weight.passive]
        sites = {site for weight in self.written.values() for site in weight.sites}
        self.others = [latent for latent in guide.latents if latent.name not in sites]
        self.priors = self._read(example)
        # the sites that are the weight, with a prior N(0, s²), and T/N s⁻²
        self.decays = {
            name: temperature / rows * prior.precision
            for name, prior in self.priors.items()
            if self.written[name].passive
            and isinstance(prior.precision, float)
            and isinstance(prior.loc, float)
            and prior.loc == 0
        }
        self.decay_of = {self.leaves[name]: decay for name, decay in self.decays.items()}

    @torch.no_grad()
    def _read(self, example: tuple[Any, ...]) -> dict[str, SitePrior]:
        """The priors of the weights that are Gaussian and depend on no other site."""
        values = {
            s.name: self.leaves[s.name] if s.transform is None else s.transform(self.leaves[s.name])
            for s in self.guide.latents
        }
        with torch.random.fork_rng(), Values(values) as run:
            self.program(*example)
        return {
            s.name: read_prior(
                s, run.latent[s.name], values[s.name], self.leaves[s.name], None
            ).prior
            for s in self.guide.latents
            if s.name in self.written and self.written[s.name].form.density is None
        }

    def run(self, batch: tuple[Any, ...], number: int) -> Draw:
        if self.masks:
            return self._run_masked(batch, number)
        with torch.no_grad():
            for weight in self.active:
                weight.weigh()
        likelihood, open_kl = self._run_network(batch, self.weights)
        if kl_is_due(self.point.numel(), number) or self.penalty is None:
            self.penalty = self._penalty()
        self._write(self.temperature / self.rows)
        kl = self.penalty + open_kl
        return Draw(likelihood, kl, [], [], [], self.no_noise, 1.0)

    def _run_masked(self, batch: tuple[Any, ...], number: int) -> Draw:
        """The step of `AutogradStep`, with the gradient split among the sites."""
        self.guide.loc.grad = None
        draw, flat = super().run(batch, number), self.guide.loc.grad
        for leaf, g in zip(self.leaves.values(), flat.split(self.guide.sizes), strict=True):
            leaf.grad = g.view(leaf.shape)
        return draw

    def _run_network(
        self, batch: tuple[Any, ...], weights: dict[str, Tensor]
    ) -> tuple[Number, Number]:
        """The log likelihood and −log p of the sites that are not written out, with the backward
        pass.
        """
        if not self.others and self.network.has_log_likelihood:
            size = len(batch[1])
            of_batch = self.network.log_likelihood(weights, batch[0], batch[1], self.placed)
            of_batch.backward(number_tensor(-1 / size, of_batch))
            return number_of(of_batch) * (self.rows / size), 0.0
        values = {
            s.name: self.leaves[s.name] if s.transform is None else s.transform(self.leaves[s.name])
            for s in self.others
        }
        with Values(values) as run:
            self.program(*batch, weights=weights)
        likelihood, log_p = likelihood_of(run), self.point.new_zeros(())
        for msg in run.latent.values():
            each = msg["fn"].log_prob(msg["value"])
            log_p = log_p + scale_and_mask(each, msg["scale"], msg["mask"]).sum()
        ((self.temperature * log_p + likelihood) / -self.rows).backward()
        return number_of(likelihood), -number_of(log_p)

    @torch.no_grad()
    def _penalty(self) -> Number:
        """−log p of the sites that are written out, at the point."""
        total = -sum(weight.log_p() for weight in self.active)
        for name, prior in self.priors.items():
            point = self.leaves[name].view(-1)
            ratio = squared_distance(prior, point)
            total += prior.log_scales + 0.5 * (ratio + point.numel() * math.log(2 * math.pi))
        return total

    @torch.no_grad()
    def _write(self, factor: float) -> None:
        """Puts the gradient of the loss into the `.grad` of the sites, but for their `decays`;
        `factor` is T/N.
        """
        for name, weight in self.written.items():
            prior = self.priors.get(name)
            if name in self.decays:  # `write_gradients` and the optimiser know these
                if weight.leaf.grad is None:
                    weight.leaf.grad = torch.zeros_like(weight.leaf)
                continue
            found = weight.gradients(factor)
            if prior is not None:
                pull = Pull(prior.loc, prior.precision, prior.weight)
                pull.add_to(found[name], self.leaves[name].view(-1), factor, found[name])
            for site, g in found.items():
                self.leaves[site].grad = g.view(self.leaves[site].shape)

    @torch.no_grad()
    def write_gradients(self, draw: Draw) -> None:
        for name, decay in {} if self.masks else self.decays.items():
            leaf = self.leaves[name]
            assert leaf.grad is not None
            leaf.grad.add_(leaf, alpha=decay)

    def not_finite(self, draw: Draw) -> set[str]:
        named = ((name, value_and_gradient(leaf)) for name, leaf in self.leaves.items())
        return {name for name, vector in named if not bool(vector.isfinite().all())}

    def prune(self, masks: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        super().prune(masks, optimizer)
        self.masks = {name: mask for name, mask in masks.items() if not bool(mask.all())}

    def state(self) -> dict[str, Any]:
        return {"penalty": None if self.penalty is None else float(self.penalty)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.penalty = state["penalty"]
