"""A sharded fit as it runs: what `Run` is for a fit in which every process has everything.

Owns `ShardedRun`. Next: `sharded_checkpoints.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_bmr.errors import FitError
from pyro_bmr.fitting.arguments import Arguments
from pyro_bmr.fitting.faults import Faults
from pyro_bmr.fitting.optimizers import optimizer_of
from pyro_bmr.fitting.rows import Batch, LoaderRows, Rows
from pyro_bmr.fitting.run import Run
from pyro_bmr.fitting.step import Draw
from pyro_bmr.fitting.unread_terms import UnreadTerms
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.gaussian import total
from pyro_bmr.isolation import seed_generator
from pyro_bmr.likelihoods.whole_data import WholeData
from pyro_bmr.networks.modes import note_modes, set_training
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.site import Site
from pyro_bmr.priors import Gaussian
from pyro_bmr.priors.empirical_bayes import EmpiricalScales
from pyro_bmr.pruning import Every
from pyro_bmr.sharding.layers import ShardedLayers
from pyro_bmr.sharding.sharded_guide import sharded_guide
from pyro_bmr.sharding.sharded_posterior import ShardedPosterior
from pyro_bmr.sharding.sharded_step import ShardedStep


class ShardedRun(Run):
    """As `Run`, with this process's parts: its `masks`, `guide` and `step` are those of the parts.

    The program is only run by steps, in all processes together.
    """

    step: ShardedStep

    def __init__(
        self,
        layers: ShardedLayers,
        rows: Rows | LoaderRows,
        given: Arguments,
        estimator: str,
        micro_batches: int = 1,
    ) -> None:
        self.layers, self.layout = layers, layers.layout
        self.program, self.rows, self.temperature = layers.network, rows, given.temperature
        self.processes, self.seed = rows.processes, rows.processes.seed(given.seed)
        self.faults, self.interrupted = Faults(given.skip_faulty), False
        self.unread = UnreadTerms()
        seed_generator(rows.device, given.seed)
        note_modes(layers.network)
        set_training(layers.network, True)
        self.empirical, self.full_data = EmpiricalScales(), WholeData(rows.size, 1)
        self.guide = sharded_guide(layers, estimator)
        self.step = ShardedStep(
            layers,
            self.guide,
            rows.size,
            given.temperature,
            given.seed,
            self.empirical.scales,
            layers.network.trained,
            micro_batches,
        )
        self.masks = {
            name: self.layout.own(mask).to(rows.device)
            for name, mask in layers.network.masks.items()
        }
        self.step.prune(self.masks)
        self.has_variance = True
        self.empirical_priors = {
            name: prior
            for name, prior in layers.network.priors.items()
            if isinstance(prior, Gaussian) and prior.scale == "empirical"
        }
        count = rows.size / given.temperature
        self.optimizer = optimizer_of(given.optimizer, self.step, count, list(self.layout.shapes))
        self._make_scheduler = given.scheduler
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler: LRScheduler | None = None

    def draw(self, batch: Batch, share: float, number: int) -> Draw:
        self.step.fraction = share
        return super().draw(batch, share, number)

    def posterior(self) -> Posterior:
        """This process's part of the posterior as it stands."""
        self.step.write_back()
        return self._read()

    def _read(self) -> Posterior:
        locs, log_scales = (
            self.guide.views(v.detach()) for v in (self.guide.loc, self.guide.log_scale)
        )
        sites = {}
        for latent in self.guide.latents:
            name, mask = latent.name, self.masks.get(latent.name)
            support = "real" if latent.transform is None else "positive"
            site = Site(locs[name].clone(), log_scales[name].exp().square_(), support=support)
            if name in self.layout.shapes:
                site = Site(site.mean, site.var, self._prior(name), latent.prior)
            sites[name] = site if mask is None else site.masked(mask)
        return Posterior(sites, self.temperature, self.rows.size)

    def _prior(self, name: str) -> Diagonal:
        """The moments of a prior, each one number for the site."""
        prior: Gaussian = self.layers.network.priors[name]  # type: ignore[assignment]
        like = self.guide.loc.detach()
        scale: Tensor | float = 1.0 if isinstance(prior.scale, str) else prior.scale
        if prior.scale == "empirical":
            scale = self.empirical.scales.get(name, 1.0)
        var = like.new_tensor(float(scale)).square()
        return Diagonal(like.new_tensor(float(prior.mean)), var)  # type: ignore[arg-type]

    def finish(self) -> ShardedPosterior:  # type: ignore[override]
        """The posterior at the end of the fit. The vectors of the step and of the optimiser are
        gone before it is read.
        """
        self.step.write_back()
        del self.step, self.optimizer, self.scheduler
        self.program.eval()  # type: ignore[attr-defined]
        return ShardedPosterior(self._read(), self.layout)

    def prune(self, schedule: Every, done: float) -> float:
        posterior = ShardedPosterior(self.posterior(), self.layout)
        threshold, kept = schedule.threshold, schedule.target(done)
        reduction = posterior.reduce(schedule.to, threshold=threshold, kept=kept).own
        gain = sum(
            total(site.spike_delta_f, posterior.own[name].kept & ~site.site.kept)
            for name, site in reduction.sites.items()
        )
        self.masks = {**self.masks, **reduction.masks}
        self.faults.forget()
        self.step.prune(self.masks, self.optimizer)
        own = torch.tensor([gain], dtype=torch.float64, device=self.rows.device)
        return float(self.layout.sum(own))

    @torch.no_grad()
    def update_scales(self) -> None:
        """Sets the empirical scales to those of the best evidence; a call of all processes."""
        if not self.empirical_priors:
            return
        step, sums = self.step, []
        for name, prior in self.empirical_priors.items():
            part = step.parts[name]
            deviation = step.loc[part] - float(prior.mean)  # type: ignore[arg-type]
            moment = deviation.square() + step.log_scale[part].exp().square()
            sums.append([float(moment.sum(dtype=torch.float64)), float(len(moment))])
        own = torch.tensor(sums, dtype=torch.float64, device=self.rows.device)
        for name, (square, count) in zip(
            self.empirical_priors, self.layout.sum(own).tolist(), strict=True
        ):
            if count:
                self.empirical.scales[name] = step.loc.new_tensor((square / count) ** 0.5)
        step.forget()

    def agree(self, number: int) -> None:
        """Gives all processes the buffers of the first, and checks that what they all have is the
        same after step `number`.
        """
        self.processes.copy_from_first(self.program.buffers())  # type: ignore[attr-defined]
        self.step.align()
        tensors: Mapping[str, Tensor] = {
            **{f"trained {k}": p.detach() for k, p in enumerate(self.step.trained)},
            **{f"scale {name}": scale for name, scale in self.empirical.scales.items()},
        }
        self.processes.check_equal(
            tensors,
            self.rows.device,
            f"has other weights or scales than process 0 after step {number}; the program or the"
            " optimiser does not do the same in each, perhaps because it draws random numbers of"
            " its own",
        )

    def is_finite(self) -> bool:
        """Whether all that is trained is, in all processes; a call of all of them."""
        wrong = not super().is_finite()
        own = torch.tensor([float(wrong)], device=self.rows.device)
        return float(self.layout.sum(own)) == 0

    def kept(self) -> float:
        """The fraction of the entries of the reduced sites that are kept; a call of all
        processes.
        """
        own = torch.tensor(
            [
                float(sum(int(mask.sum()) for mask in self.masks.values())),
                float(sum(mask.numel() for mask in self.masks.values())),
            ],
            dtype=torch.float64,
            device=self.rows.device,
        )
        kept, entries = self.layout.sum(own).tolist()
        return kept / entries if entries else 1.0


def check_schedule(reduce: Every | None) -> None:
    """Raises FitError where a schedule asks for more than single weights by ΔF."""
    if reduce is not None and (not isinstance(reduce.per, str) or reduce.per != "weight"):
        raise FitError(
            f"reduce: a sharded fit prunes single weights, per='weight', got per={reduce.per!r};"
            " reduce the gathered posterior by groups"
        )
