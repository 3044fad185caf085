"""One step of a sharded fit: as `MeanFieldStep`, on this process's parts of the vectors.

Owns `ShardedStep`. Each process draws the noise of its parts; the network gathers the draw, layer
by layer, and each process gets the gradient of its parts. All else goes entry by entry. Sums over
the processes are needed by the scales that a weight shares and by the terms that are reported.
Next: `sharded_posterior.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_bmr.data.inputs import of_each
from pyro_bmr.fitting.mean_field_step import MeanFieldStep
from pyro_bmr.fitting.network import Network
from pyro_bmr.fitting.network_weights import whole_weights
from pyro_bmr.fitting.noise import Noise
from pyro_bmr.fitting.site_prior import SitePrior, closed_kl, kl_is_due
from pyro_bmr.fitting.step import Draw
from pyro_bmr.guides import MeanField
from pyro_bmr.isolation import seed_of
from pyro_bmr.priors import Gaussian
from pyro_bmr.sharding.layers import ShardedLayers


class ShardedStep(MeanFieldStep):
    """The gradient of the loss of `MeanFieldStep` at one draw, of this process's parts.

    `scales`: site → empirical scale, which the caller sets before `forget`. `fraction`: of the
    rows of the whole batch, those that this process runs; the caller sets it before each `run`.
    """

    may_lag = False  # checkpoints of parts do not have the standard deviations

    def __init__(
        self,
        layers: ShardedLayers,
        guide: MeanField,
        rows: int,
        temperature: float,
        seed: int,
        scales: Mapping[str, Tensor],
        trained: Iterable[Tensor],
        micro_batches: int = 1,
    ) -> None:
        self.micro_batches = micro_batches
        self.layers, self.layout, self.scales = layers, layers.layout, scales
        self.shared = [s.name for s in guide.latents if s.name not in self.layout.shapes]
        self.fraction, self.entries = 1.0, 0
        super().__init__(layers.network, guide, rows, temperature, seed, None, trained)
        self._count()

    def _count(self) -> None:
        """Finds the number of entries of all parts; it decides in which steps the KL is due."""
        own = torch.tensor([float(self.loc.numel())], dtype=torch.float64, device=self.loc.device)
        self.entries = int(self.layout.sum(own))

    def _new_noise(self) -> Noise:
        ends = sum(self.parts[name].stop - self.parts[name].start for name in self.shared)
        own = seed_of(self.seed, self.layout.part)
        return _SharedEnd(self.std, own, seed_of(self.seed, self.layout.parts), ends)

    def _read_weights(self) -> None:
        self.whole = whole_weights(cast(Network, self.layers.network), self)

    @torch.no_grad()
    def align(self) -> None:
        """Gives the sites that all processes have the moments of the first. The last bits of an
        update depend on where in a vector an entry lies, which differs between processes.
        """
        for name in self.shared:
            for vector in (self.loc, self.log_scale):
                self.layout.copy_from_first(vector.detach()[self.parts[name]])
        if self.shared:
            self.stale = [True] * len(self.chunks)

    def run(self, batch: tuple[Any, ...], number: int) -> Draw:
        self.align()
        return super().run(batch, number)

    def _at(
        self, batch: tuple[Any, ...], number: int, noise: Tensor, sign: float, share: float
    ) -> Draw:
        self.fill(noise, sign)
        self.scatter()
        self.whole.weigh(self)
        self.layers.place({name: leaf.detach() for name, leaf in self.whole.given.items()})
        processes = self.layout.mesh.size()  # whose gradients fully_shard averages
        own = share * self.fraction * processes / len(batch[1])
        total = 0.0
        for part in self._micro_batches(batch):
            with torch.enable_grad():
                likelihood = self.layers.log_likelihood(part)
                (likelihood * -own).backward()  # type: ignore[no-untyped-call]
            total += float(likelihood.detach())
        for name, gradient in self.layers.gradients():
            self.whole.given[name].grad = gradient
        if not self.declared:
            self.declared = {name: self._prior(name) for name in self.parts}
        if kl_is_due(self.entries, number) or self.declared is not self.priors:
            self.kl = self._kl(noise)
        self._follow(self.declared)
        found = self.whole.gradients(share * self.kl_weight / self.layout.parts)
        if self.shared:
            # each process has found the part of its rows, and its share of the prior's
            summed = self.layout.sum(torch.cat([found[name] for name in self.shared]))
            found |= zip(
                self.shared, summed.split([len(found[n]) for n in self.shared]), strict=True
            )
        g = self.gradients(found)
        nats = total * (self.rows / len(batch[1]))
        return Draw(nats, self.kl, g, g, self.pulls, noise, sign)

    def _micro_batches(self, batch: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        """The parts of this process's rows that run one after the other, as many as in all other
        processes, which gather their layers together.
        """
        x, y = batch
        fewest = round(len(y) / self.fraction) // self.layout.mesh.size()
        count = max(1, min(self.micro_batches, fewest))
        if count == 1:
            yield batch
            return
        for k in range(count):
            yield of_each(lambda t, k=k: t.tensor_split(count)[k], x), y.tensor_split(count)[k]  # type: ignore[misc]

    def _prior(self, name: str) -> SitePrior:
        """The prior of this process's part of a site; that of a shared site is written out."""
        prior = self.layers.network.priors.get(name)
        if not isinstance(prior, Gaussian):
            return SitePrior(0.0, 0.0, 0.0, 1.0)
        log_scale, mean = self.log_prior_scale(name), float(prior.mean)  # type: ignore[arg-type]
        entries = self.parts[name].stop - self.parts[name].start
        precision = torch.tensor(-2 * log_scale, dtype=torch.float64).exp()
        return SitePrior(mean, float(precision), log_scale * entries, 1.0)

    def log_prior_scale(self, name: str) -> float:
        """log s of the prior of a site: given, empirical, or 0 of a standardised one."""
        scale: Any = self.layers.network.priors[name].scale  # type: ignore[attr-defined]
        if scale == "layer":
            return 0.0
        number = self.scales.get(name, 1.0) if scale == "empirical" else scale
        return float(torch.as_tensor(number, dtype=torch.float64).log())

    def _kl(self, noise: Tensor) -> float:
        """The KL divergence of all sites, nats, equal in all processes; a call of all of them."""
        vectors = self.loc, self.log_scale, self.std, noise
        each = {n: closed_kl(p, self.parts[n], *vectors) for n, p in self.declared.items()}
        shared = sum(each.pop(name) for name in self.shared) - self.whole.log_p()
        own = torch.tensor([float(sum(each.values()))], dtype=torch.float64, device=self.loc.device)
        return float(self.layout.sum(own)) + float(shared)

    def prune(self, masks: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        super().prune(masks, optimizer)
        # also where this process's parts have lost nothing
        self.forget()
        self._count()

    def spread(self, flat: Tensor) -> dict[str, Tensor]:
        """Site → this process's part of it in a flat vector of kept entries, 0 at pruned ones."""
        whole = flat
        if self.kept is not None:
            whole = flat.new_zeros(self.guide.loc.numel())
            for name, view in self.guide.views(whole).items():
                view.view(-1)[self.kept[name]] = flat[self.parts[name]]
        views = self.guide.views(whole)
        return {name: views[name] for name in self.layout.shapes}

    def shared_values(self, flat: Tensor) -> dict[str, Tensor]:
        """Site → its entries in a flat vector, of the sites that all processes have."""
        return {name: flat[self.parts[name]].clone() for name in self.shared}

    def collected(self, parts: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """The flat vector of kept entries, of what `spread` and `shared_values` give."""
        flat = torch.zeros_like(self.loc.detach())
        for name, part in self.parts.items():
            values = (shared[name] if name in shared else parts[name]).reshape(-1)
            taken = self.kept is not None and name in parts
            flat[part] = values[self.kept[name]] if taken else values  # type: ignore[index]
        return flat

    @torch.no_grad()
    def continue_from(self, loc: Tensor, log_scale: Tensor, kl: float, settled: bool) -> None:
        """Continues with these vectors, after `prune` with the masks; `settled`: whether `kl` is
        that of the priors in force.
        """
        self.loc.copy_(loc)
        self.log_scale.copy_(log_scale)
        self.stale = [True] * len(self.chunks)
        self.kl = kl
        if settled:
            self.declared = {name: self._prior(name) for name in self.parts}
            self._follow(self.declared)

    def to_average(self, draw: Draw) -> list[Tensor]:
        """Nothing: the gradients are those of all rows already."""
        return []

    def averaged(self, draw: Draw, likelihood: float, kl: float, vectors: Sequence[Tensor]) -> Draw:
        return draw._replace(expected_log_likelihood=likelihood, kl=kl)


class _SharedEnd(Noise):
    """Noise whose last `count` numbers are the same in all processes, from a seed of their own, and
    whose others are not.

    For as long as a step lasts they lie in the window of the step, over those that are there.
    """

    def __init__(self, like: Tensor, seed: int, shared_seed: int, count: int) -> None:
        super().__init__(like, seed)
        self.count, self.covered = count, self.batch.new_empty(0)
        self.end = self.batch.new_empty(0)
        self.shared = Noise(like.new_empty(count), shared_seed) if count else None

    def at(self, step: int) -> tuple[Tensor, float]:
        self.end.copy_(self.covered)
        numbers, sign = super().at(step)
        if self.shared is not None:
            shared, its_sign = self.shared.at(step)
            self.end = numbers[len(numbers) - self.count :]
            self.covered = self.end.clone()
            torch.mul(shared, its_sign * sign, out=self.end)
        return numbers, sign
