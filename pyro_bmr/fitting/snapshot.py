"""What of a fit a checkpoint holds, and how a fit continues from it.

Owns `snapshot`, `resumed` and `fit_settings`. Next: `timetable.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyro_bmr.errors import FitError
from pyro_bmr.fitting.arguments import Arguments
from pyro_bmr.fitting.checkpoint_file import digest
from pyro_bmr.fitting.checkpoints import CheckpointWriter
from pyro_bmr.fitting.progress import Progress
from pyro_bmr.fitting.run import Run, tensors_of
from pyro_bmr.fitting.settings import description, differences, in_short, refuse_hidden_state
from pyro_bmr.fitting.timetable import Timetable
from pyro_bmr.isolation import generator_of, seed_generator
from pyro_bmr.networks.modes import set_training
from pyro_bmr.tracing import Values, likelihood_of

# what must be the same when a fit continues, beside what the settings below say of program and data
_GIVEN = ("epochs", "seed", "temperature", "reduce", "start", "shuffle")


def snapshot(run: Run) -> dict[str, Any]:
    """All that the steps so far have changed, but for `Progress`. Order of the data and draws are
    functions of the seed, the epoch and the step.
    """
    return {
        "tensors": tensors_of(run.guide, run.program),
        "step": run.step.state(),
        "masks": run.masks,
        "scales": run.empirical.scales,
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict() if run.scheduler else None,
        "generator": generator_of(run.rows.device).get_state(),
        "log_likelihood": _log_likelihood(run),
        "faults": run.faults.state(),
        "rows": run.rows.state(),
    }


def resumed(
    run: Run,
    given: Arguments,
    timetable: Timetable,
    writer: CheckpointWriter,
    restore: Callable[[Run, Mapping[str, Any]], None] | None = None,
    of_parts: Mapping[str, Any] | None = None,
) -> Progress:
    """Where the fit stands: at its start, or at the newest checkpoint of the same fit, restored
    into `run`. All processes must have the same arguments, and find the same checkpoint.

    Args:
        restore: takes the state of a checkpoint into a run of another kind.
        of_parts: as `fit_settings` has it.

    Raises:
        FitError: they do not, or the checkpoint is of another fit.
    """
    processes, device = run.processes, run.rows.device
    progress = Progress()
    timetable.begin(progress)
    run.begin_cycle(progress.length)
    if writer.rule is None and processes.size == 1:
        return progress
    settings = fit_settings(run, given, of_parts)
    to_agree = {key: value for key, value in settings.items() if key != "environment"}
    processes.check_arguments(to_agree, differences, device)
    saved = writer.latest(settings)
    if saved is not None:
        with writer.restoring():
            progress = Progress(**saved["progress"])
            run.begin_cycle(progress.length)
            (restore or _restore)(run, saved)
    processes.check_equal(
        {"step": torch.tensor([progress.step])},
        device,
        "found another checkpoint than process 0; the folder must be one that all processes see",
    )
    return progress


@torch.no_grad()
def _restore(run: Run, saved: Mapping[str, Any]) -> None:
    """Continues from a checkpoint.

    Raises:
        FitError: the program does not give the log likelihood that it gave when the state was
            saved.
    """
    device, state = run.rows.device, saved["run"]
    run.masks, run.empirical.scales = (
        {name: t.to(device) for name, t in state[key].items()} for key in ("masks", "scales")
    )
    run.step.prune(run.masks, run.optimizer)
    run.optimizer.load_state_dict(state["optimizer"])
    if run.scheduler:
        run.scheduler.load_state_dict(state["scheduler"])
    for name, tensor in tensors_of(run.guide, run.program).items():
        tensor.copy_(state["tensors"][name])
    run.step.restore(state["step"])
    run.faults.restore(state["faults"])
    run.rows.restore(state.get("rows", {}))
    was, now = state["log_likelihood"], _log_likelihood(run)
    if not math.isclose(was, now, rel_tol=1e-4, abs_tol=1e-4):
        raise FitError(
            "the program has changed: at its checkpoint the log likelihood of the first rows was"
            f" {was:.6g}, now it is {now:.6g}; fit anew"
        )
    generator_of(device).set_state(state["generator"])


def fit_settings(
    run: Run, given: Arguments, of_parts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All that must be the same when a fit continues, and in ``environment`` what must be for the
    result to be the same to the bit. `of_parts`: what is said of the sites and of the guide, if a
    process has parts of them.

    Raises:
        FitError: an optimiser or a schedule that keeps state where it cannot be saved.
    """
    refuse_hidden_state(run.optimizer, run.scheduler)
    kind = getattr(run.optimizer, "kind", type(run.optimizer))
    groups = [
        {key: description(value) for key, value in group.items() if key != "params"}
        for group in run.optimizer.param_groups
    ]
    schedule = run.scheduler.state_dict() if run.scheduler is not None else {}
    sites = of_parts or {"sites": _site_settings(run), "guide": description(run.guide)}
    found = {
        "program": description(run.program),
        **sites,
        "data": {
            name: in_short(name, value) if isinstance(value, torch.Tensor) else value
            for name, value in run.rows.described().items()
        },
        "optimizer": {"type": description(kind), "groups": groups},
        "scheduler": {"type": description(type(run.scheduler)), **description(schedule)},
        "batch_size": description(run.rows.batch_size),
        **{name: description(getattr(given, name)) for name in _GIVEN},
        "environment": {
            "torch": torch.__version__,
            "pyro_bmr": importlib.metadata.version("pyro_bmr"),
            "threads": torch.get_num_threads(),
            "processes": run.processes.size,
            "device": str(run.rows.device),
            "processor": platform.machine(),
        },
    }
    return dict(json.loads(json.dumps(found)))


def _site_settings(run: Run) -> dict[str, Any]:
    """Shape, dtype, support and prior of each site."""
    sites = {}
    for name, site in run.posterior().sites.items():
        prior = description(site.declared)
        if site.declared is None and site.prior is not None and not site.given:
            prior = digest({"mean": site.prior.mean, "var": site.prior.var})
        sites[name] = {
            "shape": list(site.mean.shape),
            "dtype": str(site.mean.dtype),
            "support": site.support,
            "prior": prior,
        }
    return sites


@torch.no_grad()
def _log_likelihood(run: Run) -> float:
    """The log likelihood of the first rows at the posterior's point: a program that has changed
    gives another.
    """
    device = run.rows.device
    point, example = run.posterior().point(), run.example
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed_generator(device, 0)
        set_training(run.program, False)
        run.full_data.rows = len(example[1])
        with Values(point) as seen:
            run.scaled(*example)
        set_training(run.program, True)
    return float(likelihood_of(seen))
