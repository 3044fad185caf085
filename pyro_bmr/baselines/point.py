"""A point estimate with early stopping and with temperature scaling (Guo et al. 2017), and the deep ensemble of such (Lakshminarayanan et al. 2017).

Owns `Scaled`, `PointOptions` and `EnsembleOptions`, `point`, `deep_ensemble`, and `best_temperature`, which all point estimates share.
Next: `magnitude.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_bmr.baselines.training import Budget, Rows, Trained, held_out, is_between, is_whole, logits, train
from pyro_bmr.data_set import Data
from pyro_bmr.prediction import Prediction, prediction_of

MakeNetwork = Callable[[int], nn.Module]
"""seed → a new network to train; it leaves torch's global generator where the start weights left it, so that a training follows from the seed too."""


@dataclass(frozen=True)
class Scaled(Budget):
    """A budget with temperature scaling: `scaled` trains without the rows that are held out, the fraction `validation` of the training rows or those that the
    data came with, and divides the logits by the one temperature that is best there."""

    validation: float = 1 / 6
    scaled: bool = False

    def rules(self) -> dict[str, tuple[bool, str]]:
        good = is_between(self.validation, 0, 1) and 0 < self.validation < 1
        return {**super().rules(), "validation": (good, "0 < validation < 1"), "scaled": (isinstance(self.scaled, bool), "true or false")}

    def rows(self, data: Data) -> Rows:
        """The rows to train on, and those held out if anything asks for them."""
        return held_out(data, self.validation if self.scaled else None)


@dataclass(frozen=True)
class PointOptions(Scaled):
    """`early_stopping`: keeps the epoch with the least NLL on the rows held out."""

    early_stopping: bool = False

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {**super().rules(), "early_stopping": (isinstance(self.early_stopping, bool), "true or false")}

    def rows(self, data: Data) -> Rows:
        return held_out(data, self.validation if self.scaled or self.early_stopping else None)


@dataclass(frozen=True)
class EnsembleOptions(PointOptions):
    """`members`: networks, each with start weights and an order of the data of its own. The `epochs` are those of each member."""

    members: int = 3

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {**super().rules(), "members": (is_whole(self.members, 1), "a whole number >= 1")}


def best_temperature(logits: Tensor, y: Tensor) -> float:
    r"""The T > 0 with the least mean cross entropy of softmax(logits / T), between 0.05 and 20, by golden section in log T.

    The cross entropy is convex in 1/T, so that it has one minimum. Source: Guo et al. 2017, arXiv 1706.04599.
    """
    low, high, ratio = math.log(0.05), math.log(20.0), (math.sqrt(5) - 1) / 2
    logits = logits.double()
    while high - low > 1e-4:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        losses = [float(F.cross_entropy(logits / math.exp(t), y.long())) for t in (a, b)]
        low, high = (low, b) if losses[0] < losses[1] else (a, high)
    return math.exp((low + high) / 2)


def trained_point(net: nn.Module, history: pd.DataFrame, seconds: float, rows: Rows, scaled: bool, extra: dict[str, float] | None = None) -> Trained:
    """What a method leaves behind whose prediction is that of one network; `scaled` fits the temperature on the rows held out."""
    net.eval()
    scale = best_temperature(logits(net, rows.x_held), rows.y_held) if scaled and rows.x_held is not None and rows.y_held is not None else 1.0

    def predict(x: Tensor) -> Prediction:
        return prediction_of([((logits(net, x) / scale).softmax(1),)], 1)

    return Trained(predict, dict(net.state_dict()), net, history, seconds, extra={"scale": scale, **(extra or {})})


def point(make: MakeNetwork, data: Data, seed: int, options: PointOptions, progress: bool = False) -> Trained:
    """A network trained by maximum likelihood, penalised by `weight_decay`. `extra`: scale (the temperature; 1 if it is not `scaled`), best_epoch."""
    clock = time.perf_counter()
    rows = options.rows(data)
    net = make(seed)
    history = train(net, rows, options, progress, keep_best=options.early_stopping)
    best = int(history["validation_nll"].argmin()) if options.early_stopping else len(history) - 1
    return trained_point(net, history, time.perf_counter() - clock, rows, options.scaled, {"best_epoch": float(history["epoch"].iloc[best])})


class MeanOfNetworks(nn.Module):
    """The log of the mean of the members' class probabilities, each member's logits divided by its own temperature."""

    def __init__(self, members: list[nn.Module], scales: list[float]) -> None:
        super().__init__()
        self.members, self.scales = nn.ModuleList(members), scales

    def member_probs(self, x: Tensor) -> Tensor:
        """(members, rows, classes)."""
        return torch.stack([(logits(member, x) / scale).softmax(1) for member, scale in zip(self.members, self.scales, strict=True)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(member(x) / scale).softmax(1) for member, scale in zip(self.members, self.scales, strict=True)]).mean(0).log()


def deep_ensemble(make: MakeNetwork, data: Data, seed: int, options: EnsembleOptions, progress: bool = False) -> Trained:
    """Networks trained one after the other, whose probabilities are averaged; `Trained.network` holds them all, and so do its parameters.

    Source: Lakshminarayanan, Pritzel & Blundell 2017, arXiv 1612.01474, without adversarial examples. The history is that of the last member.
    """
    clock = time.perf_counter()
    members, history = [], pd.DataFrame()
    for k in range(options.members):
        one = point(make, data, seed * 1009 + k, options, progress)
        members.append(one)
        history = one.history
    nets = [one.network for one in members if one.network is not None]
    net = MeanOfNetworks(nets, [one.extra["scale"] for one in members]).eval()
    extra = {"members": float(options.members), "epochs_total": float(options.members * options.epochs)}
    return Trained(
        lambda x: prediction_of([(net.member_probs(x),)], options.members), dict(net.state_dict()), net, history, time.perf_counter() - clock, extra=extra
    )
