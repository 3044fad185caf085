"""`fit`: the one training loop. Any Pyro program, any guide, any torch optimiser; reductions during the fit if asked.

Owns `fit` and its result `Fit`. Next: `refitting.py`.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import pandas as pd
import pyro
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from tqdm import tqdm

from pyro_bmr.elbo import ELBOTerms, Values, collapsed, elbo_terms
from pyro_bmr.errors import FitError
from pyro_bmr.fit_arguments import Program, check_arguments, check_program, check_rows, like_program, validation_split
from pyro_bmr.guides import MeanField, Point, SiteWise
from pyro_bmr.guides.mean_field import base_distribution
from pyro_bmr.likelihoods import WholeData
from pyro_bmr.mean_field_step import MeanFieldStep, Network
from pyro_bmr.online_newton import NaturalGradient, OnlineNewton
from pyro_bmr.posterior import Posterior
from pyro_bmr.prediction import check_callable_without_y, predict
from pyro_bmr.priors.empirical_bayes import EmpiricalScales
from pyro_bmr.priors.gaussian import Gaussian
from pyro_bmr.pruning import Every, Masked

# The data speak first: no empirical scale is set and no weight pruned before this many steps, or this part of a shorter fit. Earlier, on
# small data, scales follow weights that have learned nothing yet down to zero, and such weights look superfluous.
_WARM_UP_STEPS, _WARM_UP_FRACTION = 300, 0.3


class HasTrainingData(Protocol):
    """Anything with `x_train` and `y_train`, such as a `data.Data`."""

    @property
    def x_train(self) -> Tensor: ...
    @property
    def y_train(self) -> Tensor: ...


@dataclass(frozen=True)
class Fit:
    """What a fit leaves behind.

    `posterior`: the moments, masks in force. `program`: the fitted program (a trained copy if it is a module; the argument is never
    changed). `guide`: the trained guide. `masks`: site → bool tensor, empty without reductions. `scales`: site → empirical prior scale.
    `history`: one row per epoch — epoch, step, expected_log_likelihood, kl, elbo (nats per data set, the likelihood divided by the
    temperature in elbo), kept (of the reduced sites' entries), delta_f (predicted gain in evidence of all that was pruned so far, nats),
    learning_rate and, with a validation split, validation_nll (nats per row, at the posterior's point). `reduction_seconds` are part of `seconds`.
    """

    posterior: Posterior
    program: Program
    guide: Program
    masks: dict[str, Tensor]
    scales: dict[str, Tensor]
    history: pd.DataFrame
    seconds: float
    reduction_seconds: float
    seed: int
    temperature: float


def adam(learning_rate: float = 3e-3) -> Callable[[Any], Optimizer]:
    """The default optimiser: Adam, fused."""
    return partial(torch.optim.Adam, lr=learning_rate, fused=True)


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """The default schedule: the learning rate falls to 0 on half a cosine over the fit."""
    return CosineAnnealingLR(optimizer, T_max=steps)


def fit(
    program: Program,
    data: tuple[Tensor, Tensor] | HasTrainingData,
    *,
    guide: Program = MeanField,
    epochs: int = 20,
    batch_size: int = 128,
    optimizer: Callable[[Any], Optimizer] | NaturalGradient | None = None,
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = cosine,
    seed: int = 0,
    temperature: float = 1.0,
    reduce: Every | None = None,
    validation: float | tuple[Tensor, Tensor] | None = None,
    progress: bool = True,
    start: Posterior | None = None,
) -> Fit:
    r"""Fits `guide` to the posterior of `program` given the data by stochastic variational inference, and returns a `Fit`.

    Minimised is the mean over mini-batches of −(E_q[log p(y|θ)] − T·KL(q‖p))/N, which has the optimum of the negative ELBO of the posterior
    ∝ p(y|θ)^{1/T} p(θ) and the step size of ordinary training. N comes from the data, through the plate; KL is never weighted by hand.

    Args:
        program: called as `program(x, y)`. Its observed site may stand in a plate of the batch's rows, or of N rows subsampled, or in none.
        data: (x, y), or anything with `x_train` and `y_train`. They follow the parameters of a program that is a module in device and dtype.
        guide: `MeanField`, `Point` (maximum a posteriori), any function of the program that makes a guide module, such as Pyro's `AutoNormal`, or
            such a module, which is copied. A hand-written guide function with `pyro.param` is trained by Pyro's SVI; see `Posterior.from_guide`.
        optimizer: parameters → torch optimiser, or `natural_gradient()`. Default: Adam at 3e-3, fused.
        scheduler: (optimiser, number of steps) → schedule, stepped after each step; None for a constant rate. Default: `cosine`.
        seed: of everything random: order of the data and draws are functions of (seed, epoch) and (seed, step).
        temperature: T above; 1 is Bayes, less is "cold": data counted N/T times.
        reduce: reductions during the fit; none before the first 300 steps (or 0.3 of a shorter fit), in which empirical scales stay at their start too.
        validation: the fraction of the rows to hold out, or (x, y), scored after each epoch.
        progress: show a bar with both terms of the ELBO.
        start: a posterior of the same program to begin at, its masks in force and the scales of its Gaussian priors held; for `MeanField`.

    Raises:
        DataError: rows disagree, values are not finite or outside the observed site's support.
        FitError: an argument is out of range, or a loss or gradient is no longer finite (with the step and the sites).
    """
    x, y = data if isinstance(data, tuple) else (data.x_train, data.y_train)
    check_arguments(epochs, batch_size, temperature)
    check_rows(x, y)
    x, y = (like_program(program, t) for t in (x, y))
    (x, y), held_out = validation_split(x, y, validation, seed)
    if held_out is not None:
        held_out = (like_program(program, held_out[0]), like_program(program, held_out[1]))
        check_callable_without_y(program, x)
    program = copy.deepcopy(program) if isinstance(program, nn.Module) else program
    clock = time.perf_counter()
    with torch.random.fork_rng(), pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        _seed(x.device, seed)
        run = _Run(program, guide, x, y, batch_size, temperature, seed)
        if start is not None:
            run.begin(start)
        optimizer_ = run.optimizer(optimizer or adam())
        per_epoch = len(run.sizes())
        total = epochs * per_epoch
        scheduler_ = scheduler(optimizer_, total) if scheduler else None
        warm_up = min(_WARM_UP_STEPS, _WARM_UP_FRACTION * total)
        due = {step for step in reduce.steps(total, per_epoch) if step >= warm_up} if reduce else set()
        if reduce and not (due and run.has_variance):
            why = f"none falls between the warm-up ({math.ceil(warm_up)} steps) and the end ({total} steps)" if not due else "a point estimate has no variance"
            raise FitError(f"{reduce}: no reduction can be made, {why}; fit longer, raise stop, reduce more often, or use MeanField")
        rows, step, delta_f, reduction_seconds = [], 0, 0.0, 0.0
        with tqdm(total=total, disable=not progress, unit="step", leave=False) as bar:
            for epoch in range(1, epochs + 1):
                likelihood_sum = kl_sum = 0.0
                for batch in run.batches(seed, epoch):
                    step += 1
                    _seed(x.device, seed * 1_000_003 + step)
                    terms = run.step(optimizer_, batch, step)
                    if scheduler_:
                        scheduler_.step()
                    likelihood_sum, kl_sum = likelihood_sum + terms[0], kl_sum + terms[1]
                    if step in due or step % per_epoch == 0:
                        began = time.perf_counter()
                        if step >= warm_up:
                            run.update_scales()
                        if reduce and step in due:
                            delta_f += run.prune(reduce, step / total, optimizer_)
                        reduction_seconds += time.perf_counter() - began
                    bar.update()
                likelihood, kl = likelihood_sum / per_epoch, kl_sum / per_epoch
                row = {
                    "epoch": epoch,
                    "step": step,
                    "expected_log_likelihood": likelihood,
                    "kl": kl,
                    "elbo": likelihood / temperature - kl,
                    "kept": run.kept(),
                    "delta_f": delta_f,
                    "learning_rate": optimizer_.param_groups[0]["lr"],
                }
                if held_out is not None:
                    prediction = predict(run.program, run.posterior(), held_out[0], draws=0)
                    row["validation_nll"] = -float(prediction.log_prob(held_out[1]).mean())
                rows.append(row)
                bar.set_postfix(ell=f"{likelihood:.4g}", kl=f"{kl:.4g}", kept=f"{row['kept']:.3g}")
        posterior = run.posterior()
    if isinstance(program, nn.Module):
        program.eval()
    return Fit(
        posterior, program, run.guide, run.masks, run.empirical.scales, pd.DataFrame(rows), time.perf_counter() - clock, reduction_seconds, seed, temperature
    )


class _Run:
    """The state of a fit: program, guide, handlers, masks."""

    def __init__(self, program: Program, guide: Program, x: Tensor, y: Tensor, batch_size: int, temperature: float, seed: int) -> None:
        self.program, self.x, self.y, self.temperature = program, x, y, temperature
        self.batch_size = min(batch_size, len(x))
        self.masks: dict[str, Tensor] = {}
        self.hold_scales = False
        self.empirical = EmpiricalScales()
        self.few = (x[: min(len(x), 8)], y[: min(len(x), 8)])
        self.whole = WholeData(len(x), len(self.few[0]))
        self.scaled = self.empirical(self.whole(program))
        _set_training(program, False)
        check_program(program, self.few, y)
        self.guide: Any = _make_guide(guide, program, self.few)
        self.guide(*self.few)  # autoguides make their parameters at the first call
        self.masked = Masked({})
        self.flat: MeanFieldStep | None = None
        self.trained = self.parameters()  # whose gradients a step clears and checks
        if isinstance(self.guide, MeanField) and self.guide.estimator == "weight":
            self.flat = MeanFieldStep(self.scaled, self.guide, len(x), temperature, seed, cast(Network, program) if hasattr(program, "plain_weights") else None)
            self.trained = [p for p in self.trained if p is not self.guide.loc and p is not self.guide.log_scale]
            self.masks = _masks_of(self.scaled, self.guide, self.few)
            self.flat.prune(self.masks)
        self.has_variance = any(bool(site.var.any()) for site in self.posterior().sites.values())  # also refuses guides that cannot be read

    @torch.no_grad()
    def begin(self, start: Posterior) -> None:
        """Puts moments, masks and Gaussian priors of `start` in force; the priors stay as they are."""
        if not isinstance(self.guide, MeanField):
            raise FitError(f"start: only MeanField can begin at a posterior, the guide is {type(self.guide).__name__}")
        locs, log_scales = self.guide.views(self.guide.loc), self.guide.views(self.guide.log_scale)
        if {name: tuple(loc.shape) for name, loc in locs.items()} != {name: tuple(site.mean.shape) for name, site in start.sites.items()}:
            raise FitError(f"start: its sites ({', '.join(start)}) and their shapes must be those of the program ({', '.join(locs)})")
        for name, site in start.sites.items():
            living = site.alive & (site.var > 0)
            locs[name].copy_(site.mean)
            log_scales[name].copy_((0.5 * site.var.log()).where(living, log_scales[name]))
        self.masks = dict(start.masks)
        held = {name: site for name, site in start.sites.items() if isinstance(site.declared, Gaussian) and site.prior is not None}
        self.empirical.scales = {name: collapsed(site.prior.var).sqrt() for name, site in held.items() if site.prior is not None}
        self.hold_scales = True
        if self.flat is not None:
            self.flat.prune(self.masks)

    def parameters(self) -> list[Tensor]:
        modules = [m for m in (self.guide, self.program) if isinstance(m, nn.Module)]
        return [p for m in modules for p in m.parameters() if p.requires_grad]

    def optimizer(self, make: Callable[[Any], Optimizer] | NaturalGradient) -> Optimizer:
        if not isinstance(make, NaturalGradient):
            return make(self.parameters())
        if self.flat is None:
            raise FitError(
                f'optimizer=natural_gradient(): it needs guide=MeanField with estimator="weight", got {type(self.guide).__name__}; '
                "give another optimiser, such as adam()"
            )
        rows = len(self.x) / self.temperature
        views = self.guide.views(self.guide.log_scale.detach())
        for name, site in self.posterior().sites.items():
            if site.prior is not None and site.support == "real" and not site.given:
                views[name].fill_(-0.5 * math.log(rows * make.curvature))
        return make.optimizer(self.flat, self.trained)

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).to(self.x.device)
        for index in order.split(self.sizes()):
            yield self.x[index], self.y[index]

    def sizes(self) -> list[int]:
        """Of the batches of an epoch; a single row left over joins the batch before (batch norm cannot take it alone)."""
        full, left = divmod(len(self.x), self.batch_size)
        sizes = [self.batch_size] * full
        if left == 1 and full:
            sizes[-1] += 1
        elif left:
            sizes.append(left)
        return sizes

    def step(self, optimizer: Optimizer, batch: tuple[Tensor, Tensor], step: int) -> tuple[float, float]:
        """Both terms of the ELBO at one draw, after which the optimiser has gone a step down their gradient."""
        self.whole.rows = len(batch[0])
        for parameter in self.trained:
            parameter.grad = None
        if self.flat is not None:
            draw = self.flat.run(batch, step)
            gradients = draw.gradients
            likelihood, kl = draw.expected_log_likelihood, draw.kl
        else:
            terms = self.terms(batch)
            ((self.temperature * terms.kl - terms.expected_log_likelihood) / len(self.x)).backward()
            gradients = {}
            likelihood, kl = float(terms.expected_log_likelihood.detach()), float(terms.kl.detach())
        sums = sum(float(g.sum()) for g in (*gradients.values(), *(p.grad for p in self.trained if p.grad is not None)))
        if not math.isfinite(likelihood + kl + sums):
            raise FitError(self.diagnosis(step, likelihood, kl, gradients))
        if isinstance(optimizer, OnlineNewton):
            optimizer.step(lambda: draw)
        else:
            if self.flat is not None:
                self.flat.write_gradients(draw)
            optimizer.step()
        return likelihood, kl

    def terms(self, batch: tuple[Tensor, Tensor]) -> ELBOTerms:
        if not self.masks or isinstance(self.guide, (MeanField, SiteWise)):
            return elbo_terms(self.scaled, self.guide, *batch, masks=self.masks)
        self.masked.masks = self.masks
        return elbo_terms(self.masked(self.scaled), self.masked(self.guide), *batch)

    def posterior(self) -> Posterior:
        if self.flat is not None:
            self.flat.write_back()
        _set_training(self.program, False)
        posterior = Posterior.from_guide(self.guide, self.empirical(self.program), *self.few, masks=self.masks, temperature=self.temperature)
        _set_training(self.program, True)
        return posterior

    def prune(self, schedule: Every, done: float, optimizer: Optimizer) -> float:
        """Reduces, puts the masks in force, and returns the predicted gain in evidence of what went, nats."""
        reduction = schedule.reduce(self.posterior(), done)
        gain = 0.0
        for name, site in reduction.sites.items():
            mask = reduction.masks[name]
            went = ~mask if name not in self.masks else self.masks[name] & ~mask
            gain += float(site.spike_delta_f[went].sum())
        self.masks = {**self.masks, **reduction.masks}
        if self.flat is not None:
            self.flat.prune(self.masks, optimizer)
        return gain

    def update_scales(self) -> None:
        if self.hold_scales:
            return
        for name, site in self.posterior().sites.items():
            if self.has_variance and isinstance(site.declared, Gaussian) and site.declared.scale == "empirical":
                self.empirical.update(name, site.declared, site.mean, site.var, site.mask)
        if self.flat is not None:
            self.flat.forget()

    def kept(self) -> float:
        return sum(int(m.sum()) for m in self.masks.values()) / sum(m.numel() for m in self.masks.values()) if self.masks else 1.0

    def diagnosis(self, step: int, likelihood: float, kl: float, gradients: Mapping[str, Tensor]) -> str:
        named = dict(gradients)
        if self.flat is not None:
            named |= {f"{name} ": (self.flat.loc[part] + self.flat.log_scale[part]).detach() for name, part in self.flat.parts.items()}
        elif isinstance(self.guide, Point):
            named |= {
                f"{name} ": part for name, part in zip((s.name for s in self.guide.latents), self.guide.loc.detach().split(self.guide.sizes), strict=True)
            }
            if self.guide.loc.grad is not None:
                named |= dict(zip((s.name for s in self.guide.latents), self.guide.loc.grad.split(self.guide.sizes), strict=True))
        for module in (self.guide, self.program) if not isinstance(self.guide, (MeanField, Point)) else (self.program,):
            if isinstance(module, nn.Module):
                named |= {name: p.detach() if p.grad is None else p.grad + p.detach() for name, p in module.named_parameters()}
        bad = {name.strip() for name, values in named.items() if not bool(values.isfinite().all())}
        where = ", ".join(sorted(bad)) or "the observed site"
        return (
            f"step {step}: the loss or its gradient is not finite at {where} (expected log likelihood {likelihood:.6g}, KL {kl:.6g}); "
            "lower the learning rate, or check the scale of the data and of the priors"
        )


def _make_guide(guide: Program, program: Program, few: tuple[Tensor, Tensor]) -> Program:
    if isinstance(guide, nn.Module):
        return copy.deepcopy(guide)
    takes_batch = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(guide).parameters.values())  # MeanField(program, *batch), AutoNormal(program)
    return guide(program, *few) if takes_batch else guide(program)


def _masks_of(program: Program, guide: MeanField, few: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The masks of a program under `Masked`."""
    starts = {latent.name: latent.start if latent.transform is None else latent.transform(latent.start) for latent in guide.latents}
    with torch.no_grad(), Values(starts) as run:
        program(*few)
    bases = {name: base_distribution(msg["fn"]) for name, msg in run.latent.items()}
    return {name: base.alive for name, base in bases.items() if hasattr(base, "alive")}


def _seed(device: torch.device, seed: int) -> None:
    """Seeds the default generator of `device` (torch.manual_seed also records a stack trace per call for devices that are not there)."""
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(seed)


def _set_training(program: Program, on: bool) -> None:
    if isinstance(program, nn.Module):
        program.train(on)
