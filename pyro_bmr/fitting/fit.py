"""`fit`: the one training loop. Any Pyro program, any guide, any torch optimiser; reductions during
the fit if asked.

Owns `fit` and its result `Fit`; the state that its steps change is in `run.py`. Next: `refit.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyro
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from tqdm import tqdm

from pyro_bmr.checks import check_rows
from pyro_bmr.data.data_set import validation_split
from pyro_bmr.errors import FitError, described, warn
from pyro_bmr.fitting.arguments import Program, check_arguments, like_program, rows_of
from pyro_bmr.fitting.checkpoints import Checkpoints, CheckpointWriter
from pyro_bmr.fitting.natural_gradient import NaturalGradient
from pyro_bmr.fitting.processes import Processes
from pyro_bmr.fitting.progress import Progress
from pyro_bmr.fitting.run import FitState
from pyro_bmr.fitting.settings import differences
from pyro_bmr.fitting.snapshot import fit_settings, restore, snapshot
from pyro_bmr.guides import MeanField
from pyro_bmr.isolation import give_way, isolated, plain, seed_generator
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.networks.plain_module import module_copy
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.prediction.predict import check_callable_without_y, predict
from pyro_bmr.pruning import Every

if TYPE_CHECKING:
    import pandas as pd

# The data speak first: no empirical scale is set and no weight pruned before this many steps, or
# this part of a shorter fit. Earlier, on small data, scales follow weights that have learned
# nothing yet down to zero, and such weights look superfluous.
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

    `posterior`: the moments, masks in force. `program`: the fitted program (a trained copy if it is
    a module; the argument is never changed). `guide`: the trained guide. `masks`: site → bool
    tensor, empty without reductions. `scales`: site → empirical prior scale. `history`: one row per
    epoch — epoch, step, skipped (steps, so far), expected_log_likelihood, kl, elbo (nats per data
    set, the likelihood divided by the temperature in elbo), kept (of the reduced sites' entries),
    delta_f (predicted gain in evidence of all that was pruned so far, nats), learning_rate and,
    with a validation split, validation_nll (nats per row, at the posterior's point).
    `reduction_seconds` are part of `seconds`.
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
    """The default optimiser: Adam, fused where all parameters are real."""
    return partial(_adam, learning_rate)


def _adam(learning_rate: float, parameters: Any) -> Optimizer:
    parameters = list(parameters)
    return torch.optim.Adam(
        parameters,
        lr=learning_rate,
        fused=not any(isinstance(p, Tensor) and p.is_complex() for p in parameters),
    )


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """The default schedule: the learning rate falls to 0 on half a cosine over the fit."""
    return CosineAnnealingLR(optimizer, T_max=steps)


@isolated(autocast=True, steps=True)
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
    checkpoint: str | Path | Checkpoints | None = None,
    skip_faulty: int = 0,
    shuffle: bool = True,
) -> Fit:
    r"""Fits `guide` to the posterior of `program` given the data by stochastic variational
    inference, and returns a `Fit`.

    Minimised is the mean over mini-batches of −(E_q[log p(y|θ)] − T·KL(q‖p))/N, which has the
    optimum of the negative ELBO of the posterior ∝ p(y|θ)^{1/T} p(θ) and the step size of ordinary
    training. N comes from the data, through the plate; KL is never weighted by hand. Under
    `torch.autocast` the layers of the network compute in its lower precision; weights, densities
    and the posterior keep their own.

    Args:
        program: called as `program(x, y)`. Its observed site may stand in a plate of the batch's
            rows, or of N rows subsampled, or in none. It is fitted in training mode; parts of a
            module that are in evaluation mode beside layers that are not, such as a frozen
            backbone, stay so.
        data: (x, y), or anything with `x_train` and `y_train`. They follow the parameters of a
            program that is a module in device and dtype.
        guide: `MeanField`, `Point` (maximum a posteriori), any function of the program that makes a
            guide module, such as Pyro's `AutoNormal`, or such a module, which is copied. A
            hand-written guide function with `pyro.param` is trained by Pyro's SVI; see
            `Posterior.from_guide`.
        optimizer: parameters → torch optimiser, or `natural_gradient()`. Default: Adam at 3e-3,
            fused.
        scheduler: (optimiser, number of steps) → schedule, stepped after each step; None for a
            constant rate. Default: `cosine`.
        seed: of everything random: order of the data and draws are functions of (seed, epoch) and
            (seed, step).
        temperature: T above; 1 is Bayes, less is "cold": data counted N/T times.
        reduce: reductions during the fit; none before the first 300 steps (or 0.3 of a shorter
            fit), in which empirical scales stay at their start too.
        validation: the fraction of the rows to hold out, at random or without `shuffle` the last
            ones, or (x, y), scored after each epoch.
        progress: show a bar with both terms of the ELBO.
        start: a posterior of the same program to begin at, its masks in force and the scales of its
            Gaussian priors held; for `MeanField`.
        checkpoint: a folder, or `Checkpoints(folder, ...)`, in which the fit is saved as it runs.
            After a kill, a crash or Ctrl-C the same call goes on from there and ends as if never
            stopped, to the bit (docs/guarantees.md).
        skip_faulty: how many steps may be skipped, counted in the history, because the loss or its
            gradient is not finite or the expected log likelihood falls by twenty of its recent
            standard deviations. One more stops the fit.
        shuffle: whether the rows are mixed anew in each epoch, if a batch is not all of them. False
            for a series: batches are stretches of it, in order.

    In a process group of torch.distributed, every process calls `fit` with the same arguments. Each
    takes its part of the rows of a batch and draws noise of its own, gradients are averaged, the
    first process decides reductions and writes checkpoints, and all return the same `Fit`
    (docs/several_processes.md).

    Raises:
        DataError: rows disagree, values are not finite or outside the observed site's support.
        FitError: an argument is out of range, a loss or gradient is no longer finite (with the step
            and the sites), `checkpoint` has another fit, or the processes of a group do not agree,
            or one is gone.
    """
    import pandas as pd

    x, y = map(plain, rows_of(data))
    functions = {
        "program": program,
        "guide": guide,
        "optimizer": adam() if optimizer is None else optimizer,
        "scheduler": cosine if scheduler is None else scheduler,
    }
    check_arguments(
        epochs,
        batch_size,
        temperature,
        seed,
        skip_faulty,
        {k: v for k, v in functions.items() if not isinstance(v, NaturalGradient)},
    )
    for name, value, kind in (("reduce", reduce, Every), ("start", start, Posterior)):
        if value is not None and not isinstance(value, kind):
            raise FitError(
                f"{name}: {kind.__name__}(...) or None is wanted, got {described(value)}"
            )
    check_rows(x, y)
    writer = CheckpointWriter(checkpoint, writes=Processes().rank == 0)
    x, y = (like_program(program, t) for t in (x, y))
    (x, y), held_out = validation_split(x, y, validation, seed, shuffle)
    if held_out is not None:
        held_out = (like_program(program, held_out[0]), like_program(program, held_out[1]))
        check_callable_without_y(program, x)
    if isinstance(program, nn.Module):
        program = program.copy() if isinstance(program, BayesianNetwork) else module_copy(program)
    clock = time.perf_counter()
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        seed_generator(x.device, seed)
        run = FitState(
            program,
            guide,
            x,
            y,
            batch_size,
            temperature,
            seed,
            held_out,
            skip_faulty,
            shuffle,
            split=isinstance(validation, float),
        )
        processes = run.processes
        if start is not None:
            run.begin(start)
        masks_before = dict(run.masks)
        optimizer_ = run.optimizer(optimizer or adam())
        per_epoch = len(run.sizes())
        total = epochs * per_epoch
        scheduler_ = scheduler(optimizer_, total) if scheduler else None
        warm_up = min(_WARM_UP_STEPS, _WARM_UP_FRACTION * total)
        due = (
            {step for step in reduce.steps(total, per_epoch) if step >= warm_up}
            if reduce
            else set()
        )
        if reduce and not (due and run.has_variance):
            why = (
                f"none falls between the warm-up ({math.ceil(warm_up)} steps) and the end ({total}"
                " steps)"
                if not due
                else "a point estimate has no variance"
            )
            raise FitError(
                f"{described(reduce)}: no reduction can be made, {why}; fit longer, raise stop,"
                " reduce more often, or use MeanField"
            )
        if reduce:
            # raises now what would stop the fit at its first reduction
            reduce.reduce(run.posterior(), 0.0)
        state = Progress()
        if checkpoint is not None or processes.size > 1:
            tensors = {"x": x, "y": y} | (
                {}
                if held_out is None
                else {"validation x": held_out[0], "validation y": held_out[1]}
            )
            arguments = {
                "epochs": epochs,
                "batch_size": run.batch_size,
                "seed": seed,
                "temperature": temperature,
                "reduce": reduce,
                "start": start,
            }
            settings = fit_settings(
                run, optimizer_, scheduler_, tensors, **arguments, shuffle=shuffle
            )
            processes.check_arguments(
                {k: v for k, v in settings.items() if k != "environment"}, differences, x.device
            )
            saved = writer.latest(settings)
            if saved is not None:
                with writer.restoring():
                    restore(run, saved["run"], optimizer_, scheduler_)
                    state = Progress(**saved["progress"])
                    clock -= state.seconds
            found = (
                "found another checkpoint than process 0; the folder must be one that all"
                " processes see"
            )
            processes.check_equal({"step": torch.tensor([state.step])}, x.device, found)
        with (
            tqdm(
                total=total,
                initial=state.step,
                disable=not progress or processes.rank > 0,
                unit="step",
                leave=False,
            ) as bar,
            writer.interrupts(),
        ):
            for epoch in range(state.epoch(per_epoch), epochs + 1):
                for batch in run.batches(seed, epoch, state.begin(epoch, per_epoch)):
                    state.step += 1
                    step = state.step
                    seed_generator(x.device, processes.seed(seed) * 1_000_003 + step)
                    run.interrupted = writer.interrupted
                    try:
                        terms = run.take_step(optimizer_, batch, step)
                    except FitError as error:
                        raise FitError(f"{error}{writer.last_good()}") from None
                    if scheduler_:
                        scheduler_.step()
                    state.add(terms)
                    if step in due or step % per_epoch == 0:
                        began = time.perf_counter()
                        if step >= warm_up:
                            run.update_scales()
                        if reduce and step in due:
                            state.delta_f += run.prune(reduce, step / total, optimizer_)
                        run.agree(step)
                        state.reduction_seconds += time.perf_counter() - began
                    stopping = run.interrupted if processes.size > 1 else writer.interrupted
                    if writer.due(step, step == total or stopping) and run.is_finite():
                        state.seconds = time.perf_counter() - clock
                        saved = {
                            "run": snapshot(run, optimizer_, scheduler_),
                            "progress": vars(state),
                        }
                        writer.save(step, saved)
                    if stopping:
                        writer.stop(step)
                    bar.update()
                    give_way()
                likelihood, kl = state.means()
                row = {
                    "epoch": epoch,
                    "step": state.step,
                    "skipped": run.faults.skipped,
                    "expected_log_likelihood": likelihood,
                    "kl": kl,
                    "elbo": likelihood / temperature - kl,
                    "kept": run.kept(),
                    "delta_f": state.delta_f,
                    "learning_rate": optimizer_.param_groups[0]["lr"],
                }
                if held_out is not None:
                    prediction = predict(run.program, run.posterior(), held_out[0], draws=0)
                    row["validation_nll"] = -float(prediction.log_prob(held_out[1]).mean())
                state.history.append(row)
                bar.set_postfix(ell=f"{likelihood:.4g}", kl=f"{kl:.4g}", kept=f"{row['kept']:.3g}")
        del optimizer_, scheduler_
        posterior = run.finish()
    for message in (
        reduce.cautions(masks_before, posterior) if reduce and processes.rank == 0 else ()
    ):
        warn(message)
    if isinstance(program, nn.Module):
        program.eval()
    return Fit(
        posterior,
        program,
        run.guide,
        run.masks,
        run.empirical.scales,
        pd.DataFrame(state.history),
        time.perf_counter() - clock,
        state.reduction_seconds,
        seed,
        temperature,
    )
