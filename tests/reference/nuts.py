"""Makes nuts.npz: means and standard deviations of six weights of a regression under nine priors,
by NUTS.

`python -m tests.reference.nuts` writes the file beside this one, in about five minutes on one core:
for each prior 400 draws after 200 of warm-up, by Pyro's sampler, of the program that the tests fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

import pyro_bmr as bmr
from pyro_bmr.priors import Prior
from pyro_bmr.tracing import Values

N, W = 60, torch.tensor([1.2, 0.0, -0.7, 0.0, 0.05, 0.0], dtype=torch.float64)
SHRINKING = [bmr.Horseshoe(), bmr.SpikeAndSlab(), bmr.SpikeAndSlab(temperature=0.5)]
PLAIN = [
    bmr.Gaussian(0.8, mean=0.3),
    bmr.Gaussian("layer"),
    bmr.Gaussian("layer", per="weight"),
    bmr.Laplace(0.5),
    bmr.Laplace(),
    bmr.StudentT(),
]
DRAWS, WARM_UP = 400, 200
FILE = Path(__file__).with_suffix(".npz")


def regression(prior: Prior) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The program of a regression of known noise, and its 60 rows."""
    x = torch.randn(N, len(W), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y = x @ W + 0.5 * torch.randn(
        N, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )

    def program(x, y=None):
        w = prior.sample("w", (1, len(W)), x.new_zeros(1, len(W)))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ w[0], 0.5), obs=y)

    return program, x, y


def weights(prior: Prior, draws: Iterable[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The weights that draws of the sites stand for, (draws, weights)."""
    found = []
    for values in draws:
        with Values(values):
            found.append(
                prior.sample("w", (1, len(W)), torch.zeros(1, len(W), dtype=torch.float64))[0]
            )
    return torch.stack(found)


def moments(prior: Prior) -> np.ndarray:
    """Means and standard deviations of the weights by NUTS, (2, weights)."""
    program, x, y = regression(prior)
    pyro.set_rng_seed(0)
    kernel = NUTS(program, jit_compile=True, ignore_jit_warnings=True, max_tree_depth=7)
    mcmc = MCMC(kernel, num_samples=DRAWS, warmup_steps=WARM_UP, disable_progbar=True)
    mcmc.run(x, y)
    samples = mcmc.get_samples()
    found = weights(
        prior, ({name: values[k] for name, values in samples.items()} for k in range(DRAWS))
    )
    return torch.stack([found.mean(0), found.std(0)]).numpy()


def stored() -> dict[str, np.ndarray]:
    """The moments by the name of the prior."""
    with np.load(FILE) as file:
        return dict(file)


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which Pyro uses
    found = {}
    for prior in SHRINKING + PLAIN:
        found[str(prior)] = moments(prior)
        np.savez_compressed(FILE, **found)
