"""A fit as it runs: program, guide, masks and empirical scales, its step and its optimiser, and
what a reduction or an update of the scales does to them.

Owns `Run`. Next: `descent.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from pyro_bmr.fitting.arguments import Arguments, Program
from pyro_bmr.fitting.autograd_step import AutogradStep
from pyro_bmr.fitting.faults import Faults
from pyro_bmr.fitting.guide import make_guide
from pyro_bmr.fitting.mean_field_step import MeanFieldStep
from pyro_bmr.fitting.network import Network
from pyro_bmr.fitting.optimizers import optimizer_of
from pyro_bmr.fitting.point_step import PointStep
from pyro_bmr.fitting.program import latents_of
from pyro_bmr.fitting.rows import Batch, LoaderRows, Rows
from pyro_bmr.fitting.start import begin_at
from pyro_bmr.fitting.step import Draw, Step
from pyro_bmr.fitting.tempered_noise import check_noise
from pyro_bmr.fitting.unread_terms import UnreadTerms
from pyro_bmr.guides import MeanField, Point
from pyro_bmr.guides.latent_sites import base_distribution
from pyro_bmr.guides.row_noise import PER_ROW
from pyro_bmr.isolation import seed_generator
from pyro_bmr.likelihoods.whole_data import WholeData
from pyro_bmr.memory import check_memory, return_freed
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.networks.modes import note_modes, set_training
from pyro_bmr.posteriors.from_guides import (
    masks_in_force,
    mean_field_sites,
    sites_of_guide,
)
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.products import with_products
from pyro_bmr.posteriors.site import Site
from pyro_bmr.priors.empirical_bayes import EmpiricalScales
from pyro_bmr.priors.gaussian import Gaussian
from pyro_bmr.pruning import Every
from pyro_bmr.reduction.correlations import spike_gain
from pyro_bmr.reduction.result import Reduction
from pyro_bmr.tracing import Values

# for each weight: noise, draw, standard deviation and the gradient of the draw; the moments of Adam
# for both vectors
_NUMBERS = 8


class Run:
    """A fit as it runs.

    `scaled` is the program that a step runs: with the empirical scales in force, and a batch
    counted as the full data. `masks`: site → bool tensor, of all that is pruned. `interrupted`:
    whether a process of the group has met Ctrl-C.
    """

    def __init__(self, program: Program, rows: Rows | LoaderRows, given: Arguments) -> None:
        seed_generator(rows.device, given.seed)
        self.program, self.rows, self.temperature = program, rows, given.temperature
        self.processes, self.seed = rows.processes, rows.processes.seed(given.seed)
        self.faults, self.interrupted = Faults(given.skip_faulty), False
        self.unread = UnreadTerms()
        if isinstance(program, nn.Module):
            self.processes.copy_from_first((*program.parameters(), *program.buffers()))
            note_modes(program)
        set_training(program, False)
        self.example_rows, latents = latents_of(program, rows)
        check_noise(program, self.example, latents, given.temperature)
        self.empirical = EmpiricalScales()
        self.full_data = WholeData(rows.size, len(self.example[1]))
        self.scaled = self.empirical(self.full_data(program))
        self.guide: Any = make_guide(given.guide, program, self.example, latents)
        self.processes.copy_from_first(tensors_of(self.guide, program).values())
        self.masks = masks_in_force(program, {}, rows.device)
        self.step = self._step()
        self.step.prune(self.masks)
        sites = self.posterior().sites  # also refuses guides that cannot be read
        self.has_variance = any(bool(site.var.any()) for site in sites.values())
        self.empirical_priors = {
            name: site.declared
            for name, site in sites.items()
            if isinstance(site.declared, Gaussian) and site.declared.scale == "empirical"
        }
        self.hold_scales = given.start is not None or not self.has_variance
        fresh = [name for name, s in sites.items() if s.support == "real" and not s.given]
        if given.start is not None:
            self.empirical.scales, fresh = begin_at(given.start, self.guide), []
            self.masks = masks_in_force(program, given.start.masks, rows.device)
            self.step.prune(self.masks)
        count = rows.size / given.temperature
        self.optimizer = optimizer_of(given.optimizer, self.step, count, fresh)
        self._make_scheduler = given.scheduler
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler: LRScheduler | None = None

    @property
    def looks_later(self) -> bool:
        """Whether a step is taken before its terms are looked at, so that the host does not wait
        for the device.
        """
        elsewhere = self.rows.device.type != "cpu" and self.processes.size == 1
        return elsewhere and not self.faults.allowed

    def begin_cycle(self, steps: int) -> None:
        """Begins the schedule of the learning rate, over `steps` steps, at the full rate."""
        if self._make_scheduler is None:
            return
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = group["initial_lr"] = rate
        self.scheduler = self._make_scheduler(self.optimizer, steps)

    def _step(self) -> Step:
        """The step of the guide: the fast one for a `MeanField` whose noise is drawn once for all
        rows of a batch, and for a `Point` of a network whose priors are all written out.
        """
        guide, size, trained = self.guide, self.rows.size, _trained((self.guide, self.program))
        network = cast(Network, self.program) if hasattr(self.program, "forms") else None
        if type(guide) is Point and network is not None and network.all_written:
            fixed = self.scaled, guide, size, self.temperature, trained
            return PointStep(*fixed, network, self.example)
        if not isinstance(guide, MeanField) or guide.estimator in PER_ROW:
            return AutogradStep(self.scaled, guide, size, self.temperature, trained)
        check_memory(
            f"a fit of {guide.loc.numel():,} weights, beside the guide's vectors and the data,",
            _NUMBERS * guide.loc.numel() * guide.loc.element_size(),
            self.rows.device,
            "make the network smaller, fit in a lower precision, or see docs/several_processes.md",
        )
        others = [p for p in trained if p is not guide.loc and p is not guide.log_scale]
        self.masks |= _masks_of(self.scaled, guide, self.example)
        return MeanFieldStep(self.scaled, guide, size, self.temperature, self.seed, network, others)

    @property
    def example(self) -> Batch:
        """The rows with which guide and program are read between steps; copies, since a program may
        write into its rows.
        """
        return self.rows.first(self.example_rows)

    def draw(self, batch: Batch, share: float, number: int) -> Draw:
        """What step `number` finds at one draw, in the fraction `share` of the rows of a batch."""
        self.full_data.rows = len(batch[1])
        return self.step.run(batch, number)

    def posterior(self) -> Posterior:
        """The posterior as it stands; the program is in evaluation mode while it is read."""
        self.step.write_back()
        return self._read()

    def _read(self) -> Posterior:
        set_training(self.program, False)
        posterior = Posterior.from_guide(
            self.guide,
            self.empirical(self.program),
            *self.example,
            masks=self.masks,
            temperature=self.temperature,
            rows=self.rows.size,
            products=False,
        )
        set_training(self.program, True)
        return posterior

    def finish(self) -> Posterior:
        """The posterior at the end of the fit, and which of its sites the program multiplies. The
        vectors of the step and of the optimiser are gone before it is read.
        """
        self.step.write_back()
        del self.step, self.optimizer, self.scheduler
        posterior = self._read()
        if self.has_variance:
            sites = with_products(posterior.sites, self.program, self.example, {})
            posterior = replace(posterior, sites=sites)
        if isinstance(self.program, nn.Module):
            self.program.eval()
        return posterior

    def prune(self, schedule: Every, done: float) -> float:
        """Reduces when the fraction `done` of the fit is over, puts the masks in force, and returns
        the predicted gain in evidence of what is pruned now, nats.
        """
        self.step.release()
        return_freed()
        masks, gain = self.processes.decided_by_first(
            lambda: _decided(schedule.reduce(self._for_reduction(), done)), self.rows.device
        )
        self.masks = {**self.masks, **masks}
        self.faults.forget()
        self.step.prune(self.masks, self.optimizer)
        return_freed()
        return gain

    def _for_reduction(self) -> Posterior:
        """The posterior as it stands. Where nothing is pruned, its means are the guide's own."""
        posterior = self.posterior()
        own = self.guide.views(self.guide.loc.detach()) if isinstance(self.guide, MeanField) else {}
        whole = {n: s for n, s in posterior.sites.items() if n in own and s.mask is None}
        shared = {name: replace(site, mean=own[name]) for name, site in whole.items()}
        return replace(posterior, sites={**posterior.sites, **shared})

    @torch.no_grad()
    def update_scales(self) -> None:
        """Sets the empirical scales to those of the best evidence, unless they are held."""
        if self.hold_scales or not self.empirical_priors:
            return
        self.step.write_back()
        self.step.forget()
        for name, site in self._sites():
            if name in self.empirical_priors:
                mask = self.masks.get(name)
                self.empirical.update(name, self.empirical_priors[name], site.mean, site.var, mask)

    def _sites(self) -> Iterable[tuple[str, Site]]:
        """The sites as the guide has them, one after the other where that saves memory."""
        if isinstance(self.guide, MeanField):
            return mean_field_sites(self.guide, self.masks)
        return sites_of_guide(self.guide, self.program, self.example, {}, self.masks).items()

    def agree(self, number: int) -> None:
        """Gives all processes the buffers of the first, such as running means, and checks that they
        have the same weights and masks after step `number`.
        """
        if self.processes.size == 1:
            return
        self.step.write_back()  # the first process has done so at each of its checkpoints
        if isinstance(self.program, nn.Module):
            self.processes.copy_from_first(self.program.buffers())
        tensors = {
            **tensors_of(self.guide, self.program),
            **{f"trained {k}": p.detach() for k, p in enumerate(self.step.parameters)},
            **{f"mask {n}": m for n, m in self.masks.items()},
            **self.empirical.scales,
        }
        self.processes.check_equal(
            tensors,
            self.rows.device,
            f"has other weights or masks than process 0 after step {number}; the program or the"
            " optimiser does not do the same in each, perhaps because it draws random numbers of"
            " its own",
        )

    def is_finite(self) -> bool:
        """Whether all that is trained is."""
        return all(bool(p.isfinite().all()) for p in self.step.parameters)

    def kept(self) -> float:
        """The fraction of the entries of the reduced sites that are kept; 1 before any
        reduction.
        """
        if not self.masks:
            return 1.0
        entries = sum(m.numel() for m in self.masks.values())
        return sum(int(m.sum()) for m in self.masks.values()) / entries


def tensors_of(guide: Any, program: Program) -> dict[str, Tensor]:
    """The parameters and buffers of both, by name."""
    modules = {
        key: m for key, m in (("guide", guide), ("program", program)) if isinstance(m, nn.Module)
    }
    return {
        f"{key}.{name}": t.detach()
        for key, m in modules.items()
        for name, t in (*m.named_parameters(), *m.named_buffers())
    }


def _trained(parts: Iterable[Any]) -> list[Tensor]:
    """All parameters that are trained, of guide and program."""
    return [
        p
        for m in parts
        if isinstance(m, nn.Module)
        for p in (m.trained if isinstance(m, BayesianNetwork) else m.parameters())
        if p.requires_grad
    ]


def _masks_of(program: Program, guide: MeanField, example: Batch) -> dict[str, Tensor]:
    """The masks of a program under `Masked`."""
    starts = {
        latent.name: latent.start if latent.transform is None else latent.transform(latent.start)
        for latent in guide.latents
    }
    with torch.no_grad(), Values(starts) as run:
        program(*example)
    bases = {name: base_distribution(msg["fn"]) for name, msg in run.latent.items()}
    return {name: base.kept for name, base in bases.items() if hasattr(base, "kept")}


def _decided(reduction: Reduction) -> tuple[dict[str, Tensor], float]:
    """The masks of a reduction, and the predicted gain in evidence of what it prunes, nats."""
    masks = reduction.masks
    return masks, sum(
        spike_gain(reduction.before[name], masks[name], site.spike_delta_f)
        for name, site in reduction.sites.items()
    )
