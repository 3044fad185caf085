"""A data set as tensors ready to fit, its inputs standardised by the moments of the training rows.

Owns `Data`; `split_of` and `split_rows`, which rows are held out; and `validation_data`, which
replaces the test rows by validation rows. Next: `standardised.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.data.targets import outputs_of
from pyro_bmr.errors import FitError, described, holds
from pyro_bmr.likelihoods import Categorical, Normal
from pyro_bmr.likelihoods.likelihood import Likelihood, read_inputs

_SPLIT_SEED = 0


@dataclass(frozen=True)
class Data:
    """A data set split into training and test rows.

    x: float32, (n, features), (n, channels, height, width) or (n, length); standardised.

    y: int64 classes from 0, or float32 standardised targets. A prediction times `target_scale` plus
    `target_mean` is in the original units; with several targets a row, both are tensors, a number
    for each. The command line, `compare` and `study` score in the original units (rmse ·
    target_scale, nll + log target_scale). An ELBO, and the `validation_nll` of a fit's history,
    refer to the y that the fit was given.

    `family`: the likelihood, None for that of the task. Counts, and zeros and ones, are float32 as
    they came. Columns of x that it reads, such as an exposure, keep their values.

    `x_val` and `y_val`: validation rows, if the data came with some.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int | None = None
    x_val: Tensor | None = None
    y_val: Tensor | None = None
    target_mean: float | Tensor = 0.0
    target_scale: float | Tensor = 1.0
    family: Likelihood | None = None

    __repr__ = described

    @property
    def task(self) -> Literal["classification", "regression", "other"]:
        """A class a row, real targets with one noise, or something else."""
        if self.family is None:
            return "regression" if self.classes is None else "classification"
        one_class = isinstance(self.family, Categorical) and self.y_train.ndim == 1
        return "classification" if one_class else "other"

    @property
    def outputs(self) -> int:
        """The number of outputs of a network for these data."""
        return outputs_of(self.likelihood(), self.classes, self.y_train)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of a row of x as a network sees it."""
        return tuple(self.seen(self.x_train[:1]).shape[1:])

    def seen(self, x: Tensor) -> Tensor:
        """x as a network sees it, without what the likelihood reads."""
        seen: Tensor = read_inputs(self.family, x)[0]
        return seen

    def likelihood(self) -> Likelihood:
        """The likelihood of the targets."""
        if self.family is not None:
            return self.family
        return Normal() if self.classes is None else Categorical()


def split_of(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the training rows and of the test rows, a fifth of all."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(rows)
    test = max(rows // 5, 1)
    return order[test:], order[:test]


def validation_data(data: Data, fraction: float, fold: int = 0) -> Data:
    """`Data` with its validation rows in the place of the test rows; without validation rows, with
    a held-out `fraction` of the training rows. Those of the first 1/`fraction` folds are disjoint.

    Raises:
        FitError: no row is left on one of the sides.
    """
    if data.x_val is not None and data.y_val is not None:
        return replace(data, name=f"{data.name} (validation)", x_test=data.x_val, y_test=data.y_val)
    x, y = data.x_train, data.y_train
    train, held = split_rows(len(x), float(fraction), _SPLIT_SEED, fold=fold)
    name = f"{data.name} (validation)"
    return replace(
        data, name=name, x_train=x[train], y_train=y[train], x_test=x[held], y_test=y[held]
    )


def split_rows(
    rows: int, fraction: float, seed: int, shuffle: bool = True, fold: int = 0
) -> tuple[Tensor | slice, Tensor | slice]:
    """The rows to train on and those to hold out, a `fraction` drawn at random, or, without
    `shuffle`, the last ones. Another `fold` of the same seed holds out the next ones drawn.

    Raises:
        FitError: no row is left on one of the sides.
    """
    held = round(fraction * rows) if holds(lambda x: 0 < x < 1, fraction) else 0
    if not 0 < held < rows:
        raise FitError(
            f"validation={described(fraction)}: expected a fraction that leaves at least one of"
            f" the {rows} rows on each side"
        )
    if not shuffle:
        return slice(None, -held), slice(-held, None)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed), device="cpu")
    order = order.roll(-fold * held)
    return order[held:], order[:held]
