"""The cost of one training step, ours and others', over that of plain training with fused Adam.

    python benchmarks/step.py --json docs/results/step.json
    python benchmarks/step.py --by-fit

All contenders stand in one process on one thread and take turns of 33 steps, round after round, of
which the first is not counted. Times are those of the processor in this process, which waiting for
others does not count towards, and of the clock; given are the median, the median of the ratios to
plain training in the same round, and the smallest of the medians of ten blocks of rounds. What is
not installed is left out by name. The images are the embedded digits, enlarged to 28×28 pixels, so
that networks learn and their activations are those of training. All contenders see the same batches
in the same order; ours does all that `fit` does in a step but fetch the batch, as after a thousand
steps.

With `--by-fit` a step is what the public call takes: (a fit of 4 epochs − a fit of 1) / 3, of `fit`
and of a plain loop over the same rows, in turns.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.experiments.folder import versions
from pyro_bmr.fitting.arguments import Arguments
from pyro_bmr.fitting.descent import read_terms, take_step
from pyro_bmr.fitting.rows import rows_of
from pyro_bmr.fitting.run import Run

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.by_fit import by_fit
from benchmarks.parts.peers import (
    ROWS,
    Step,
    bayesian_torch_step,
    blitz_step,
    ivon_step,
    numpyro_step,
    posteriors_step,
    stock_pyro,
    torchbnn_step,
    tyxe_step,
)
from benchmarks.parts.turns import PLAIN, enlarged_digits, measure, show


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Sequential], int]] = {
    "784-300-100-10, batch 128": (lambda: mlp(784, 300, 100, 10), 128),
    "784-300-100-10, batch 512": (lambda: mlp(784, 300, 100, 10), 512),
    "784-500x4-10, batch 128": (lambda: mlp(784, 500, 500, 500, 500, 10), 128),
    "LeNet-5, batch 128": (lenet, 128),
}


def deterministic(net: nn.Sequential, x: Tensor, y: Tensor) -> Step:
    net = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def running(
    program: bmr.BayesianNetwork,
    data: tuple[Tensor, Tensor],
    make: object,
    guide: object = bmr.MeanField,
    batch_size: int = 128,
) -> Run:
    """A fit before its first step, as `fit` makes it."""
    given = Arguments(
        program,
        guide,
        epochs=1,
        batch_size=batch_size,
        optimizer=make,
        scheduler=None,
        seed=0,
        temperature=1.0,
        reduce=None,
        start=None,
        skip_faulty=0,
        shuffle=True,
    )
    return Run(program, rows_of(given, data, None), given)


def ours(
    net: nn.Sequential,
    x: Tensor,
    y: Tensor,
    make: object = None,
    masks_of: float | None = None,
    prior: bmr.priors.Prior | None = None,
    guide: object = bmr.MeanField,
    units: float = 0,
) -> Step:
    """The step of `fit`; with `masks_of`, after that fraction of each tensor was pruned, among it
    the fraction `units` of the units of each hidden layer with all their weights.
    """
    program = bmr.BayesianNetwork(copy.deepcopy(net), prior or bmr.Gaussian(), bmr.Categorical())
    run = running(program, (x, y), make or bmr.adam(), guide, len(x))
    run.full_data.size = run.step.rows = ROWS
    run.step.kl_weight = 1 / ROWS
    schedule = bmr.fitting.cosine(run.optimizer, 10**6)
    go_to(run, (x, y), 1000)  # beyond the first steps, which differ
    if masks_of is not None:
        run.step.prune(pruned(run, masks_of, units), run.optimizer)
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        take_step(run, (x, y), 1.0, number)
        read_terms(run)
        schedule.step()

    run.program.train()
    return step


def go_to(run: Run, batch: tuple[Tensor, Tensor], number: int) -> None:
    """Has the optimiser as it is after `number` steps, but for what it has learned."""
    run.program.train()
    take_step(run, batch, 1.0, 0)
    read_terms(run)
    run.optimizer.steps = number
    for state in run.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(number)


def pruned(run: Run, share: float, units: float) -> dict[str, Tensor]:
    """Masks of the weights that prune `share` of them, and whole units among them."""
    still = (1 - share) / (1 - units)  # of the units that are not pruned
    masks = {
        s.name: torch.rand(s.shape) < still
        for s in run.guide.latents
        if s.name in run.program.forms
    }
    hidden = [name for name in masks if name.endswith("weight")][:-1]
    for name in hidden if units else ():
        dead = torch.rand(len(masks[name])) < units
        masks[name][dead] = False
        masks[name.replace("weight", "bias")][dead] = False
    return masks


NATURAL = {"make": bmr.natural_gradient()}
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, natural gradient": NATURAL,
    "ours, 95 % pruned": {"masks_of": 0.95},
    "ours, natural gradient, 95 % pruned": {**NATURAL, "masks_of": 0.95},
    "ours, 95 % pruned, units dead": {"masks_of": 0.95, "units": 0.8},
    "ours, natural gradient, 95 % pruned, units dead": {**NATURAL, "masks_of": 0.95, "units": 0.8},
    "ours, layer scales, natural gradient, 95 % pruned, units dead": {
        **NATURAL,
        "prior": bmr.Gaussian("layer"),
        "masks_of": 0.95,
        "units": 0.8,
    },
    "ours, layer scales": {"prior": bmr.Gaussian("layer")},
    "ours, layer scales, natural gradient": {**NATURAL, "prior": bmr.Gaussian("layer")},
    "ours, horseshoe": {"prior": bmr.Horseshoe()},
    "ours, horseshoe of units": {"prior": bmr.Horseshoe(tiers=("layer", "unit"))},
    "ours, spike and slab": {"prior": bmr.SpikeAndSlab()},
    "ours, MAP": {"guide": bmr.Point},
    "ours, MAP, layer scales": {"guide": bmr.Point, "prior": bmr.Gaussian("layer")},
}
"""Contender → what differs from `ours`."""
CONTENDERS: dict[str, Callable[[nn.Sequential, Tensor, Tensor], Step]] = {
    PLAIN: deterministic,
    **{name: partial(ours, **options) for name, options in OURS.items()},
    "Pyro, AutoNormal, Trace_ELBO": lambda *a: stock_pyro(*a, elbo=Trace_ELBO),
    "Pyro, AutoNormal, TraceMeanField_ELBO": lambda *a: stock_pyro(*a, elbo=TraceMeanField_ELBO),
    "ivon-opt": ivon_step,
    "torchbnn": torchbnn_step,
    "bayesian-torch, reparameterisation": lambda *a: bayesian_torch_step(
        *a, kind="Reparameterization"
    ),
    "bayesian-torch, flipout": lambda *a: bayesian_torch_step(*a, kind="Flipout"),
    "blitz": blitz_step,
    "TyXe": tyxe_step,
    "posteriors": posteriors_step,
    "numpyro, jitted": numpyro_step,
}


def measure_case(
    case: str, wanted: str, rounds: int, missing: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Plain training and the contenders that have a part of `wanted` in their name; those that are
    not installed go to `missing`.
    """
    build, batch = CASES[case]
    torch.manual_seed(0)
    net, (x, y) = build(), (part[:batch].clone() for part in enlarged_digits())
    steps = {}
    for name, make in CONTENDERS.items():
        if make is deterministic or any(word in name for word in wanted.split(",")):
            try:
                steps[name] = make(net, x, y)
            except ImportError as error:
                missing[name] = str(error)
    return measure(steps, x, y, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--cases", default=",".join(str(k) for k in range(len(CASES))), help="numbers of the cases"
    )
    parser.add_argument(
        "--contenders",
        default="",
        help="parts of the names of those to measure beside plain training; all by default",
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="where results are kept; cases that are not measured now stay as they are there",
    )
    parser.add_argument("--by-fit", action="store_true", help="measure whole fits, as above")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    if settings.by_fit:
        words = settings.contenders.split(",")
        chosen = {
            name: options
            for name, options in OURS.items()
            if "masks_of" not in options and any(word in name for word in words)
        }
        for case in (list(CASES)[int(k)] for k in settings.cases.split(",")):
            build, batch = CASES[case]
            torch.manual_seed(0)
            show(case, by_fit(build(), enlarged_digits(), batch, chosen, min(settings.rounds, 5)))
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    if settings.json and settings.json.exists():
        results = json.loads(settings.json.read_text())["milliseconds"]
    missing: dict[str, str] = {}
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        for case in (list(CASES)[int(k)] for k in settings.cases.split(",")):
            results[case] = measure_case(case, settings.contenders, settings.rounds, missing)
            show(case, results[case])
    for name, why in missing.items():
        print(f"left out: {name} ({why})")
    if settings.json:
        about = {
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "python": platform.python_version(),
            "threads": 1,
            "rounds": settings.rounds,
            "commit": versions().get("commit", ""),
        }
        settings.json.write_text(
            json.dumps({"about": about, "milliseconds": results, "left out": missing}, indent=1)
        )


if __name__ == "__main__":
    main()
