"""What a step of `fit` costs under each prior, as Markdown: `python benchmarks/prior_steps.py`.

784-300-100-10, 128 rows, one thread, processor time, the median of 60 steps in turns, as a multiple
of the step under `Gaussian()`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyro
import torch

from pyro_bmr.priors.names import PRIORS

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.turns import enlarged_digits, measure
from benchmarks.step import mlp, ours


def main(rounds: int = 15) -> None:
    torch.manual_seed(0)
    net, (x, y) = mlp(784, 300, 100, 10), (part[:128].clone() for part in enlarged_digits())
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        steps = {name: ours(net, x, y, prior=prior) for name, prior in PRIORS.items()}
        found = measure(steps, x, y, rounds)
    plain = found["gaussian"]["processor_median"]
    print("| prior | step |\n|---|---|")
    for name, times in found.items():
        print(f"| `{name}` | {times['processor_median'] / plain:.1f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
