"""The one training of all baselines: mini-batches, Adam and a cosine schedule in plain torch, for
one budget.

Owns `Budget`, `Rows`, `held_out` and `train`, the options by name (`options_of`), and `Trained`,
what every method leaves behind. Next: `point.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pyro_bmr.data.data_set import Data, validation_data
from pyro_bmr.errors import FitError, ModelError, OptionError, described
from pyro_bmr.fitting.rows import batch_sizes
from pyro_bmr.networks.modes import note_modes, set_training
from pyro_bmr.prediction.predict import Prediction

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
    the method, each a column of the table.
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


@dataclass(frozen=True)
class Budget:
    """What every baseline is given: `epochs` over the training rows in mini-batches of
    `batch_size`, Adam from `learning_rate` down a cosine to 0, with `weight_decay` as its L2
    penalty (per row, as torch has it: ½ weight_decay ‖w‖²).
    """

    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        broken = [
            f"{name}={described(getattr(self, name))} ({wanted})"
            for name, (good, wanted) in self.rules().items()
            if not good
        ]
        if broken:
            raise ModelError(f"{', '.join(broken)} is wanted")

    def rules(self) -> dict[str, tuple[bool, str]]:
        """Option → whether its value is in its range, and that range."""
        return {
            "epochs": (is_whole(self.epochs, 1), "a whole number >= 1"),
            "batch_size": (is_whole(self.batch_size, 1), "a whole number >= 1"),
            "learning_rate": (
                is_between(self.learning_rate, 0, math.inf) and 0 < self.learning_rate < math.inf,
                "a finite number > 0",
            ),
            "weight_decay": (
                is_between(self.weight_decay, 0, math.inf) and self.weight_decay < math.inf,
                "a finite number >= 0",
            ),
        }


def is_whole(value: Any, least: int) -> bool:
    """Whether an option is a whole number of at least that."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_between(value: Any, low: float, high: float) -> bool:
    """Whether an option is a number in low … high."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


Options = TypeVar("Options", bound=Budget)


def options_of(kind: type[Options], method: str, given: Mapping[str, Any]) -> Options:
    """The options of a method from their names.

    Raises:
        OptionError: the method has no such option.
        ModelError: a value is out of its range.
    """
    names = [f.name for f in fields(kind)]
    if unknown := set(given) - set(names):
        raise OptionError(method, unknown, names)
    return kind(**given)


class Rows(NamedTuple):
    """The rows to train on, and those held out, if any."""

    x: Tensor
    y: Tensor
    x_held: Tensor | None = None
    y_held: Tensor | None = None


def held_out(data: Data, fraction: float | None) -> Rows:
    """The training rows, without the `fraction` of them that is held out; the same ones for every
    seed. None holds nothing out. Validation rows that the data came with are taken instead, and all
    training rows are trained on.
    """
    if fraction is None:
        return Rows(data.x_train, data.y_train)
    split = validation_data(data, fraction)
    return Rows(split.x_train, split.y_train, split.x_test, split.y_test)


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
        loss: (outputs, y, fraction of the training that is done) → nats per row. Default: the cross
            entropy.
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

    optimiser = torch.optim.Adam(
        groups or [{"params": list(net.parameters())}],
        lr=budget.learning_rate,
        weight_decay=budget.weight_decay,
        fused=True,
    )
    sizes = batch_sizes(len(rows.x), budget.batch_size)
    total = budget.epochs * len(sizes)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda done: 0.5 * (1 + math.cos(math.pi * (first + done) / total))
    )
    history: list[dict[str, float]] = []
    best, best_state = math.inf, None
    note_modes(net)
    with tqdm(total=total, initial=first, disable=not progress, unit="step", leave=False) as bar:
        step = first
        for epoch in range(first // len(sizes) + 1, budget.epochs + 1):
            set_training(net, True)
            summed = 0.0
            done = step - (epoch - 1) * len(sizes)
            for index in torch.randperm(len(rows.x)).split(sizes)[done:]:
                optimiser.zero_grad()
                outputs, y = net(rows.x[index]), rows.y[index]
                nats = (
                    F.cross_entropy(outputs, y) if loss is None else loss(outputs, y, step / total)
                )
                nats.backward()
                optimiser.step()
                schedule.step()
                step += 1
                if after is not None:
                    with torch.no_grad():
                        after(step, total)
                summed += float(
                    nats.detach() if loss is None else F.cross_entropy(outputs.detach(), y)
                )
                bar.update()
            if not math.isfinite(summed):
                raise FitError(
                    f"epoch {epoch}: the loss is not finite; lower the learning rate, got"
                    f" {budget.learning_rate:g}, or check the scale of the data"
                )
            net.eval()
            rate = optimiser.param_groups[0]["lr"]
            row = {
                "epoch": epoch,
                "step": step,
                "expected_log_likelihood": -summed / (len(sizes) - done) * len(rows.x),
                "kept": kept(net),
            }
            history.append({**row, "learning_rate": rate})
            if rows.x_held is not None and rows.y_held is not None:
                nll = float(F.cross_entropy(logits(net, rows.x_held), rows.y_held.long()))
                history[-1]["validation_nll"] = nll
                if keep_best and nll < best:
                    best, best_state = nll, copy.deepcopy(net.state_dict())
    if best_state is not None:
        net.load_state_dict(best_state)
    return pd.DataFrame(history)


def kept(net: nn.Module) -> float:
    """The fraction of all parameters, biases included, that are not zero."""
    return sum(int(p.count_nonzero()) for p in net.parameters()) / sum(
        p.numel() for p in net.parameters()
    )


@torch.no_grad()
def logits(net: nn.Module, x: Tensor) -> Tensor:
    """What the network returns for every row, batch by batch."""
    return torch.cat([net(batch) for batch in x.split(_AT_ONCE)])
