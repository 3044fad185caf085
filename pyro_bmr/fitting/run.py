"""The state of a fit: program, guide, masks and empirical scales, and what one step, reduction or
update does to them.

Owns `FitState`. Next: `progress.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_bmr.errors import FitError
from pyro_bmr.fitting.arguments import Program, batch_sizes
from pyro_bmr.fitting.autograd_step import AutogradStep
from pyro_bmr.fitting.faults import Faults, diagnosis
from pyro_bmr.fitting.mean_field_step import MeanFieldStep, Network
from pyro_bmr.fitting.natural_gradient import NaturalGradient, OnlineNewton
from pyro_bmr.fitting.processes import Processes
from pyro_bmr.fitting.program import latents_of, make_guide
from pyro_bmr.fitting.step import Draw, Step
from pyro_bmr.guides import MeanField
from pyro_bmr.guides.mean_field import base_distribution
from pyro_bmr.guides.row_noise import PER_ROW
from pyro_bmr.likelihoods.whole_data import WholeData
from pyro_bmr.memory import check_memory
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.networks.modes import note_modes, set_training
from pyro_bmr.posteriors.from_guides import masks_in_force, sites_of_guide
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.products import with_products
from pyro_bmr.priors.empirical_bayes import EmpiricalScales
from pyro_bmr.priors.gaussian import Gaussian
from pyro_bmr.pruning import Every
from pyro_bmr.reduction.correlations import spike_gain
from pyro_bmr.reduction.result import Reduction
from pyro_bmr.tracing import Values, collapsed

# for each weight: noise, draw, standard deviation and the gradient of the draw; the moments of Adam
# for both vectors
_NUMBERS = 8


class FitState:
    """The state of a fit: program, guide, handlers, masks."""

    def __init__(
        self,
        program: Program,
        guide: Program,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        temperature: float,
        seed: int,
        held_out: tuple[Tensor, Tensor] | None = None,
        skip_faulty: int = 0,
        shuffle: bool = True,
        split: bool = False,
    ) -> None:
        self.program, self.x, self.y, self.temperature = program, x, y, temperature
        self.processes, self.faults, self.interrupted = Processes(), Faults(skip_faulty), False
        self.processes.check_rows(len(x), batch_size)
        if isinstance(program, nn.Module):
            self.processes.copy_from_first((*program.parameters(), *program.buffers()))
        self.batch_size = min(batch_size, len(x))
        self.masks = masks_in_force(program, {}, x.device)
        self.hold_scales = False
        self.empirical = EmpiricalScales()
        self.in_order = not shuffle or len(self.sizes()) == 1
        if isinstance(program, nn.Module):
            note_modes(program)
        set_training(program, False)
        self.example_rows, latents = latents_of(
            program, x, y, held_out, self.sizes(), shuffle, split
        )
        self.full_data = WholeData(len(x), len(self.example[0]))
        self.scaled = self.empirical(self.full_data(program))
        self.guide: Any = make_guide(guide, program, self.example, latents)
        self.processes.copy_from_first(tensors_of(self.guide, program).values())
        self.step: Step
        if isinstance(self.guide, MeanField) and self.guide.estimator not in PER_ROW:
            own, needed = (
                self.processes.seed(seed),
                _NUMBERS * self.guide.loc.numel() * self.guide.loc.element_size(),
            )
            mend = (
                "make the network smaller, fit in a lower precision, or see"
                " docs/several_processes.md"
            )
            check_memory(
                f"a fit of {self.guide.loc.numel():,} weights, beside the guide's vectors and the"
                " data,",
                needed,
                x.device,
                mend,
            )
            flat = self.guide.loc, self.guide.log_scale
            self.step = MeanFieldStep(
                self.scaled,
                self.guide,
                len(x),
                temperature,
                own,
                cast(Network, program) if hasattr(program, "plain_weights") else None,
                [p for p in self.parameters() if not any(p is vector for vector in flat)],
            )
            self.masks |= _masks_of(self.scaled, self.guide, self.example)
        else:
            self.step = AutogradStep(
                self.scaled, self.guide, len(x), temperature, self.parameters()
            )
        self.step.prune(self.masks)
        sites = self.posterior().sites  # also refuses guides that cannot be read
        self.has_variance = any(bool(site.var.any()) for site in sites.values())
        empirical = {
            name: site.declared
            for name, site in sites.items()
            if isinstance(site.declared, Gaussian) and site.declared.scale == "empirical"
        }
        self.empirical_priors = empirical if self.has_variance else {}
        self.weights = [
            name for name, site in sites.items() if site.support == "real" and not site.given
        ]

    @property
    def example(self) -> tuple[Tensor, Tensor]:
        """The rows with which guide and program are read between steps; copies, since a program may
        write into its rows.
        """
        return self.x[: self.example_rows].clone(), self.y[: self.example_rows].clone()

    @torch.no_grad()
    def begin(self, start: Posterior) -> None:
        """Puts moments, masks and Gaussian priors of `start` in force; the priors stay as they
        are.
        """
        if not isinstance(self.guide, MeanField):
            raise FitError(
                "start: only MeanField can begin at a posterior, the guide is"
                f" {type(self.guide).__name__}"
            )
        locs, log_scales = self.guide.views(self.guide.loc), self.guide.views(self.guide.log_scale)
        if {name: tuple(loc.shape) for name, loc in locs.items()} != {
            name: tuple(site.mean.shape) for name, site in start.sites.items()
        }:
            raise FitError(
                f"start: its sites ({', '.join(start)}) and their shapes must be those of the"
                f" program ({', '.join(locs)})"
            )
        for name, site in start.sites.items():
            living = site.alive & (site.var > 0)
            locs[name].copy_(site.mean)
            log_scales[name].copy_((0.5 * site.var.log()).where(living, log_scales[name]))
        self.masks = masks_in_force(self.program, start.masks, self.x.device)
        held = {
            name: site
            for name, site in start.sites.items()
            if isinstance(site.declared, Gaussian) and site.prior is not None
        }
        self.empirical.scales = {
            name: collapsed(site.prior.var).sqrt()
            for name, site in held.items()
            if site.prior is not None
        }
        self.hold_scales = True
        self.step.prune(self.masks)

    def parameters(self) -> list[Tensor]:
        """All that is trained, of guide and program."""
        modules = [m for m in (self.guide, self.program) if isinstance(m, nn.Module)]
        return [
            p
            for m in modules
            for p in (m.trained if isinstance(m, BayesianNetwork) else m.parameters())
            if p.requires_grad
        ]

    def optimizer(self, make: Callable[[Any], Optimizer] | NaturalGradient) -> Optimizer:
        """The optimiser of the guide's and the program's parameters."""
        if not isinstance(make, NaturalGradient):
            try:
                made = make(self.step.parameters)
            except (ValueError, TypeError) as error:
                raise FitError(f"optimizer: it cannot be made ({error})") from error
            if not isinstance(made, Optimizer) or isinstance(made, torch.optim.LBFGS):
                raise FitError(
                    "optimizer: a torch optimiser whose step takes no closure is wanted, got"
                    f" {type(made).__name__}"
                )
            return made
        if not isinstance(self.step, MeanFieldStep):
            raise FitError(
                'optimizer=natural_gradient(): it needs guide=MeanField with estimator="weight" or'
                f' "antithetic", got {type(self.guide).__name__}; give another optimiser, such as'
                " adam()"
            )
        rows = len(self.x) / self.temperature
        for name in () if self.hold_scales else self.weights:  # a start keeps its variances
            self.step.log_scale.detach()[self.step.parts[name]].fill_(
                -0.5 * math.log(rows * make.curvature)
            )
        return make.optimizer(self.step, self.step.trained)

    def batches(self, seed: int, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's rows of the batches of an epoch but for the first `skip`: in an order that
        is a function of (seed, epoch), or in their own.

        They are copies, since a program may write into its rows.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = (
            torch.arange(len(self.x), device="cpu")
            if self.in_order
            else torch.randperm(len(self.x), generator=generator, device="cpu").to(self.x.device)
        )
        for index in order.split(self.sizes())[skip:]:
            own, self.share = self.processes.rows(index)
            rows = slice(int(own[0]), int(own[-1]) + 1) if self.in_order else own
            yield (
                (self.x[rows].clone(), self.y[rows].clone())
                if self.in_order
                else (self.x[rows], self.y[rows])
            )

    def sizes(self) -> list[int]:
        """Of the batches of an epoch; less than two rows a process left over join the batch before
        (batch norm cannot take one alone).
        """
        return batch_sizes(len(self.x), self.batch_size, 2 * self.processes.size)

    def take_step(
        self, optimizer: Optimizer, batch: tuple[Tensor, Tensor], number: int
    ) -> tuple[float, float] | None:
        """Both terms of the ELBO at one draw in each process, after which the optimiser has gone a
        step down their gradient; None if the step is skipped.
        """
        self.full_data.rows = len(batch[0])
        # holds weights of lower precision as they were in the step before, if the fit runs under
        # torch.autocast
        torch.clear_autocast_cache()
        for parameter in self.step.trained:
            parameter.grad = None
        draw = self.step.run(batch, number)
        found = (*draw.gradients, *(p.grad for p in self.step.trained if p.grad is not None))
        total = sum(_total(g) for g in found)
        faulty = not math.isfinite(draw.expected_log_likelihood + draw.kl + total)
        where = ""
        if self.processes.size > 1:
            draw, ranks = self._of_all(draw, faulty)
            faulty, where = (
                bool(ranks),
                f", in process {', '.join(map(str, ranks))} of {self.processes.size}",
            )
        fault = (
            f"{diagnosis(self.step, self.program, draw)}{where}"
            if faulty
            else self.faults.jump(draw.expected_log_likelihood)
        )
        if fault:
            self.faults.skip(
                f"step {number}: {fault}; lower the learning rate, or check the scale of the data"
                " and of the priors"
            )
            return None
        if isinstance(optimizer, OnlineNewton):
            optimizer.step(lambda: draw)
        else:
            self.step.write_gradients(draw)
            optimizer.step()
        return draw.expected_log_likelihood, draw.kl

    def _of_all(self, draw: Draw, faulty: bool) -> tuple[Draw, list[int]]:
        """What all processes found, each in its rows with its own noise, as one mean over the
        batch, and which have a fault; whether one is interrupted.
        """
        trained = self.step.trained
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        vectors = self.step.to_average(draw)
        numbers = self.x.new_zeros(3 + self.processes.size, dtype=torch.float32)
        numbers[:3] = torch.tensor([draw.expected_log_likelihood, draw.kl, float(self.interrupted)])
        numbers[3 + self.processes.rank] = float(faulty)
        *summed, numbers = self.processes.sum([*vectors, *grads, numbers], self.share)
        for parameter, grad in zip(trained, summed[len(vectors) :], strict=True):
            parameter.grad = grad
        likelihood, kl, interrupted, *faults = numbers.tolist()
        self.interrupted = interrupted > 0
        draw = self.step.averaged(draw, likelihood, kl, summed[: len(vectors)])
        return draw, [rank for rank, fault in enumerate(faults) if fault]

    def finish(self) -> Posterior:
        """The posterior at the end of the fit, read when the vectors of the step are gone."""
        self.step.write_back()
        del self.step  # its vectors, while those of the posterior are made
        posterior = self._read()
        return (
            replace(posterior, sites=with_products(posterior.sites, self.program, self.example, {}))
            if self.has_variance
            else posterior
        )

    def posterior(self) -> Posterior:
        """The posterior as it stands; the program is in evaluation mode while it is read."""
        self.step.write_back()
        return self._read()

    def _read(self) -> Posterior:
        set_training(self.program, False)
        program, rows = self.empirical(self.program), len(self.x)
        posterior = Posterior.from_guide(
            self.guide,
            program,
            *self.example,
            masks=self.masks,
            temperature=self.temperature,
            rows=rows,
            products=False,
        )
        set_training(self.program, True)
        return posterior

    def prune(self, schedule: Every, done: float, optimizer: Optimizer) -> float:
        """Reduces, puts the masks in force, and returns the predicted gain in evidence of what
        went, nats.
        """
        masks, gain = self.processes.decided_by_first(
            lambda: self._decided(schedule.reduce(self.posterior(), done)), self.x.device
        )
        self.masks = {**self.masks, **masks}
        self.faults.forget()
        self.step.prune(self.masks, optimizer)
        return gain

    def _decided(self, reduction: Reduction) -> tuple[dict[str, Tensor], float]:
        """The masks of a reduction, and the predicted gain in evidence of what goes now, nats."""
        masks = reduction.masks
        return masks, sum(
            spike_gain(reduction.before[name], masks[name], site.spike_delta_f)
            for name, site in reduction.sites.items()
        )

    def agree(self, step: int) -> None:
        """Gives all processes the buffers of the first, such as running means, and checks that they
        have the same weights and masks.
        """
        if self.processes.size > 1:
            program = self.program
            self.step.write_back()  # the first process has done so at each of its checkpoints
            if isinstance(program, nn.Module):
                self.processes.copy_from_first(program.buffers())
            tensors = {
                **tensors_of(self.guide, program),
                **{f"trained {k}": p.detach() for k, p in enumerate(self.step.parameters)},
                **{f"mask {n}": m for n, m in self.masks.items()},
                **self.empirical.scales,
            }
            why = (
                "the program or the optimiser does not do the same in each, perhaps because it"
                " draws random numbers of its own"
            )
            self.processes.check_equal(
                tensors,
                self.x.device,
                f"has other weights or masks than process 0 after step {step}; {why}",
            )

    @torch.no_grad()
    def update_scales(self) -> None:
        """Sets the empirical scales to those of the best evidence, unless they are held."""
        if self.hold_scales or not self.empirical_priors:
            return
        self.step.write_back()
        self.step.forget()
        sites = sites_of_guide(self.guide, self.program, self.example, {}, self.masks)
        for name, prior in self.empirical_priors.items():
            self.empirical.update(
                name, prior, sites[name].mean, sites[name].var, self.masks.get(name)
            )

    def is_finite(self) -> bool:
        """Whether all that is trained is."""
        return all(bool(p.isfinite().all()) for p in self.step.parameters)

    def kept(self) -> float:
        """The fraction of the reduced sites' entries that live; 1 before any reduction."""
        return (
            sum(int(m.sum()) for m in self.masks.values())
            / sum(m.numel() for m in self.masks.values())
            if self.masks
            else 1.0
        )


def _masks_of(
    program: Program, guide: MeanField, example: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """The masks of a program under `Masked`."""
    starts = {
        latent.name: latent.start if latent.transform is None else latent.transform(latent.start)
        for latent in guide.latents
    }
    with torch.no_grad(), Values(starts) as run:
        program(*example)
    bases = {name: base_distribution(msg["fn"]) for name, msg in run.latent.items()}
    return {name: base.kept for name, base in bases.items() if hasattr(base, "kept")}


def _total(gradient: Tensor) -> float:
    return float(torch.view_as_real(gradient).sum() if gradient.is_complex() else gradient.sum())


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
