"""The variance of the gradient under each estimator of `MeanField`, and its time: `python
benchmarks/gradient_variance.py`.

784-300-100-10 on Fashion-MNIST, prior N(0, 0.05²): 150 steps of training, then 15 draws at one
batch of 128.
"""

import sys
import time
from pathlib import Path

import torch

import pyro_bmr as bmr
from pyro_bmr.likelihoods.whole_data import WholeData

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.mlp import build

BATCH, STEPS, DRAWS = 128, 150, 15


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = bmr.load("fashion-mnist")
    rows = len(data.x_train)
    program = WholeData(rows, BATCH)(build(data, bmr.Gaussian(0.05)))
    batch = data.x_train[:BATCH], data.y_train[:BATCH]
    guide = bmr.MeanField(program, *batch, estimator="local")
    optimizer = torch.optim.Adam(guide.parameters(), lr=3e-3)
    for _ in range(STEPS):
        index = torch.randint(rows, (BATCH,))
        optimizer.zero_grad()
        loss(program, guide, data.x_train[index], data.y_train[index]).backward()
        optimizer.step()
    for guide.estimator in ("weight", "antithetic", "local", "flipout"):
        gradients, seconds = [], []
        for _ in range(DRAWS):
            start = time.process_time()
            gradients.append(
                torch.stack(
                    torch.autograd.grad(
                        loss(program, guide, *batch) / rows, [guide.loc, guide.log_scale]
                    )
                )
            )
            seconds.append(time.process_time() - start)
        means, scales = torch.stack(gradients).var(0).sum(1).tolist()
        print(
            f"{guide.estimator}: variance of the means {means:.2e}, of the log scales {scales:.2e},"
            f" {1e3 * sorted(seconds)[DRAWS // 4]:.1f} ms of CPU"
        )


def loss(program, guide, x, y):
    noise = torch.randn_like(guide.loc) if guide.estimator == "antithetic" else None
    draws = [
        bmr.fitting.elbo_terms(program, guide, x, y, noise=n)
        for n in ((noise, -noise) if noise is not None else (None,))
    ]
    return sum(terms.kl - terms.expected_log_likelihood for terms in draws) / len(draws)


if __name__ == "__main__":
    main()
