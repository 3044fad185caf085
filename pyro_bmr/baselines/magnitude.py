"""Pruning by magnitude: gradually during one training (Zhu & Gupta 2017), or in rounds with
rewinding (Frankle et al. 2020).

Owns `Pruning`, `MagnitudeOptions`, `RewindingOptions`, `magnitude` and `rewinding`. Next:
`dropout.py`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_bmr.baselines.options import Budget, is_between
from pyro_bmr.baselines.plain import Calibrated, MakeNetwork, trained_network
from pyro_bmr.baselines.training import Trained, train
from pyro_bmr.checks import is_whole
from pyro_bmr.data.data_set import Data
from pyro_bmr.pruning import cubic
from pyro_bmr.reduction.decisions import lowest


@dataclass(frozen=True)
class Gradual(Budget):
    """`kept`: the fraction of all parameters, biases included, that is not zero at the end. It
    falls on a cubic schedule from 1 at the fraction `start` of the training to `kept` at `stop`, in
    steps of `prune_every` epochs.

    Source: Zhu & Gupta 2017, arXiv 1710.01878.
    """

    kept: float = 0.1
    start: float = 0.0
    stop: float = 0.7
    prune_every: float = 0.25

    def rules(self) -> dict[str, tuple[bool, str]]:
        ordered = (
            is_between(self.start, 0, 1) and is_between(self.stop, 0, 1) and self.start < self.stop
        )
        return {
            **super().rules(),
            "kept": (is_between(self.kept, 0, 1), "0 <= kept <= 1"),
            "start": (ordered, "0 <= start < stop"),
            "stop": (ordered, "start < stop <= 1"),
            "prune_every": (
                is_between(self.prune_every, 0, float("inf")) and self.prune_every > 0,
                "a number of epochs > 0",
            ),
        }

    def due(self, step: int, total: int) -> float | None:
        """The kept fraction to prune to after that step, or None."""
        last = round(self.stop * total)
        interval = max(round(self.prune_every * total / self.epochs), 1)
        if (
            self.kept == 1
            or not self.start * total <= step <= self.stop * total + 1
            or (step % interval and step != last)
        ):
            return None
        return cubic(self.kept, step / total if step < last else self.stop, self.start, self.stop)


@dataclass(frozen=True)
class MagnitudeOptions(Gradual, Calibrated):
    """The options of `magnitude`."""


@dataclass(frozen=True)
class RewindingOptions(Calibrated):
    """`kept`: as for `magnitude`. `rounds` of pruning, each to the same part of what is left.
    `rewind`: the fraction of a training after which the weights are those to rewind to; 0 is the
    start weights. The `epochs` are those of each of the rounds + 1 trainings.
    """

    kept: float = 0.1
    rounds: int = 3
    rewind: float = 0.05

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {
            **super().rules(),
            "kept": (is_between(self.kept, 0, 1) and self.kept > 0, "0 < kept <= 1"),
            "rounds": (is_whole(self.rounds, 1), "a whole number >= 1"),
            "rewind": (is_between(self.rewind, 0, 1) and self.rewind < 1, "0 <= rewind < 1"),
        }


class Pruning:
    """Masks over the parameters of a network, ranked all together by a score, by default their
    magnitude; a pruned entry remains pruned.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.masks = [torch.ones_like(p) for p in parameters]

    @torch.no_grad()
    def prune(self, kept: float, scores: list[Tensor] | None = None) -> None:
        """Sets all but the fraction `kept` of the entries to zero, those of the least scores (≥ 0)
        first.
        """
        scores = [p.abs() for p in self.parameters] if scores is None else scores
        ranks = torch.cat(
            [
                score.masked_fill(mask == 0, -1.0).flatten()
                for score, mask in zip(scores, self.masks, strict=True)
            ]
        )
        kept_entries = (~lowest(ranks, ranks.numel() - round(kept * ranks.numel()))).split(
            [mask.numel() for mask in self.masks]
        )
        self.masks = [
            (part.view_as(mask) & (mask > 0)).to(mask)
            for part, mask in zip(kept_entries, self.masks, strict=True)
        ]
        self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Puts every pruned entry back to exactly zero, after a step that moved it."""
        for parameter, mask in zip(self.parameters, self.masks, strict=True):
            parameter.mul_(mask)

    def on(
        self, schedule: Gradual, scores: Callable[[], list[Tensor]] | None = None
    ) -> Callable[[int, int], None]:
        """What to call after each step so that the pruning follows the schedule."""

        def after(step: int, total: int) -> None:
            target = schedule.due(step, total)
            if target is not None:
                self.prune(target, scores() if scores is not None else None)
            else:
                self.hold()

        return after


def magnitude(
    make: MakeNetwork, data: Data, seed: int, options: MagnitudeOptions, progress: bool = False
) -> Trained:
    """Gradual pruning of the parameters of least magnitude, all layers together, biases too; `kept`
    1 is the dense network. `extra`: scale.
    """
    clock = time.perf_counter()
    rows = options.rows(data)
    net = make(seed)
    history = train(net, rows, options, progress, after=Pruning(list(net.parameters())).on(options))
    return trained_network(net, history, time.perf_counter() - clock, rows, options)


def rewinding(
    make: MakeNetwork, data: Data, seed: int, options: RewindingOptions, progress: bool = False
) -> Trained:
    """Iterative magnitude pruning with rewinding: train, prune, put the survivors and the learning
    rate back to where they were early on, train again.

    After round k of n the fraction kept^(k/n) is left. The history is that of all trainings, one
    after the other. `extra`: scale, epochs_total. Source: Frankle, Dziugaite, Roy & Carbin 2020,
    arXiv 1912.05671.
    """
    import pandas as pd

    clock = time.perf_counter()
    rows = options.rows(data)
    net = make(seed)
    pruning = Pruning(list(net.parameters()))
    early = copy.deepcopy(net.state_dict())
    steps = 0

    def after(step: int, total: int) -> None:
        nonlocal early, steps
        pruning.hold()
        if step == round(options.rewind * total):
            early, steps = copy.deepcopy(net.state_dict()), step

    history = [train(net, rows, options, progress, after=after)]
    for k in range(1, options.rounds + 1):
        pruning.prune(options.kept ** (k / options.rounds))
        net.load_state_dict(early)
        pruning.hold()
        history.append(
            train(
                net, rows, options, progress, after=lambda step, total: pruning.hold(), first=steps
            )
        )
    per_epoch = len(history[0]) and int(history[0]["step"].iloc[-1]) // options.epochs
    extra = {
        "epochs_total": options.epochs * (options.rounds + 1) - options.rounds * steps / per_epoch
    }
    return trained_network(
        net,
        pd.concat(history, ignore_index=True),
        time.perf_counter() - clock,
        rows,
        options,
        extra,
    )
