"""`sharded_fit`: a fit whose posterior no process holds whole.

Owns `sharded_fit` and its result `ShardedFit`. The loop is that of `fit`. Next: `exporting/`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_bmr.checks import is_whole
from pyro_bmr.data.given import columns_in
from pyro_bmr.errors import FitError, described, warn
from pyro_bmr.fitting.arguments import Arguments
from pyro_bmr.fitting.batches import device_of
from pyro_bmr.fitting.checkpoints import Checkpoints
from pyro_bmr.fitting.convergence import UntilConverged
from pyro_bmr.fitting.loop import bar_of, run_steps
from pyro_bmr.fitting.natural_gradient import NaturalGradient
from pyro_bmr.fitting.optimizers import adam, cosine
from pyro_bmr.fitting.processes import Processes
from pyro_bmr.fitting.progress import Progress
from pyro_bmr.fitting.rows import rows_of
from pyro_bmr.fitting.snapshot import resumed
from pyro_bmr.fitting.timetable import Timetable
from pyro_bmr.guides import MeanField
from pyro_bmr.guides.row_noise import PER_STEP
from pyro_bmr.isolation import isolated
from pyro_bmr.likelihoods import Bernoulli, Categorical, Poisson
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.pruning import Every
from pyro_bmr.sharding.layers import ShardedLayers
from pyro_bmr.sharding.sharded_checkpoints import (
    ShardedWriter,
    restored,
    sharded_settings,
    sharded_snapshot,
)
from pyro_bmr.sharding.sharded_guide import check_priors
from pyro_bmr.sharding.sharded_posterior import ShardedPosterior
from pyro_bmr.sharding.sharded_run import ShardedRun, check_schedule

if TYPE_CHECKING:
    import pandas as pd

_TORCH = (2, 9)  # whose distributed checkpoints are safetensors with a part in each file
# whose targets have no spread that a temperature would make too small
_WITHOUT_SPREAD = (Bernoulli, Categorical, Poisson)


@dataclass(frozen=True, repr=False)
class ShardedFit:
    """What a sharded fit leaves behind; every process has one, with its part.

    `posterior`: a `ShardedPosterior`. `program`: the network, its lifted parameters shared out, its
    other parameters trained. `scales`: site → empirical prior scale. `history`, `seconds`,
    `reduction_seconds`, `seed`, `temperature`, `converged` and `convergence` are those of `Fit`.
    """

    posterior: ShardedPosterior
    program: BayesianNetwork
    scales: dict[str, Tensor]
    history: pd.DataFrame
    seconds: float
    reduction_seconds: float
    seed: int
    temperature: float
    converged: bool
    convergence: str

    def whole_program(self, program: BayesianNetwork) -> BayesianNetwork:
        """A copy of `program`, which was fitted, with the point estimates and the buffers of this
        fit: what `predict` and `export` take with `posterior.gathered()`.
        """
        whole, lifted = program.copy(), {f"net.{name}" for name in program.priors}
        state = self.program.state_dict()
        own = {name: value.clone() for name, value in state.items() if name not in lifted}
        whole.load_state_dict(own, strict=False, assign=True)
        whole.columns = self.program.columns
        return whole.eval()

    def __repr__(self) -> str:
        last = self.history.iloc[-1]
        said = [f"{int(last['step']):,} steps", f"elbo {last['elbo']:.6g} nats"]
        said += ["converged" if self.converged else "not converged", f"{self.seconds:.1f} s"]
        return f"ShardedFit({', '.join(said)}, {self.posterior!r})"


@isolated(autocast=True, steps=True)
def sharded_fit(
    program: BayesianNetwork,
    data: Any,
    *,
    mesh: DeviceMesh | None = None,
    epochs: int | UntilConverged | None = None,
    batch_size: int = 128,
    optimizer: Callable[[Any], Optimizer] | NaturalGradient | None = None,
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = cosine,
    seed: int = 0,
    temperature: float = 1.0,
    reduce: Every | None = None,
    estimator: str = "weight",
    micro_batches: int = 1,
    progress: bool = True,
    checkpoint: str | Path | Checkpoints | None = None,
    skip_faulty: int = 0,
    shuffle: bool = True,
    size: int | None = None,
) -> ShardedFit:
    r"""Fits `MeanField` to the posterior of a network as `fit` does, in a process group in which
    each process has its part of the means, the standard deviations, the noise and the state of the
    optimiser. Every process calls it with the same arguments.

    A draw of the weights is gathered layer by layer, in the forward and in the backward pass, and
    freed after each; gradients are summed and each process gets its part (`fully_shard` of torch).
    Each process runs its rows of a batch at the same draw. So the fit is one process's fit of the
    same global batch, but for the order of sums and the random numbers: equal in law, and equal to
    the bit between two runs with the same processes.

    Args:
        program: a `BayesianNetwork` whose priors are `Gaussian` with one scale for each tensor:
            a number, "empirical" or "layer". A network on the device "meta" gets its start values
            layer by layer, from its `reset_parameters` and `seed`, so that no process ever holds
            all of it.
        mesh: the processes; by default all of the group, in one row. With two axes, the last one
            shares out the weights and the first holds copies of them; all take rows of their own.
        estimator: "weight" or "antithetic", as in `MeanField`.
        micro_batches: parts of a process's rows of a batch that run one after the other, for which
            activations need less memory. Their gradients are added up, so the step is the same but
            for the order of sums and for running means of batch norms. Each part gathers the layers
            and sums the gradients anew.
        checkpoint: as in `fit`; each process writes its part. The same call continues from there,
            to the bit with the same number of processes, and in law with another one. All
            processes must see the folder.

    The other arguments are those of `fit`. There are no held-out rows here.

    Raises:
        FitError: there is no process group; a prior, a likelihood or a schedule is not known to
            sharded fits; or as `fit`.

    Example:
        >>> torch.distributed.init_process_group("nccl")
        >>> with torch.device("meta"):
        ...     net = LargeNetwork()
        >>> fit = sharded_fit(BayesianNetwork(net, Gaussian(), Categorical()), data)
        >>> fit.posterior.reduce(Gaussian(scale=0)).kept
    """
    make = adam() if optimizer is None else optimizer
    length = UntilConverged() if epochs is None else epochs
    _check(program, mesh, reduce, temperature, estimator)
    if not is_whole(micro_batches, 1):
        raise FitError(
            f"micro_batches: expected a whole number of 1 or more, got {described(micro_batches)}"
        )
    if mesh is None:
        mesh = init_device_mesh(_device_type(program), (dist.get_world_size(),))
    clock = time.perf_counter()
    layers = ShardedLayers(_started_alike(program, columns_in(data)), mesh, seed)
    given = Arguments(
        layers.network, MeanField, length, batch_size, make, scheduler, seed, temperature, reduce,
        None, skip_faulty, shuffle,
    )  # fmt: skip
    rows = rows_of(given, data, None, size)
    writer = ShardedWriter(checkpoint, layers.layout)
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        run = ShardedRun(layers, rows, given, estimator, micro_batches)
        timetable = Timetable.of(run, given)
        state = resumed(run, given, timetable, writer, restored, sharded_settings(run))
        clock -= state.seconds
        shown = progress and run.processes.rank == 0
        with writer.interrupts(), bar_of(timetable, state, shown) as bar:
            run_steps(run, timetable, state, writer, bar, clock, partial(sharded_snapshot, run))
        posterior = run.finish()
    caution = timetable.caution(state)
    if run.processes.rank == 0 and caution:
        warn(caution)
    return _result(run, posterior, state, time.perf_counter() - clock, given)


def _result(
    run: ShardedRun, posterior: ShardedPosterior, state: Progress, seconds: float, given: Arguments
) -> ShardedFit:
    import pandas as pd

    return ShardedFit(
        posterior,
        run.layers.network,
        run.empirical.scales,
        pd.DataFrame(state.history),
        seconds,
        state.reduction_seconds,
        given.seed,
        given.temperature,
        state.converged,
        state.convergence,
    )


def _check(
    program: Any,
    mesh: DeviceMesh | None,
    reduce: Every | None,
    temperature: float,
    estimator: str,
) -> None:
    """Raises FitError unless a sharded fit can be made."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < _TORCH:
        raise FitError(
            f"sharded_fit: expected torch {'.'.join(map(str, _TORCH))} or newer, got"
            f" {torch.__version__}; install a newer one, or use fit"
        )
    if not (dist.is_available() and dist.is_initialized()):
        raise FitError(
            "sharded_fit: expected a process group, got none; call"
            " torch.distributed.init_process_group(...) in each process, which torchrun starts"
        )
    if not isinstance(program, BayesianNetwork):
        raise FitError(
            f"program: a sharded fit expects a BayesianNetwork, got {described(program)}; make the"
            " network one, or use fit"
        )
    if mesh is not None and (mesh.size() != dist.get_world_size() or mesh.ndim > 2):
        raise FitError(
            f"mesh: expected one or two axes with all {dist.get_world_size()} processes of the"
            f" group, got the shape {tuple(mesh.shape)}"
        )
    check_priors(program)
    check_schedule(reduce)
    if estimator not in PER_STEP:
        raise FitError(
            f"estimator={described(estimator)}: a sharded fit expects one of"
            f" {', '.join(map(repr, PER_STEP))}; give one of them, or use fit"
        )
    if temperature != 1 and not isinstance(program.likelihood, _WITHOUT_SPREAD):
        raise FitError(
            f"temperature={temperature!r}: a sharded fit expects 1 under"
            f" {described(program.likelihood)}, whose targets may have a spread that is inferred"
        )


def _started_alike(program: BayesianNetwork, columns: tuple[str, ...] | None) -> BayesianNetwork:
    """The program with the values that it has in the first process; a copy."""
    copied = program.copy()
    copied.columns = columns
    own = (*copied.parameters(), *copied.buffers())
    Processes().copy_from_first(tensor for tensor in own if not tensor.is_meta)
    return copied


def _device_type(program: BayesianNetwork) -> str:
    """The kind of device of the fit: that of the network, or what torch has if it is on "meta"."""
    kind = device_of(program).type
    if kind != "meta":
        return kind
    return "cuda" if torch.cuda.is_available() else "cpu"
