"""A plain network with early stopping and with temperature scaling (Guo et al. 2017), and the deep
ensemble of such (Lakshminarayanan et al. 2017).

Owns `Calibrated`, `PlainOptions` and `EnsembleOptions`, `plain`, `deep_ensemble`, and
`trained_network`, which all methods of one network share. Next: `magnitude.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyro_bmr.baselines.options import Budget, is_between
from pyro_bmr.baselines.targets import held_out_scale, predictive, residual
from pyro_bmr.baselines.training import Rows, Trained, held_out, outputs_of, train
from pyro_bmr.checks import is_whole
from pyro_bmr.data.data_set import Data
from pyro_bmr.prediction.predict import prediction_of

if TYPE_CHECKING:
    import pandas as pd

MakeNetwork = Callable[[int], nn.Module]
"""seed → a new network to train; it leaves torch's global generator where the start weights left
it, so that a training follows from the seed too.
"""


@dataclass(frozen=True)
class Calibrated(Budget):
    """A budget with temperature scaling: `calibrate` trains without the rows that are held out, the
    fraction `validation` of the training rows or those that the data came with, and divides the
    logits by the one temperature that is best there. `scale` is a temperature known beforehand,
    from such a run: then nothing is held out.

    The noise of real targets is the root mean square of the residuals of the training rows, and
    `scale` is the factor on it; `calibrate` takes that of the held-out rows. Labels of yes or no
    have a temperature of their logits; counts and a noise that the network gives have a `scale` of
    1.
    """

    validation: float = 1 / 6
    calibrate: bool = False
    scale: float = 1.0

    def rules(self) -> dict[str, tuple[bool, str]]:
        good = is_between(self.validation, 0, 1) and 0 < self.validation < 1
        return {
            **super().rules(),
            "validation": (good, "0 < validation < 1"),
            "calibrate": (isinstance(self.calibrate, bool), "true or false"),
            "scale": (
                is_between(self.scale, 0.05, 20) and (self.scale == 1 or not self.calibrate),
                "0.05 <= scale <= 20, and not calibrate as well",
            ),
        }

    def rows(self, data: Data) -> Rows:
        """The rows to train on, and those held out if anything asks for them."""
        return held_out(data, self.validation if self.calibrate else None)


@dataclass(frozen=True)
class PlainOptions(Calibrated):
    """`early_stopping`: keeps the epoch with the least NLL on the rows held out."""

    early_stopping: bool = False

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {
            **super().rules(),
            "early_stopping": (isinstance(self.early_stopping, bool), "true or false"),
        }

    def rows(self, data: Data) -> Rows:
        return held_out(data, self.validation if self.calibrate or self.early_stopping else None)


@dataclass(frozen=True)
class EnsembleOptions(PlainOptions):
    """`members`: networks, each with start weights and an order of the data of its own. The
    `epochs` are those of each member.
    """

    members: int = 3

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {**super().rules(), "members": (is_whole(self.members, 1), "a whole number >= 1")}


def trained_network(
    net: nn.Module,
    history: pd.DataFrame,
    seconds: float,
    rows: Rows,
    options: Calibrated,
    extra: dict[str, float] | None = None,
) -> Trained:
    """What a method leaves behind whose prediction is that of one network, with the temperature
    or the noise that its options ask for.
    """
    net.eval()
    real = rows.y.is_floating_point() and rows.likelihood is None
    noise = residual(outputs_of(net, rows.x), rows.y) if real else 1.0
    scale = options.scale
    if options.calibrate and rows.x_held is not None and rows.y_held is not None:
        held = outputs_of(net, rows.x_held)
        scale = held_out_scale(held, rows.y_held, noise, rows.likelihood)
    return Trained(
        predictive(partial(outputs_of, net), rows.y, scale, noise, rows.likelihood),
        dict(net.state_dict()),
        net,
        history,
        options.batch_size,
        seconds,
        extra={"scale": scale, **(extra or {})},
    )


def plain(
    make: MakeNetwork, data: Data, seed: int, options: PlainOptions, progress: bool = False
) -> Trained:
    """A network trained by maximum likelihood, penalised by `weight_decay`. `extra`: scale (the
    temperature; 1 if it is not `calibrate`), best_epoch.
    """
    clock = time.perf_counter()
    rows = options.rows(data)
    net = make(seed)
    history = train(net, rows, options, progress, keep_best=options.early_stopping)
    best = int(history["validation_nll"].argmin()) if options.early_stopping else len(history) - 1
    return trained_network(
        net,
        history,
        time.perf_counter() - clock,
        rows,
        options,
        {"best_epoch": float(history["epoch"].iloc[best])},
    )


class MeanOfNetworks(nn.Module):
    """The log of the mean of the members' class probabilities, each member's logits divided by its
    own temperature.
    """

    def __init__(self, members: list[nn.Module], scales: list[float]) -> None:
        super().__init__()
        self.members, self.scales = nn.ModuleList(members), scales

    def member_probs(self, x: Tensor) -> Tensor:
        """(members, rows, classes)."""
        return torch.stack(
            [
                (outputs_of(member, x) / scale).softmax(1)
                for member, scale in zip(self.members, self.scales, strict=True)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return (
            torch.stack(
                [
                    (member(x) / scale).softmax(1)
                    for member, scale in zip(self.members, self.scales, strict=True)
                ]
            )
            .mean(0)
            .log()
        )


def deep_ensemble(
    make: MakeNetwork, data: Data, seed: int, options: EnsembleOptions, progress: bool = False
) -> Trained:
    """Networks trained one after the other, whose probabilities are averaged; `Trained.network`
    holds them all, and so do its parameters.

    Source: Lakshminarayanan, Pritzel & Blundell 2017, arXiv 1612.01474, without adversarial
    examples. The history is that of the last member.
    """
    import pandas as pd

    clock = time.perf_counter()
    members, history = [], pd.DataFrame()
    for k in range(options.members):
        one = plain(make, data, seed * 1009 + k, options, progress)
        members.append(one)
        history = one.history
    nets = [one.network for one in members if one.network is not None]
    net = MeanOfNetworks(nets, [one.extra["scale"] for one in members]).eval()
    extra = {
        "members": float(options.members),
        "epochs_total": float(options.members * options.epochs),
    }
    return Trained(
        lambda x: prediction_of([(net.member_probs(x),)], options.members),
        dict(net.state_dict()),
        net,
        history,
        options.batch_size,
        time.perf_counter() - clock,
        extra=extra,
    )
