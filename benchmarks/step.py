"""The cost of one training step, ours and others', over that of plain training with fused Adam.

    python benchmarks/step.py --json docs/results/step.json

All contenders stand in one process on one thread and take turns of five steps, round after round,
of which the first is not counted. Times are those of the processor in this process, which waiting
for others does not count towards, and of the clock; given are the median, and the smallest of the
medians of ten blocks of rounds. What is not installed is left out by name. The images are the
embedded digits, enlarged to 28×28 pixels, so that networks learn and their activations are those of
training. All contenders see the same batches in the same order; ours does all that `fit` does in a
step but fetch the batch.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.optim
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.fitting.arguments import Arguments
from pyro_bmr.fitting.descent import take_step
from pyro_bmr.fitting.rows import Rows
from pyro_bmr.fitting.run import Run

ROWS, TURN = 60_000, 4
Step = Callable[[], object]


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


def running(program: bmr.BayesianNetwork, rows: Rows, make: object) -> Run:
    """A fit of `MeanField` before its first step, as `fit` makes it."""
    given = Arguments(
        program,
        bmr.MeanField,
        epochs=1,
        batch_size=rows.batch_size,
        optimizer=make,
        scheduler=None,
        seed=0,
        temperature=1.0,
        reduce=None,
        start=None,
        skip_faulty=0,
        shuffle=True,
    )
    return Run(program, rows, given)


def ours(
    net: nn.Sequential, x: Tensor, y: Tensor, make: object = None, masks_of: float | None = None
) -> Step:
    """The step of `fit`; with `masks_of`, after that fraction of each weight tensor was pruned."""
    program = bmr.BayesianNetwork(copy.deepcopy(net), bmr.Gaussian(), bmr.Categorical())
    run = running(program, Rows(x, y, len(x)), make or bmr.adam())
    run.full_data.size = run.step.rows = ROWS
    run.step.kl_weight = 1 / ROWS
    schedule = bmr.fitting.cosine(run.optimizer, 10**6)
    run.optimizer.steps = 1000  # of the natural gradient: beyond its first steps, which differ
    if masks_of is not None:
        masks = {s.name: torch.rand(s.shape) >= masks_of for s in run.guide.latents}
        run.step.prune(masks, run.optimizer)
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        take_step(run, (x, y), 1.0, number)
        schedule.step()

    run.program.train()
    return step


def stock_pyro(net: nn.Sequential, x: Tensor, y: Tensor, elbo: type) -> Step:
    """As one writes it by the book: AutoNormal, ClippedAdam's plain sibling, SVI."""
    model = bmr.BayesianNetwork(copy.deepcopy(net), bmr.Gaussian(1.0), bmr.Categorical(size=ROWS))
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 1e-3}), elbo())
    return lambda: svi.step(x, y)


def torchbnn_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Step:
    bnn = importlib.import_module("torchbnn")
    if any(isinstance(m, nn.Conv2d) for m in net):
        conv = lambda m: bnn.BayesConv2d(  # noqa: E731
            0, 0.1, m.in_channels, m.out_channels, m.kernel_size[0], padding=m.padding
        )
    layers = [
        (
            bnn.BayesLinear(0, 0.1, m.in_features, m.out_features)
            if isinstance(m, nn.Linear)
            else conv(m)
            if isinstance(m, nn.Conv2d)
            else m
        )
        for m in net
    ]
    net = nn.Sequential(*layers)
    kl = bnn.BKLLoss(reduction="sum", last_layer_only=False)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (nn.functional.cross_entropy(net(x), y) + kl(net) / ROWS).backward()
        optimizer.step()

    return step


def bayesian_torch_step(net: nn.Sequential, x: Tensor, y: Tensor, kind: str) -> Step:
    module = importlib.import_module("bayesian_torch.models.dnn_to_bnn")
    net = copy.deepcopy(net)
    settings = {
        "prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0,
        "type": kind, "moped_enable": False, "moped_delta": 0.5,
    }  # fmt: skip
    module.dnn_to_bnn(net, settings)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (nn.functional.cross_entropy(net(x), y) + module.get_kl_loss(net) / ROWS).backward()
        optimizer.step()

    return step


def blitz_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Step:
    modules, losses = (
        importlib.import_module("blitz.modules"),
        importlib.import_module("blitz.losses"),
    )
    conv = lambda m: modules.BayesianConv2d(  # noqa: E731
        m.in_channels, m.out_channels, m.kernel_size, padding=m.padding
    )
    net = nn.Sequential(
        *(
            (
                modules.BayesianLinear(m.in_features, m.out_features)
                if isinstance(m, nn.Linear)
                else conv(m)
                if isinstance(m, nn.Conv2d)
                else m
            )
            for m in net
        )
    )
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (
            nn.functional.cross_entropy(net(x), y) + losses.kl_divergence_from_nn(net) / ROWS
        ).backward()
        optimizer.step()

    return step


def ivon_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Step:
    net = copy.deepcopy(net)
    optimizer = importlib.import_module("ivon").IVON(net.parameters(), lr=0.1, ess=ROWS)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def numpyro_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Step:
    """Jitted; plain multilayer perceptrons only."""
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )
    numpyro, jax = importlib.import_module("numpyro"), importlib.import_module("jax")
    infer, dist = (
        importlib.import_module("numpyro.infer"),
        importlib.import_module("numpyro.distributions"),
    )
    if any(isinstance(m, nn.Conv2d) for m in net):
        raise ImportError("numpyro: multilayer perceptrons only")
    layers = [m for m in net if isinstance(m, nn.Linear)]
    batch = lambda: (  # noqa: E731
        jax.numpy.asarray(x.flatten(1).numpy()),
        jax.numpy.asarray(y.numpy()),
    )

    def model(x: object, y: object) -> None:
        for k, layer in enumerate(layers):
            shape = (layer.in_features, layer.out_features)
            w = numpyro.sample(f"w{k}", dist.Normal(0, 1).expand(shape).to_event(2))
            b = numpyro.sample(f"b{k}", dist.Normal(0, 1).expand(shape[1:]).to_event(1))
            x = x @ w + b
            x = jax.nn.relu(x) if k + 1 < len(layers) else x
        with numpyro.plate("data", ROWS, subsample_size=len(x)):
            numpyro.sample("y", dist.Categorical(logits=x), obs=y)

    svi = infer.SVI(
        model,
        infer.autoguide.AutoNormal(model),
        numpyro.optim.Adam(1e-3),
        infer.TraceMeanField_ELBO(),
    )
    state = svi.init(jax.random.PRNGKey(0), *batch())
    update = jax.jit(svi.update)

    def step() -> None:
        nonlocal state
        state, loss = update(state, *batch())
        loss.block_until_ready()

    return step


CONTENDERS: dict[str, Callable[[nn.Sequential, Tensor, Tensor], Step]] = {
    "plain training, fused Adam": deterministic,
    "ours": ours,
    "ours, natural gradient": lambda *a: ours(*a, make=bmr.natural_gradient()),
    "ours, 95 % pruned": lambda *a: ours(*a, masks_of=0.95),
    "ours, natural gradient, 95 % pruned": lambda *a: ours(
        *a, make=bmr.natural_gradient(), masks_of=0.95
    ),
    "Pyro, AutoNormal, Trace_ELBO": lambda *a: stock_pyro(*a, elbo=Trace_ELBO),
    "Pyro, AutoNormal, TraceMeanField_ELBO": lambda *a: stock_pyro(*a, elbo=TraceMeanField_ELBO),
    "ivon-opt": ivon_step,
    "torchbnn": torchbnn_step,
    "bayesian-torch, reparameterisation": lambda *a: bayesian_torch_step(
        *a, kind="Reparameterization"
    ),
    "bayesian-torch, flipout": lambda *a: bayesian_torch_step(*a, kind="Flipout"),
    "blitz": blitz_step,
    "numpyro, jitted": numpyro_step,
}


def enlarged_digits() -> tuple[Tensor, Tensor]:
    digits = bmr.load("digits")
    return (
        nn.functional.interpolate(
            digits.x_train.view(-1, 1, 8, 8), (28, 28), mode="bilinear"
        ).contiguous(),
        digits.y_train,
    )


def measure(
    steps: dict[str, Step], x: Tensor, y: Tensor, rounds: int, blocks: int = 10
) -> dict[str, dict[str, float]]:
    """Contender → milliseconds a step, contenders taking turns. Each round writes other rows into x
    and y, which the contenders read.
    """
    images, labels = enlarged_digits()
    processor: dict[str, list[float]] = {name: [] for name in steps}
    clock: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        rows = torch.arange(number * len(x), (number + 1) * len(x)) % len(images)
        x.copy_(images[rows]), y.copy_(labels[rows])
        for name, step in steps.items():
            step()  # brings its vectors back into the caches, as in a training loop
            began, began_clock = time.process_time(), time.perf_counter()
            for _ in range(TURN):
                step()
            clock[name].append(1e3 * (time.perf_counter() - began_clock) / TURN)
            processor[name].append(1e3 * (time.process_time() - began) / TURN)
    for times in (*processor.values(), *clock.values()):
        del times[0]
    size = max(rounds // blocks, 1)

    def best_block(times: list[float]) -> float:
        return min(statistics.median(times[k : k + size]) for k in range(0, len(times), size))

    return {
        name: {
            "processor_median": statistics.median(processor[name]),
            "processor_best_block": best_block(processor[name]),
            "clock_median": statistics.median(clock[name]),
            "clock_best_block": best_block(clock[name]),
        }
        for name in steps
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
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
    settings = parser.parse_args()
    torch.set_num_threads(1)
    before = (
        json.loads(settings.json.read_text())
        if settings.json and settings.json.exists()
        else {"milliseconds": {}}
    )
    results: dict[str, dict[str, dict[str, float]]] = before["milliseconds"]
    missing: dict[str, str] = {}
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        for case in (list(CASES)[int(k)] for k in settings.cases.split(",")):
            build, batch = CASES[case]
            torch.manual_seed(0)
            net, (x, y) = build(), (part[:batch].clone() for part in enlarged_digits())
            steps = {}
            for name, make in CONTENDERS.items():
                if make is not deterministic and not any(
                    word in name for word in settings.contenders.split(",")
                ):
                    continue
                try:
                    steps[name] = make(net, x, y)
                except ImportError as error:
                    missing[name] = str(error)
            results[case] = measure(steps, x, y, settings.rounds)
            base = results[case]["plain training, fused Adam"]
            print(
                f"\n| {case} | ms, processor | over plain | best block | over plain | clock, over"
                " plain |\n|---|---|---|---|---|---|"
            )
            for name, row in results[case].items():
                ratios = [
                    row[key] / base[key]
                    for key in ("processor_median", "processor_best_block", "clock_median")
                ]
                print(
                    f"| {name} | {row['processor_median']:.2f} | {ratios[0]:.2f} |"
                    f" {row['processor_best_block']:.2f} | {ratios[1]:.2f} | {ratios[2]:.2f} |",
                    flush=True,
                )
    for name, why in missing.items():
        print(f"left out: {name} ({why})")
    if settings.json:
        about = {
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "python": platform.python_version(),
            "threads": 1,
            "rounds": settings.rounds,
        }
        settings.json.write_text(
            json.dumps({"about": about, "milliseconds": results, "left out": missing}, indent=1)
        )


if __name__ == "__main__":
    main()
