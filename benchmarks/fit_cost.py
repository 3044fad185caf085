"""What a whole fit costs beside plain training: memory, epochs before and after pruning,
reductions, predictions, and the time to a given NLL.

    python benchmarks/fit_cost.py --json docs/results/fit_cost.json
    python benchmarks/fit_cost.py --only memory

One thread. Seconds are those of the processor in this process; contenders take turns, medians are
given. `time_to_nll` needs Fashion-MNIST; the rest takes random images of its size.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

import pyro_bmr as bmr

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.time_to_nll import time_to_nll
from benchmarks.step import lenet, mlp

LARGE, SMALL = (784, 500, 500, 500, 500, 10), (784, 300, 100, 10)
SPIKE = bmr.Gaussian(scale=0.0)


def random_images(rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(rows, 784), torch.randint(10, (rows,))


def network(*widths: int) -> bmr.BayesianNetwork:
    torch.manual_seed(0)
    return bmr.BayesianNetwork(mlp(*widths), bmr.Gaussian("empirical"), bmr.Categorical())


def train_plainly(net: nn.Module, x: Tensor, y: Tensor, batch: int = 128) -> None:
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    for rows in torch.randperm(len(x)).split(batch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()


MEMORY: dict[str, dict[str, Any]] = {
    "plain training, fused Adam": {},
    "fit": {"optimizer": bmr.adam()},
    "fit, natural gradient": {"optimizer": bmr.natural_gradient()},
    "fit, antithetic": {
        "optimizer": bmr.adam(),
        "guide": lambda *a: bmr.MeanField(*a, estimator="antithetic"),
    },
    "fit with reductions": {"optimizer": bmr.adam(), "reduce": bmr.Every(0.25, SPIKE, kept=0.05)},
}


def peak_of(name: str) -> int:
    """Bytes of this process at the peak of one epoch, the network included, above those before
    it.
    """
    x, y = random_images(20_000)
    train_plainly(mlp(784, 10), x[:256], y[:256])  # what is loaded at the first use of anything
    bmr.fit(network(784, 10), (x[:512], y[:512]), epochs=1, progress=False)
    if "reduce" in MEMORY[name]:
        torch.export.export(mlp(784, 10), (x[:2],))
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    if MEMORY[name]:
        bmr.fit(network(*LARGE), (x, y), epochs=1, progress=False, **MEMORY[name])
    else:
        train_plainly(mlp(*LARGE), x, y)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return 1024 * int(line.split()[1])


def memory() -> dict[str, float]:
    """Peak memory of one epoch of 784-500×4-10 over that of plain training; the median of five
    processes each. Linux.
    """
    code = (
        "import sys, torch; torch.set_num_threads(1); from benchmarks.fit_cost import peak_of;"
        " print(peak_of(sys.argv[1]))"
    )
    peaks = {
        name: statistics.median(
            int(subprocess.check_output([sys.executable, "-c", code, name], text=True))
            for _ in range(5)
        )
        for name in MEMORY
    }
    plain = peaks["plain training, fused Adam"]
    return {f"{name}, MB": peak / 1e6 for name, peak in peaks.items()} | {
        f"{name}, over plain": peak / plain for name, peak in peaks.items()
    }


def epochs(rounds: int = 5) -> dict[str, float]:
    """Processor seconds of an epoch of `fit` on 784-300-100-10 before and after 95 % of the weights
    were pruned.
    """
    data, program = random_images(60_000), network(*SMALL)
    whole = bmr.fit(program, (data[0][:256], data[1][:256]), epochs=1, progress=False).posterior
    pruned = bmr.reduce(whole, SPIKE, kept=0.05).posterior
    times: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(rounds):
        for name, start in (("before", whole), ("after", pruned)):
            began = time.process_time()
            bmr.fit(program, data, epochs=1, progress=False, start=start)
            times[name].append(time.process_time() - began)
    before, after = (statistics.median(t) for t in times.values())
    return {"epoch, s": before, "epoch, 95 % pruned, s": after, "ratio": after / before}


def reductions(rounds: int = 3) -> dict[str, float]:
    """The part of a fit's time that reductions and scales take: 784-300-100-10, 60,000 images, one
    reduction an epoch, five epochs.
    """
    data, shares = random_images(60_000), {"evidence": [], "target": []}
    for _ in range(rounds):
        for name, kept in (("evidence", None), ("target", 0.05)):
            fit = bmr.fit(
                network(*SMALL),
                data,
                epochs=5,
                progress=False,
                reduce=bmr.Every(1, SPIKE, kept=kept),
            )
            shares[name].append(fit.reduction_seconds / fit.seconds)
    return {f"share of a fit, {name}": statistics.median(s) for name, s in shares.items()}


def predictions(rounds: int = 5) -> dict[str, float]:
    """32 draws over 32 plain forward passes: 10,000 inputs on 784-300-100-10, of a dense and of a
    pruned posterior, and 1,000 on LeNet-5.
    """
    (x, y), program = random_images(10_000), network(*SMALL)
    fit = bmr.fit(program, (x[:256], y[:256]), epochs=1, progress=False)
    pruned = bmr.reduce(fit.posterior, SPIKE, kept=0.05).posterior
    found = _over_passes(
        {"predict": fit.posterior, "predict, 95 % pruned": pruned}, fit.program, x, rounds
    )
    torch.manual_seed(0)
    images = x[:1000].view(-1, 1, 28, 28)
    convolutional = bmr.BayesianNetwork(lenet(), bmr.Gaussian("empirical"), bmr.Categorical())
    fit = bmr.fit(convolutional, (images[:256], y[:256]), epochs=1, progress=False)
    return found | _over_passes(
        {"predict, LeNet-5": fit.posterior}, fit.program, images, rounds, "plain, LeNet-5"
    )


def _over_passes(
    posteriors: dict[str, bmr.Posterior], program: Any, x: Tensor, rounds: int, plain: str = "plain"
) -> dict[str, float]:
    """Processor seconds of 32 draws from each posterior, and over those of as many passes."""
    net = program.net.eval()

    @torch.no_grad()
    def passes() -> None:
        for _ in range(32):
            net(x).softmax(1)

    contenders: dict[str, Callable[[], object]] = {plain: passes} | {
        name: partial(bmr.predict, program, posterior, x, draws=32)
        for name, posterior in posteriors.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)
    medians = {name: statistics.median(t[1:]) for name, t in times.items()}
    return {f"{name}, s": t for name, t in medians.items()} | {
        f"{name}, over plain": medians[name] / medians[plain] for name in list(contenders)[1:]
    }


PARTS: dict[str, Callable[[], dict[str, float]]] = {
    "memory": memory,
    "epochs": epochs,
    "reductions": reductions,
    "predictions": predictions,
    "time_to_nll": time_to_nll,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument(
        "--json",
        type=Path,
        help="where results are kept; parts that are not measured now stay as they are there",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = (
        json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    )
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        for name in arguments.only:
            results[name] = PARTS[name]()
            print(f"\n{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}")
            for key, value in results[name].items():
                print(f"  {key}: {value:.3g}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
