"""What a step of a mean-field fit costs under each prior, as Markdown: `python
benchmarks/prior_steps.py`.

784-300-100-10, 128 rows, one thread, processor time, the median of 30 steps, as a multiple of the
step under `Gaussian()`.
"""

from __future__ import annotations

import statistics
import time

import torch

import pyro_bmr as bmr
from pyro_bmr.models import mlp
from pyro_bmr.priors.names import PRIORS


def seconds(prior: bmr.priors.Prior, steps: int = 30) -> tuple[float, int]:
    """(processor seconds of a step, latent numbers of the guide)."""
    torch.manual_seed(0)
    x, y = torch.randn(128, 784), torch.randint(10, (128,))
    program = bmr.BayesianNetwork(
        mlp.network(784, (300, 100), 10), prior, bmr.Categorical(size=50_000)
    )
    guide = bmr.MeanField(program, x, y)
    optimizer = bmr.adam()(guide.parameters())
    times = []
    for _ in range(steps):
        start = time.process_time()
        terms = bmr.fitting.elbo_terms(program, guide, x, y)
        optimizer.zero_grad()
        ((terms.kl - terms.expected_log_likelihood) / 50_000).backward()
        optimizer.step()
        times.append(time.process_time() - start)
    return statistics.median(times), guide.loc.numel()


def main() -> None:
    plain, weights = seconds(PRIORS["gaussian"])
    print("| prior | step | latents per weight |\n|---|---|---|")
    for name, prior in PRIORS.items():
        cost, latents = seconds(prior)
        print(f"| `{name}` | {cost / plain:.1f} | {latents / weights:.2f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
