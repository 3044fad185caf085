"""How far a fit of `MeanField` comes by the natural gradient and by Adam at its usual rate, at
temperature 1 and with a length that the fit finds out itself, as Markdown:
`python benchmarks/optimizers.py [--only PROBLEM ...]`.

Seed 0, batches of 128, one thread, seconds of the processor. A bound is the mean over the last
eighth of the last cycle. Programs by hand: a regression of 150 rows, a Poisson
regression with two positive latents; of modules: regressions on 20 columns, three of which matter,
and the digits.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_bmr as bmr

Problem = Callable[[], tuple[Any, tuple[torch.Tensor, torch.Tensor]]]
OPTIMIZERS = {"natural gradient": bmr.natural_gradient, "Adam": bmr.adam}


def by_hand() -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 5, generator=generator)
    y = x @ torch.linspace(-1.5, 2.0, 5) + 0.4 * torch.randn(150, generator=generator)

    def program(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(5), 3.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.4), obs=y)

    return program, (x, y)


def positive() -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, generator=generator)
    y = torch.poisson(torch.exp(x @ torch.tensor([0.5, -0.3, 0.0]) + 1), generator=generator)

    def program(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Poisson(rate * torch.exp(scale * (x @ w))), obs=y)

    return program, (x, y)


def linear(prior: bmr.priors.Prior) -> Problem:
    def made() -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(200, 20, generator=generator)
        y = x[:, :3] @ torch.tensor([1.0, -1.0, 0.5])
        y = y + 0.5 * torch.randn(200, generator=generator)
        torch.manual_seed(0)
        return bmr.BayesianNetwork(nn.Linear(20, 1), prior, bmr.Normal()), (x, y)

    return made


def digits() -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
    data = bmr.load("digits")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    program = bmr.BayesianNetwork(net, bmr.Gaussian("layer"), bmr.Categorical())
    return program, (data.x_train, data.y_train)


PROBLEMS: dict[str, Problem] = {
    "regression by hand": by_hand,
    "Poisson by hand": positive,
    "20 columns, layer scales": linear(bmr.Gaussian("layer")),
    "20 columns, horseshoe": linear(bmr.Horseshoe()),
    "digits, 64-50-10": digits,
}


def line(problem: str, optimizer: str) -> str:
    program, data = PROBLEMS[problem]()
    clock = time.process_time()
    fit = bmr.fit(program, data, optimizer=OPTIMIZERS[optimizer](), seed=0, progress=False)
    seconds = time.process_time() - clock
    steps, history = int(fit.history["step"].iloc[-1]), fit.history
    cycle = {3_000: 3_000, 9_000: 6_000}.get(steps, 7_000)
    bound = history["elbo"][history["step"] > steps - cycle // 8].mean()
    done = "yes" if fit.converged else "no"
    return f"| {problem} | {optimizer} | {steps:,} | {bound:.1f} | {done} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    print(
        "| problem | optimiser | steps | bound, nats | converged | s |\n|---|---|---|---|---|---|"
    )
    for problem in parser.parse_args().only:
        for optimizer in OPTIMIZERS:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the fit has not converged")
                print(line(problem, optimizer), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
