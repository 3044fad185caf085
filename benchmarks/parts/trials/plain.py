"""The reference of `benchmarks/defaults.py`: a network without a posterior.

It stops early by a sixth of the training rows, and has a temperature or a noise scale from the same
rows. A linear regression is the lasso, its penalty from cross-validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from parts.trials.problems import Problem
from torch.nn import functional as F

import pyro_bmr as bmr
from pyro_bmr.prediction.calibration import best_temperature


def plain_prediction(
    problem: Problem, data: bmr.Data, seed: int, steps: float, batch: int
) -> Callable[[torch.Tensor], Any]:
    """What predicts from rows."""
    if problem.model == "linear_regression":
        return _lasso(data)
    return _stopped_early(problem, data, seed, steps, batch)


def _lasso(data: bmr.Data) -> Callable[[torch.Tensor], Any]:
    from sklearn.linear_model import LassoCV

    model = LassoCV(cv=5, random_state=0).fit(data.x_train.numpy(), data.y_train.numpy())

    def mean(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(model.predict(x.numpy())).float()

    freedom = max(len(data.x_train) - int((model.coef_ != 0).sum()) - 1, 1)
    noise = math.sqrt(float((mean(data.x_train) - data.y_train).square().sum()) / freedom)
    return lambda x: Normal(mean(x), noise)


@dataclass(frozen=True)
class Normal:
    mean: torch.Tensor
    noise: float

    def log_prob(self, y: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(self.mean, self.noise).log_prob(y)


@dataclass(frozen=True)
class Classes:
    probs: torch.Tensor

    def log_prob(self, y: torch.Tensor) -> torch.Tensor:
        picked = self.probs.gather(1, y[:, None])[:, 0]
        return picked.clamp(min=torch.finfo(picked.dtype).tiny).log()  # as `predict` counts it


def _stopped_early(
    problem: Problem, data: bmr.Data, seed: int, steps: float, batch: int
) -> Callable[[torch.Tensor], Any]:
    torch.manual_seed(seed)
    net = problem.build(data, bmr.Gaussian()).net
    order = torch.randperm(len(data.x_train))
    held, kept = order[: len(order) // 6], order[len(order) // 6 :]
    x, y = data.x_train[kept], data.y_train[kept]
    x_held, y_held = data.x_train[held], data.y_train[held]
    classes = data.classes is not None

    def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out, y) if classes else F.mse_loss(out[:, 0], y)

    def outputs(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([net(part) for part in x.split(2000)])

    epochs = max(1, round(steps / math.ceil(len(x) / batch)))
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3, fused=True)
    best, state, looked = math.inf, None, max(1, epochs // 100)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            optimiser.zero_grad()
            loss(net(x[rows]), y[rows]).backward()
            optimiser.step()
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * (epoch + 1) / epochs))
        now = float(loss(outputs(x_held), y_held)) if epoch % looked == 0 else math.inf
        if now < best:
            best, state = now, {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    if classes:
        scale = best_temperature(outputs(x_held), y_held)
        return lambda x: Classes((outputs(x) / scale).softmax(1))
    return lambda x: Normal(outputs(x)[:, 0], math.sqrt(best))
