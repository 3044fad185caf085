"""What the library costs on a GPU, and whether it computes there what it computes on the CPU: one
run of less than eight minutes.

    python benchmarks/gpu.py --json docs/results/gpu.json
    python benchmarks/gpu.py --device cpu --small

The parts are

- `equality`: the bound, its gradients, a reduction and a prediction, beside those of the CPU;
- `steps`: on four networks at two batches, over plain training with fused Adam;
- `waits`: how often a step has the host wait for the device;
- `reductions`: of 1e8 weights, over a copy of their moments;
- `transformer`: an epoch of the study's vision transformer at its published size.

Times are of the clock, between two synchronisations, contenders in turns. A part that runs out of
memory, or a contender that is not installed, is left out by name. `--small` has sizes with which a
CPU takes seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.experiments.models import load_model
from pyro_bmr.models.resnet import Block
from pyro_bmr.models.vit import ViT
from pyro_bmr.posteriors.site import Site

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.peers import ivon_step, stock_pyro
from benchmarks.parts.turns import enlarged_digits
from benchmarks.step import NATURAL, deterministic, lenet, mlp, ours

Result = dict[str, Any]
NUMBERS = {"small": 100_000, "full": 100_000_000}
TURN = 5


def resnet18() -> nn.Sequential:
    """ResNet-18 for images of 32×32 pixels (He et al. 2016, with a stem of 3×3)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for outputs in (64, 128, 256, 512):
        layers.append(Block(width, outputs, 1 if width == outputs else 2, nn.BatchNorm2d))
        layers.append(Block(outputs, outputs, 1, nn.BatchNorm2d))
        width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def vit_small() -> nn.Module:
    """The small vision transformer of Touvron et al. 2021: 12 layers of width 384, 6 heads."""
    return ViT((3, 32, 32), 4, 384, 12, 6, 4, 10)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "784-300-100-10": (lambda: mlp(784, 300, 100, 10), (1, 28, 28)),
    "LeNet-5": (lenet, (1, 28, 28)),
    "ResNet-18": (resnet18, (3, 32, 32)),
    "ViT-small": (vit_small, (3, 32, 32)),
}
CONTENDERS: dict[str, Callable[..., Callable[[], object]]] = {
    "plain training, fused Adam": deterministic,
    "Gaussian, Adam": ours,
    "Gaussian, natural gradient": partial(ours, **NATURAL),
    "layer scales, natural gradient": partial(ours, **NATURAL, prior=bmr.Gaussian("layer")),
    "Pyro, AutoNormal": partial(stock_pyro, elbo=Trace_ELBO),
    "ivon-opt": ivon_step,
}


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Clock seconds of one call, all of them together between two synchronisations."""
    wait_for(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    wait_for(device)
    return (time.perf_counter() - began) / repeats


def steps(device: torch.device, small: bool, limit: float) -> Result:
    """Milliseconds a step, and over plain training, of each network and batch."""
    found: Result = {}
    cases = [(name, batch) for name in NETWORKS for batch in ((8,) if small else (128, 1024))]
    for k, (name, batch) in enumerate(cases if not small else cases[:2]):
        build, shape = NETWORKS[name]
        torch.manual_seed(0)
        net = build().to(device)
        x = torch.rand(batch, *shape, device=device)
        y = torch.randint(10, (batch,), device=device)
        found[f"{name}, batch {batch}"] = in_turns(net, x, y, limit / (len(cases) - k + 1), small)
        limit -= found[f"{name}, batch {batch}"]["seconds"]
    return found


def in_turns(net: nn.Module, x: Tensor, y: Tensor, limit: float, small: bool) -> Result:
    """The contenders in turns of five steps until `limit` seconds are over; the first turn of each
    is not counted.
    """
    began, left_out = time.perf_counter(), dict[str, str]()
    running: dict[str, Callable[[], object]] = {}
    times: dict[str, list[float]] = {}
    for name, make in CONTENDERS.items():
        try:
            step = make(copy.deepcopy(net), x, y)
            seconds_of(step, x.device, 1 if small else TURN)
        except (ImportError, torch.OutOfMemoryError) as error:
            left_out[name] = str(error).splitlines()[0]
            continue
        running[name], times[name] = step, []
    while not times["plain training, fused Adam"] or (
        time.perf_counter() - began < limit and not small
    ):
        for name, step in running.items():
            times[name].append(1e3 * seconds_of(step, x.device, 1 if small else TURN))
    medians = {name: statistics.median(each) for name, each in times.items()}
    plain = medians["plain training, fused Adam"]
    return {
        "ms": medians,
        "over plain": {name: each / plain for name, each in medians.items()},
        "turns": len(times["plain training, fused Adam"]),
        "left out": left_out,
        "seconds": time.perf_counter() - began,
    }


def waits(device: torch.device, small: bool, limit: float) -> Result:
    """Contender → how often one step has the host wait for the device, as torch reports it."""
    if device.type != "cuda":
        return {"not measured": "the host waits for a GPU only"}
    x, y = torch.rand(128, 1, 28, 28, device=device), torch.randint(10, (128,), device=device)
    found: Result = {}
    for name in list(CONTENDERS)[:4]:
        step = CONTENDERS[name](mlp(784, 300, 100, 10).to(device), x, y)
        for _ in range(16):
            step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                for _ in range(8):
                    step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found[name] = sum("synchroniz" in str(w.message) for w in seen) / 8
    return found


def reductions(device: torch.device, small: bool, limit: float) -> Result:
    """Seconds of reductions, over those of a copy of mean and variance, and the bandwidth of it."""
    n = NUMBERS["small" if small else "full"]
    torch.manual_seed(0)
    mean = torch.randn(n, device=device) * (0.05 + 1.15 * (torch.rand(n, device=device) < 0.1))
    prior = bmr.formulas.Diagonal(torch.zeros((), device=device), torch.tensor(1.5, device=device))
    var = torch.rand(n, device=device).mul_(0.01).add_(0.001)
    posterior = bmr.Posterior({"w": Site(mean, var, prior)}, rows=10 * n)
    calls: dict[str, Callable[[], object]] = {
        "copy of mean and variance": lambda: (mean.clone(), var.clone()),
        "reduce to Gaussian(0)": lambda: bmr.reduce(posterior, to=bmr.Gaussian(0.0)),
        "reduce to SpikeAndSlab()": lambda: bmr.reduce(posterior, to=bmr.SpikeAndSlab()),
    }
    found: Result = {"weights": n}
    for name, call in calls.items():
        call()
        best = min(seconds_of(call, device) for _ in range(1 if small else 3))
        found[name] = {"seconds": best}
    copied = found["copy of mean and variance"]["seconds"]
    found["bandwidth, GB/s"] = 16 * n / copied / 1e9  # two vectors of 4 bytes, read and written
    for name in list(calls)[1:]:
        found[name]["over a copy"] = found[name]["seconds"] / copied
    return found


def equality(device: torch.device, small: bool, limit: float) -> Result:
    """The largest relative difference from the CPU in float64: both terms of the bound and its
    gradients at a fixed draw, ΔF of a reduction, and probabilities at the posterior's point.
    """
    answers = [_answers(torch.device("cpu")), _answers(device)]
    found = {
        name: float((here - there).abs().max() / there.abs().max())
        for (name, there), here in zip(answers[0].items(), answers[1].values(), strict=True)
    }
    return {**found, "equal to 1e-9": all(difference < 1e-9 for difference in found.values())}


def _answers(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.rand(64, 1, 28, 28, generator=generator, dtype=torch.float64).to(device)
    y = torch.randint(10, (64,), generator=generator).to(device)
    net = lenet().double().to(device)
    program = bmr.BayesianNetwork(net, bmr.Gaussian("layer"), bmr.Categorical(size=1000))
    program = program.to(device).eval()
    guide = bmr.MeanField(program, x, y)
    noise = torch.randn(guide.loc.numel(), generator=generator, dtype=torch.float64).to(device)
    terms = bmr.fitting.elbo_terms(program, guide, x, y, noise=noise)
    gradients = torch.autograd.grad(sum(terms), [guide.loc, guide.log_scale])
    posterior = bmr.Posterior.from_guide(guide, program, x, y, rows=100_000)
    reduction = bmr.reduce(posterior, to=bmr.Gaussian(0.0))
    return {
        "log likelihood": terms[0].detach().cpu().reshape(1),
        "KL": terms[1].detach().cpu().reshape(1),
        "gradient of means": gradients[0].cpu(),
        "gradient of log scales": gradients[1].cpu(),
        "delta F": torch.cat([s.spike_delta_f.flatten().cpu() for s in reduction.sites.values()]),
        "probabilities": bmr.predict(program, posterior, x, draws=0).probs.cpu(),
    }


def transformer(device: torch.device, small: bool, limit: float) -> Result:
    """Seconds of an epoch of the study's vision transformer at its published size, batch 128, with
    layer scales and the natural gradient, of plain training, and accuracy after the epochs that fit
    into the time. The images are Fashion-MNIST, or without it the digits at 28×28 pixels.
    """
    data = _images(small)
    torch.manual_seed(0)
    program = load_model("vit:small" if small else "vit:paper")(data, bmr.Gaussian("layer"))
    program = program.to(device)
    options: dict[str, Any] = {"optimizer": bmr.natural_gradient(), "progress": False}
    rows = data.x_train.to(device), data.y_train.to(device)
    some = tuple(part[:256] for part in rows)
    bmr.fit(program, some, epochs=1, batch_size=128, **options)  # loads what is loaded once
    first = seconds_of(lambda: bmr.fit(program, rows, epochs=1, batch_size=128, **options), device)
    epochs = max(int(0.7 * limit / first), 1) if not small else 1
    fits: list[Any] = []
    spent = seconds_of(
        lambda: fits.append(bmr.fit(program, rows, epochs=epochs, batch_size=128, **options)),
        device,
    )
    prediction = bmr.predict(fits[0].program, fits[0].posterior, data.x_test.to(device), draws=16)
    return {
        "images": data.name,
        "rows": len(data.x_train),
        "epochs": epochs,
        "seconds an epoch": spent / epochs,
        "accuracy": float(bmr.metrics.accuracy(prediction.probs.cpu(), data.y_test)),
        "nll": -float(prediction.log_prob(data.y_test.to(device)).mean()),
    }


def _images(small: bool) -> Any:
    try:
        if not small:
            return bmr.load("fashion-mnist")
    except bmr.errors.DataError:
        pass
    x, y = enlarged_digits()
    x, y = (x[:128], y[:128]) if small else (x, y)
    return bmr.Data("digits, enlarged", x, y, x[-64:], y[-64:], classes=10)


PARTS: dict[str, tuple[Callable[[torch.device, bool, float], Result], float]] = {
    "equality": (equality, 20),
    "steps": (steps, 240),
    "waits": (waits, 15),
    "reductions": (reductions, 25),
    "transformer": (transformer, 100),
}
"""Part → its function, and the seconds that it may take."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a test without a GPU")
    parser.add_argument("--only", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--json", type=Path, help="where results are kept, after each part")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("expected a GPU that torch can use, got none; --device cpu --small tries it")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    results: Result = {"about": {"device": name, "torch": torch.__version__, "small": given.small}}
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        for part in given.only:
            run, limit = PARTS[part]
            began = time.perf_counter()
            try:
                results[part] = run(device, given.small, limit)
            except torch.OutOfMemoryError as error:
                results[part] = {"left out": str(error).splitlines()[0]}
            results["about"][f"{part}, s"] = time.perf_counter() - began
            print(f"\n{part}: {json.dumps(results[part], indent=1)}", flush=True)
            if given.json:
                given.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
