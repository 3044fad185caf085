"""What of a fit a checkpoint holds, and how a fit goes on from it.

Owns `snapshot`, `restore` and `fit_settings`. Next: `fit.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_bmr.errors import FitError
from pyro_bmr.fitting.checkpoint_file import digest
from pyro_bmr.fitting.run import FitState, tensors_of
from pyro_bmr.fitting.settings import description, in_short, refuse_hidden_state
from pyro_bmr.isolation import generator_of, seed_generator
from pyro_bmr.networks.modes import set_training
from pyro_bmr.tracing import Values, likelihood_of


def snapshot(run: FitState, optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    """All that the steps so far have changed. Order of the data and draws are functions of the
    seed, the epoch and the step.
    """
    return {
        "tensors": tensors_of(run.guide, run.program),
        "step": run.step.state(),
        "masks": run.masks,
        "scales": run.empirical.scales,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler else None,
        "generator": generator_of(run.x.device).get_state(),
        "log_likelihood": _log_likelihood(run),
        "faults": run.faults.state(),
    }


@torch.no_grad()
def restore(run: FitState, state: Mapping[str, Any], optimizer: Optimizer, scheduler: Any) -> None:
    """Goes on from `state`.

    Raises:
        FitError: the program does not give the log likelihood that it gave when the state was
            saved.
    """
    run.masks, run.empirical.scales = (
        {name: t.to(run.x.device) for name, t in state[key].items()} for key in ("masks", "scales")
    )
    run.step.prune(run.masks, optimizer)
    optimizer.load_state_dict(state["optimizer"])
    if scheduler:
        scheduler.load_state_dict(state["scheduler"])
    for name, tensor in tensors_of(run.guide, run.program).items():
        tensor.copy_(state["tensors"][name])
    run.step.restore(state["step"])
    run.faults.restore(state["faults"])
    was, now = state["log_likelihood"], _log_likelihood(run)
    if not math.isclose(was, now, rel_tol=1e-4, abs_tol=1e-4):
        raise FitError(
            "the program has changed: at its checkpoint the log likelihood of the first rows was"
            f" {was:.6g}, now it is {now:.6g}; fit anew"
        )
    generator_of(run.x.device).set_state(state["generator"])


def fit_settings(
    run: FitState,
    optimizer: Optimizer,
    scheduler: Any,
    data: Mapping[str, Tensor],
    **arguments: Any,
) -> dict[str, Any]:
    """All that must be the same when a fit goes on, and in ``environment`` what must be for the
    result to be the same to the bit.

    Raises:
        FitError: an optimiser or a schedule that keeps state where it cannot be saved.
    """
    refuse_hidden_state(optimizer, scheduler)
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
    groups = [
        {key: description(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    schedule = (
        {key: description(value) for key, value in scheduler.state_dict().items()}
        if scheduler is not None
        else {}
    )
    found = {
        "program": description(run.program),
        "sites": sites,
        "guide": description(run.guide),
        "data": {name: in_short(name, t) for name, t in data.items()},
        "optimizer": {"type": description(type(optimizer)), "groups": groups},
        "scheduler": {"type": description(type(scheduler)), **schedule},
        **{name: description(value) for name, value in arguments.items()},
        "environment": {
            "torch": torch.__version__,
            "pyro_bmr": importlib.metadata.version("pyro_bmr"),
            "threads": torch.get_num_threads(),
            "processes": run.processes.size,
            "device": str(run.x.device),
            "processor": platform.machine(),
        },
    }
    return dict(json.loads(json.dumps(found)))


@torch.no_grad()
def _log_likelihood(run: FitState) -> float:
    """That of the first rows at the posterior's point, by which a program that has changed is
    known.
    """
    device = [run.x.device] if run.x.device.type == "cuda" else []
    point = run.posterior().point()
    with torch.random.fork_rng(device):
        seed_generator(run.x.device, 0)
        set_training(run.program, False)
        run.full_data.rows = len(run.example[0])
        with Values(point) as seen:
            run.scaled(*run.example)
        set_training(run.program, True)
    return float(likelihood_of(seen))
