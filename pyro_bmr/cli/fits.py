"""The command for one fit, `pyro-bmr fit`.

Next: `networks.py`, what is done with a fit.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyro_bmr.cli.grids import set_threads, shows_progress
from pyro_bmr.cli.scoring import listed, scored
from pyro_bmr.data.data_set import Data
from pyro_bmr.data.named import load
from pyro_bmr.errors import ModelError
from pyro_bmr.experiments.held_out import Trials
from pyro_bmr.experiments.models import cell_device, default_model, load_model, on_device
from pyro_bmr.experiments.recipe import for_route, trials_of
from pyro_bmr.experiments.runs import check_run_folder, save_run
from pyro_bmr.experiments.settings import (
    AUTO,
    Settings,
    epochs_between_reductions,
    guide_named,
    length_of,
    optimizer_named,
)
from pyro_bmr.experiments.temperature_trials import at_scale
from pyro_bmr.fitting.checkpoints import Checkpoints
from pyro_bmr.fitting.convergence import NOT_CONVERGED, UntilConverged
from pyro_bmr.fitting.fit import Fit, fit
from pyro_bmr.fitting.processes import process_group
from pyro_bmr.guides import Point
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.prediction.predict import predict
from pyro_bmr.priors.names import prior_from_name
from pyro_bmr.pruning import Every

_NO_SETTINGS = ("run", "out", "quiet", "threads", "draws", "resume", "checkpoint_seconds")


@dataclass(frozen=True)
class _Fitted:
    """What is needed of a sharded fit, gathered."""

    posterior: Posterior
    program: BayesianNetwork
    temperature: float
    seconds: float


def fit_run(arguments: argparse.Namespace) -> int:
    """Fits a network, saves it as a run and prints its scores."""
    set_threads(arguments.threads)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if cell_device(arguments.device) and (arguments.shard or processes > 1):
        raise ModelError(
            f"--device {arguments.device}: expected one process and no --shard, got {processes}"
            " processes; fits in several processes compute on CPUs here, and from Python on GPUs"
        )
    if arguments.optimizer is None:
        usual = Settings(guide=arguments.guide, estimator=arguments.estimator).optimizer
        arguments.optimizer = "adam" if arguments.map else usual
    arguments.learning_rate = optimizer_named(arguments.optimizer, arguments.learning_rate)[1]
    data = load(arguments.data, arguments.target, arguments.likelihood)
    arguments.model = arguments.model or default_model(data)
    route = "map" if arguments.map else "reduced" if arguments.reduce_to else "fitted"
    settings = for_route(_settings(arguments), route, data, _program(arguments, data))
    _schedule(arguments, settings), _guide(arguments)  # what they refuse
    check_run_folder(arguments.out)
    chosen = Trials(1.0, {}, 1.0)
    with process_group(alone=arguments.shard) as rank:
        if settings.temperature == AUTO:
            chosen = trials_of(
                partial(_program, arguments),
                partial(_attempt, arguments),
                data,
                route,
                settings,
                arguments.seed,
                shows_progress(arguments) and rank == 0,
            )
            data, settings = chosen.applied(data, settings)
        result = _fit(arguments, data, settings, chosen.length(data, settings))
    if rank > 0:
        return 0  # the first process has it all
    drawn = {"draws": arguments.draws, "seed": arguments.seed}
    prediction = predict(result.program, result.posterior, data.x_test, **drawn)
    found = scored(at_scale(prediction, chosen.scale), data)
    asked = {name: value for name, value in vars(arguments).items() if name not in _NO_SETTINGS}
    fitted = {
        "temperature": result.temperature,
        "scale": chosen.scale,
        "noise": chosen.noise,
        "trials": {f"{temperature:g}": nll for temperature, nll in chosen.nll.items()},
    }
    save_run(result, arguments.out, {**asked, **fitted, "seconds": result.seconds, **found})
    print(listed(found, data))
    print(
        f"the run is in {arguments.out}; next: pyro-bmr reduce {arguments.out}, pyro-bmr export"
        f" {arguments.out}"
    )
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    names = ("epochs", "batch_size", "optimizer", "learning_rate", "draws", "temperature")
    reductions = ("reduce_every", "kept", "start", "stop")
    return Settings(**{name: getattr(arguments, name) for name in (*names, *reductions)})


def _program(arguments: argparse.Namespace, rows: Data) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(arguments.seed)
        build = on_device(load_model(arguments.model), arguments.device)
        return build(rows, prior_from_name(arguments.prior))


def _fit(
    arguments: argparse.Namespace,
    rows: Data,
    settings: Settings,
    length: UntilConverged | None = None,
    folder: str = "checkpoints",
) -> Fit | _Fitted:
    """The fit that the arguments ask for, with the temperature and the length of `settings`."""
    path, seconds = Path(arguments.out) / folder, arguments.checkpoint_seconds
    epochs = length or length_of(settings.epochs, len(rows.x_train), settings.batch_size)
    apart = epochs_between_reductions(settings, epochs, rows)
    common: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": arguments.batch_size,
        "optimizer": optimizer_named(arguments.optimizer, arguments.learning_rate)[0](),
        "seed": arguments.seed,
        "temperature": float(settings.temperature),
        "reduce": _schedule(arguments, settings, apart),
        "progress": shows_progress(arguments),
        "checkpoint": Checkpoints(path, every_seconds=seconds) if arguments.resume else None,
    }
    program = _program(arguments, rows)
    if not arguments.shard:
        return fit(program, rows, guide=_guide(arguments), **common)
    from pyro_bmr.sharding import sharded_fit

    found = sharded_fit(program, rows, estimator=arguments.estimator, **common)
    whole, posterior = found.whole_program(program), found.posterior.gathered()
    return _Fitted(posterior, whole, found.temperature, found.seconds)


def _attempt(
    arguments: argparse.Namespace,
    rows: Data,
    settings: Settings,
    length: UntilConverged | None,
    fold: int,
) -> tuple[Callable[..., Any], Posterior]:
    """A trial of a temperature, which `--resume` resumes as well. Of another length it is another
    trial: that the fit has another length is for the fit to say.
    """
    name = "-".join(f"{n:g}" for n in (settings.temperature, settings.epochs) if n is not None)
    name += f"-fold-{fold}" if fold else ""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NOT_CONVERGED)
        result = _fit(arguments, rows, settings, length, f"trials/{name}")
    return result.program, result.posterior


def _schedule(
    arguments: argparse.Namespace, settings: Settings, apart: float | None = None
) -> Every | None:
    """The reductions during the fit, `apart` epochs from each other, if any are asked for."""
    if not arguments.reduce_to:
        for option, value, usual in (
            ("kept", arguments.kept, None),
            ("per", arguments.per, "weight"),
        ):
            if value != usual:
                raise ModelError(
                    f"--{option} {value}: expected reductions during the fit; add --reduce-to"
                    " gaussian:0"
                )
        return None
    return Every(
        apart,
        prior_from_name(arguments.reduce_to),
        settings.start,
        kept=settings.kept,
        stop=settings.stop,
        per=arguments.per,
        heads=arguments.heads,
    )


def _guide(arguments: argparse.Namespace) -> Any:
    if arguments.shard and (arguments.map or arguments.guide != "mean-field"):
        other = "--map" if arguments.map else f"--guide {arguments.guide}"
        raise ModelError(f"{other}: --shard has the guide mean-field; leave out one of them")
    if not arguments.map:
        return guide_named(arguments.guide, arguments.optimizer, arguments.estimator)
    if arguments.guide != "mean-field":
        raise ModelError(f"--guide {arguments.guide}: --map has no guide; leave out one of them")
    return Point
