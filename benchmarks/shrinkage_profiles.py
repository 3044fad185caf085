"""Draws docs/pictures/shrinkage.png, the picture of docs/choose_a_prior.md: `python
benchmarks/shrinkage_profiles.py`.

What a prior makes of an estimate ŵ = w + noise of variance 1: the posterior mean E[w | ŵ], by
weighting a million draws of the prior, so that whatever has a `sample` can be drawn. Scales that a
whole tensor shares are given.
"""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from pyro import poutine
from torch import Tensor

import pyro_bmr as bmr
from pyro_bmr.experiments import plots
from pyro_bmr.files import make_folder

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "shrinkage.png"
# π, and a slab of scale 3
HALF, TENTH = {"w_inclusion": 0.5, "w_precision": 1 / 9}, {"w_inclusion": 0.1, "w_precision": 1 / 9}
PANELS: dict[str, dict[str, tuple[bmr.priors.Prior, dict[str, float]]]] = {
    "Gaussian, Laplace, StudentT": {
        "Gaussian(2.0)": (bmr.Gaussian(2.0), {}),
        "Laplace(1.0)": (bmr.Laplace(1.0), {}),
        "StudentT(2.0, 1.0)": (bmr.StudentT(2.0, 1.0), {}),
    },
    "Horseshoe": {
        "τ = 1, no slab": (bmr.Horseshoe(1.0, None, ("weight",)), {}),
        "τ = 0.1, no slab": (bmr.Horseshoe(0.1, None, ("weight",)), {}),
        "τ = 0.1, slab 3": (bmr.Horseshoe(0.1, 3.0, ("weight",)), {}),
    },
    "SpikeAndSlab": {
        "π = 0.5": (bmr.SpikeAndSlab(), HALF),
        "π = 0.1": (bmr.SpikeAndSlab(), TENTH),
        "π = 0.1, temperature 0.5": (bmr.SpikeAndSlab(temperature=0.5), TENTH),
    },
}


def draws(
    prior: bmr.priors.Prior, given: dict[str, float], number: int = 1_000_000, seed: int = 0
) -> Tensor:
    """Weights drawn from the prior with its shared scales given."""
    torch.manual_seed(seed)
    values = {name: torch.tensor(value) for name, value in given.items()}
    return poutine.condition(lambda: prior.sample("w", (number, 1)), data=values)().flatten()


def posterior_mean(w: Tensor, estimates: Tensor) -> Tensor:
    r"""E[w | ŵ] = Σ wₛ N(ŵ; wₛ, 1) / Σ N(ŵ; wₛ, 1) for each estimate ŵ."""
    return torch.stack(
        [((-0.5 * (estimate - w).square()).softmax(0) * w).sum() for estimate in estimates]
    )


def main() -> None:
    plots.headless()
    estimates = torch.linspace(0, 6, 61)
    figure, panels = plt.subplots(1, len(PANELS), figsize=(9, 3), sharey=True)
    for axes, (title, curves) in zip(panels, PANELS.items(), strict=True):
        axes.plot(estimates, estimates, color="0.7", linewidth=1)
        for label, (prior, given) in curves.items():
            axes.plot(estimates, posterior_mean(draws(prior, given), estimates), label=label)
        axes.set(title=title, xlabel="estimate ŵ (noise 1)", ylim=(-0.2, 8.5))
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    panels[0].set_ylabel("E[w | ŵ]")
    make_folder(PICTURE.parent)
    figure.savefig(PICTURE, dpi=90, bbox_inches="tight")
    print(f"{os.path.relpath(PICTURE)}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
