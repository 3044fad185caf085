"""`fit`: the one training loop. Any Pyro program, any guide, any torch optimiser; reductions during
the fit if asked.

Owns `fit` and its result `Fit`. `loop.py` has the loop, `run.py` what it changes, `descent.py` one
step of it, and `progress.py` where it stands. Next: `refit.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_bmr.data.given import columns_in
from pyro_bmr.errors import warn
from pyro_bmr.fitting.arguments import Arguments, Program
from pyro_bmr.fitting.checkpoints import Checkpoints, CheckpointWriter
from pyro_bmr.fitting.convergence import UntilConverged
from pyro_bmr.fitting.loop import bar_of, run_steps
from pyro_bmr.fitting.lost_likelihood import lost_likelihood
from pyro_bmr.fitting.natural_gradient import NaturalGradient
from pyro_bmr.fitting.optimizers import adam, cosine
from pyro_bmr.fitting.rows import rows_of
from pyro_bmr.fitting.run import Run
from pyro_bmr.fitting.snapshot import resumed, snapshot
from pyro_bmr.fitting.timetable import Timetable
from pyro_bmr.guides import MeanField
from pyro_bmr.isolation import isolated
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.networks.plain_module import module_copy
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.pruning import Every

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Fit:
    """What a fit leaves behind.

    `posterior`: the moments, masks in force. `program`: the fitted program (a trained copy if it is
    a module; the argument is never changed). `guide`: the trained guide. `masks`: site → bool
    tensor, empty without reductions. `scales`: site → empirical prior scale. `history`: one row per
    epoch — epoch, step, skipped (steps, so far), expected_log_likelihood, kl, elbo (nats per data
    set, the likelihood divided by the temperature in elbo), kept (of the reduced sites' entries),
    delta_f (predicted gain in evidence of all that was pruned so far, nats), learning_rate and,
    with a validation split, validation_nll (nats per row, at the posterior's point).
    `reduction_seconds` are part of `seconds`. `converged`: whether the bound no longer rose by more
    than its noise, and `convergence`, what was looked at, are those of `UntilConverged`.
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
    converged: bool
    convergence: str

    def __repr__(self) -> str:
        last = self.history.iloc[-1]
        said = [f"{int(last['step']):,} steps", f"elbo {last['elbo']:.6g} nats"]
        said += ["converged" if self.converged else "not converged", f"{self.seconds:.1f} s"]
        return f"Fit({', '.join(said)}, {self.posterior!r})"


@isolated(autocast=True, steps=True)
def fit(
    program: Program,
    data: Any,
    *,
    guide: Program = MeanField,
    epochs: int | UntilConverged | None = None,
    batch_size: int = 128,
    optimizer: Callable[[Any], Optimizer] | NaturalGradient | None = None,
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = cosine,
    seed: int = 0,
    temperature: float = 1.0,
    reduce: Every | None = None,
    validation: Any = None,
    progress: bool = True,
    start: Posterior | None = None,
    checkpoint: str | Path | Checkpoints | None = None,
    skip_faulty: int = 0,
    shuffle: bool = True,
    size: int | None = None,
) -> Fit:
    r"""Fits `guide` to the posterior of `program` given the data by stochastic variational
    inference, and returns a `Fit`.

    The loss is the mean over mini-batches of −(E_q[log p(y|θ)] − T·KL(q‖p))/N. It has the optimum
    of the negative ELBO of the posterior ∝ p(y|θ)^{1/T} p(θ), and steps of the size of ordinary
    training. N comes from the data, through the plate; you never weight the KL by hand. Under
    `torch.autocast` the layers of the network compute in its lower precision. Weights, densities
    and the posterior keep their own precision.

    Args:
        program: called as `program(x, y)`. Its observed site may stand in a plate of the batch's
            rows, or of N rows subsampled, or in none. It is fitted in training mode. A part of a
            module that is in evaluation mode beside layers that are not, such as a frozen
            backbone, remains in that mode.
        data: (x, y) of tensors, arrays or tables; anything with `x_train` and `y_train`; a data
            set or a loader of torch; or an iterable of batches, with `size`. x may be a tuple or a
            dict of tensors. If the program is a module, rows are moved to the device and the dtype
            of its parameters (docs/bring_your_data.md).
        guide: `MeanField`, `Point` (maximum a posteriori), any function of the program that makes a
            guide module, such as Pyro's `AutoNormal`, or such a module, which is copied. Train a
            hand-written guide function with `pyro.param` by Pyro's SVI; see
            `Posterior.from_guide`.
        epochs: how often each row is seen. None (default): the fit finds out itself when it is
            done, within 16,000 steps; `UntilConverged` says how, and takes another budget. A fit
            that has not converged warns, with a number of epochs too; see `Fit.converged`.
        optimizer: parameters → torch optimiser, or `natural_gradient()`. Default: Adam at 3e-3,
            fused, which takes every guide. The natural gradient is for `MeanField` and needs fewer
            steps (docs/convergence.md).
        scheduler: (optimiser, number of steps) → schedule, stepped after each step; None for a
            constant rate. Default: `cosine`. It is made anew for each cycle (`UntilConverged`).
        seed: of everything random. The order of the data is a function of (seed, epoch), and the
            draws are functions of (seed, step).
        temperature: T above; 1 is Bayes, less is "cold": the data count N/T times. By default 1, at
            which the ELBO bounds the log evidence. Classes are often predicted better at 0.1 or
            0.3; `compare` and ``pyro-bmr fit`` choose between these on held-out rows.
        reduce: reductions during the fit. There is none in the first 300 steps (or 0.3 of a shorter
            fit), in which empirical scales keep their start values as well.
        validation: the rows to hold out, scored after each epoch: as `data`, or a fraction of the
            data, drawn at random, or the last rows without `shuffle`.
        progress: show a bar with both terms of the ELBO.
        start: a posterior of the same program to begin at, for `MeanField`. Its masks are in force,
            and the scales of its Gaussian priors do not change.
        checkpoint: a folder, or `Checkpoints(folder, ...)`, in which the fit is saved as it runs.
            After a kill, a crash or Ctrl-C the same call continues from there, and its result is
            the same bit for bit as without the stop (docs/guarantees.md).
        skip_faulty: how many faulty steps may be skipped; the history counts them. A step is faulty
            if the loss or its gradient is not finite, or if the expected log likelihood falls by
            twenty of its recent standard deviations. One more stops the fit. On a GPU with 0, steps
            are looked at sixteen at a time: those after a faulty one are taken, and not saved.
        shuffle: whether the rows are mixed again in each epoch, if a batch is not all of them. Give
            False for a series: batches are then stretches of it, in order.
        size: N, the number of rows of the data, for a loader or an iterable that does not tell it.

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

    make = adam() if optimizer is None else optimizer
    length = UntilConverged() if epochs is None else epochs
    given = Arguments(
        program, guide, length, batch_size, make, scheduler, seed, temperature, reduce, start,
        skip_faulty, shuffle,
    )  # fmt: skip
    rows = rows_of(given, data, validation, size)
    is_first = rows.processes.rank == 0
    writer = CheckpointWriter(checkpoint, writes=is_first)
    clock = time.perf_counter()
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        run = Run(_copy(program, columns_in(data)), rows, given)
        masks_before = dict(run.masks)
        timetable = Timetable.of(run, given)
        state = resumed(run, given, timetable, writer)
        clock -= state.seconds
        with writer.interrupts(), bar_of(timetable, state, progress and is_first) as bar:
            run_steps(run, timetable, state, writer, bar, clock, partial(snapshot, run))
        posterior = run.finish()
    if is_first:
        said = [timetable.caution(state)]
        if reduce:
            numbers = rows.size * run.example[1][0].numel()
            lost = lost_likelihood(state.history, numbers, reduce.kept)
            said = [*reduce.cautions(masks_before, posterior), lost, *said]
        for message in filter(None, said):
            warn(message)
    history, seconds = pd.DataFrame(state.history), time.perf_counter() - clock
    found = run.program, run.guide, run.masks, run.empirical.scales, history
    times = seconds, state.reduction_seconds
    return Fit(posterior, *found, *times, seed, temperature, state.converged, state.convergence)


def _copy(program: Program, columns: tuple[str, ...] | None) -> Program:
    """The program that is trained: a copy if it is a module."""
    if isinstance(program, BayesianNetwork):
        copied = program.copy()
        copied.columns = columns
        return copied
    return module_copy(program) if isinstance(program, nn.Module) else program
