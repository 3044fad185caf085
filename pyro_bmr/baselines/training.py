"""The baselines keep a training loop of their own, in plain torch: it is the evidence of fairness.

Mini-batches, Adam, a cosine schedule and one budget for all of them; no step of `fit` is in it.

Owns `Rows`, `held_out` and `train`, and `Trained`, what every method leaves behind. Next:
`plain.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_bmr.baselines.options import Budget
from pyro_bmr.baselines.targets import fitted_nll, plain_likelihood, plain_loss
from pyro_bmr.data.data_set import Data, validation_data
from pyro_bmr.errors import FitError
from pyro_bmr.fitting.batches import device_of
from pyro_bmr.fitting.fit import Fit
from pyro_bmr.fitting.rows import batch_sizes
from pyro_bmr.networks.modes import note_modes, set_training
from pyro_bmr.prediction.predict import Prediction
from pyro_bmr.priors import Prior
from pyro_bmr.reduction.result import Reduction

if TYPE_CHECKING:
    import pandas as pd

_AT_ONCE = 2000  # rows that go through a network at once when nothing is trained


@dataclass(frozen=True)
class Trained:
    """What a method leaves behind.

    `predict`: rows → prediction. `weights`: those of the exported network, by name. `network`: that
    network as plain torch, None for a program that is no network. `history`: a row per epoch, with
    columns as in `Fit.history` where they have a meaning. `batch_size`: rows of a step. `seconds`:
    of the training. `elbo`, `delta_f`: nats, NaN where there is none. `extra`: further figures of
    the method, each a column of the table. `fit`, `declared`, `reduction`: the fit of a posterior,
    its prior, and the reduction after it, where there is one. `cautions`: what may mislead in it.
    `trials`: temperature → held-out NLL, nats per row, where trials chose the temperature.
    """

    predict: Callable[[Tensor], Prediction]
    weights: dict[str, Tensor]
    network: nn.Module | None
    history: pd.DataFrame
    batch_size: int
    seconds: float
    elbo: float = float("nan")
    delta_f: float = float("nan")
    extra: dict[str, float] = field(default_factory=dict)
    fit: Fit | None = None
    declared: Prior | None = None
    reduction: Reduction | None = None
    cautions: tuple[str, ...] = ()
    trials: dict[float, float] = field(default_factory=dict)


class Rows(NamedTuple):
    """The rows to train on, and those held out, if any."""

    x: Tensor
    y: Tensor
    x_held: Tensor | None = None
    y_held: Tensor | None = None
    likelihood: Any = None  # by whose density a network is trained (`plain_likelihood`)

    def on(self, device: torch.device) -> Rows:
        """The same rows on a device."""
        x, y = (None if t is None else t.to(device) for t in (self.x_held, self.y_held))
        return Rows(self.x.to(device), self.y.to(device), x, y, self.likelihood)


def held_out(data: Data, fraction: float | None) -> Rows:
    """The training rows, without the `fraction` of them that is held out; the same ones for every
    seed. None holds nothing out. Validation rows that the data came with are taken instead, and all
    training rows are trained on.
    """
    likelihood = plain_likelihood(data)
    if fraction is None:
        return Rows(data.x_train, data.y_train, likelihood=likelihood)
    split = validation_data(data, fraction)
    return Rows(split.x_train, split.y_train, split.x_test, split.y_test, likelihood)


def train(
    net: nn.Module,
    rows: Rows,
    budget: Budget,
    progress: bool = False,
    *,
    loss: Callable[[Tensor, Tensor, float], Tensor] | None = None,
    after: Callable[[int, int], None] | None = None,
    groups: list[dict[str, Any]] | None = None,
    first: int = 0,
    keep_best: bool = False,
) -> pd.DataFrame:
    """Trains `net` in place and returns a row per epoch: epoch, step, expected_log_likelihood
    (nats, of all training rows, at the weights as they moved), kept (fraction of the parameters
    that are not 0), learning_rate and, with rows held out, validation_nll (nats per row).

    Order of the data and whatever else is random come from torch's global generator, which the
    caller seeds.

    Args:
        loss: (outputs, y, fraction of the training that is done) → nats per row. Default: that of
            `plain_loss`.
        after: called as after(step, steps) when a step is done.
        groups: the parameter groups of Adam. Default: all parameters of `net`.
        first: the steps that are taken as done: the training starts at that place of the schedule,
            with Adam's moments at 0.
        keep_best: at the end puts back the parameters and buffers of the epoch with the least
            validation_nll.

    Raises:
        FitError: the loss is no longer finite.
    """
    import pandas as pd

    training = _Training(net, rows, budget, first, loss, after, groups)
    history: list[dict[str, float]] = []
    best, best_state = math.inf, None
    note_modes(net)
    with tqdm(
        total=training.total, initial=first, disable=not progress, unit="step", leave=False
    ) as bar:
        for epoch in range(first // training.steps + 1, budget.epochs + 1):
            history.append(training.epoch(epoch, bar))
            nll = history[-1].get("validation_nll", math.inf)
            if keep_best and nll < best:
                best, best_state = nll, copy.deepcopy(net.state_dict())
    if best_state is not None:
        net.load_state_dict(best_state)
    return pd.DataFrame(history)


class _Training:
    """Where a training stands: its optimiser, its schedule and the steps that are done."""

    def __init__(
        self,
        net: nn.Module,
        rows: Rows,
        budget: Budget,
        first: int,
        loss: Callable[[Tensor, Tensor, float], Tensor] | None,
        after: Callable[[int, int], None] | None,
        groups: list[dict[str, Any]] | None,
    ) -> None:
        rows = rows.on(device_of(net))
        self.net, self.rows, self.loss, self.after = net, rows, loss, after
        self.optimiser = torch.optim.Adam(
            groups or [{"params": list(net.parameters())}],
            lr=budget.learning_rate,
            weight_decay=budget.weight_decay,
            fused=True,
        )
        self.sizes = batch_sizes(len(rows.x), budget.batch_size)
        self.steps, self.step = len(self.sizes), first
        self.total = total = budget.epochs * self.steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda done: 0.5 * (1 + math.cos(math.pi * (first + done) / total))
        )
        self.rate = budget.learning_rate

    def epoch(self, epoch: int, bar: tqdm) -> dict[str, float]:
        """Takes the steps of an epoch that are not done, and returns its row of the history."""
        rows = self.rows
        set_training(self.net, True)
        done = self.step - (epoch - 1) * self.steps
        summed = 0.0
        for index in torch.randperm(len(rows.x)).split(self.sizes)[done:]:
            summed += self._step(rows.x[index], rows.y[index])
            bar.update()
        if not math.isfinite(summed):
            raise FitError(
                f"epoch {epoch}: the loss is not finite; lower the learning rate, got"
                f" {self.rate:g}, or check the scale of the data"
            )
        self.net.eval()
        row = {
            "epoch": epoch,
            "step": self.step,
            "expected_log_likelihood": -fitted_nll(
                summed / (self.steps - done), rows.y, rows.likelihood
            )
            * len(rows.x),
            "kept": kept(self.net),
            "learning_rate": self.optimiser.param_groups[0]["lr"],
        }
        if rows.x_held is not None and rows.y_held is not None:
            outputs = outputs_of(self.net, rows.x_held)
            held = float(plain_loss(outputs, rows.y_held, rows.likelihood))
            row["validation_nll"] = fitted_nll(held, rows.y_held, rows.likelihood)
        return row

    def _step(self, x: Tensor, y: Tensor) -> float:
        """Takes a step, and returns `plain_loss` before it, nats per row."""
        self.optimiser.zero_grad()
        outputs = self.net(x)
        usual = plain_loss(outputs, y, self.rows.likelihood)
        nats = usual if self.loss is None else self.loss(outputs, y, self.step / self.total)
        nats.backward()
        self.optimiser.step()
        self.schedule.step()
        self.step += 1
        if self.after is not None:
            with torch.no_grad():
                self.after(self.step, self.total)
        return float(usual.detach())


def kept(net: nn.Module) -> float:
    """The fraction of all parameters, biases included, that are not zero."""
    return sum(int(p.count_nonzero()) for p in net.parameters()) / sum(
        p.numel() for p in net.parameters()
    )


@torch.no_grad()
def outputs_of(net: nn.Module, x: Tensor) -> Tensor:
    """What the network returns for every row, batch by batch, on the device of the rows."""
    device = device_of(net)
    return torch.cat([net(batch.to(device)).to(x.device) for batch in x.split(_AT_ONCE)])
