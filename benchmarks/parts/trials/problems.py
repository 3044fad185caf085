"""The problems of `benchmarks/defaults.py`, which prints their sizes with `--list`.

Tables of scikit-learn and of two Debian packages, images, convolutions, sequences, and regressions
whose truth is known. R is not needed, `pip install rdata` is. In a folder of your own:

    apt-get download r-cran-modeldata r-cran-mlbench
    for package in *.deb; do dpkg -x $package R; done

and `--data R/usr/lib/R/site-library` it is. Fashion-MNIST and MNIST-1D are those of `load`. Each
problem chooses or reports, which is fixed here; kinds alternate. A fifth of the rows, the same ones
for every seed, is the test split. A quarter of the others, drawn by the seed, is for validation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.data.standardised import standardised
from pyro_bmr.experiments.models import Build, load_model

Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """Rows and a model. `chooses`: whether settings are chosen by it; else it reports. `cost`: how
    much slower a step is than that of a small perceptron; the steps of a candidate are divided by
    it. `real`: of the targets.
    """

    name: str
    rows: Callable[[Path], Arrays]
    model: str | Build
    chooses: bool
    cost: float = 1.0
    real: bool = False

    @property
    def build(self) -> Build:
        return load_model(self.model) if isinstance(self.model, str) else self.model

    def data(self, folder: Path, seed: int) -> bmr.Data:
        """Training, validation and test rows, standardised by the training rows."""
        x, y = _rows(self, folder)
        order = np.random.default_rng(0).permutation(len(x))
        test, others = np.split(order, [round(0.2 * len(x))])
        others = np.random.default_rng(1000 + seed).permutation(others)
        held, train = np.split(others, [round(0.25 * len(others))])
        parts = [array[rows] for rows in (train, test, held) for array in (x, y)]
        return _known_classes(standardised(self.name, *parts), y)


@cache
def _rows(problem: Problem, folder: Path) -> Arrays:
    return problem.rows(folder)


def _known_classes(data: bmr.Data, y: np.ndarray) -> bmr.Data:
    return data if data.classes is None else replace(data, classes=int(y.max()) + 1)


# scikit-learn


def _embedded(name: str, folder: Path) -> Arrays:
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, f"load_{name}")()
    return bunch.data, bunch.target


def _digits(folder: Path) -> Arrays:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target


# Debian's r-cran-mlbench and r-cran-modeldata


def _table(
    package: str, name: str, target: str, drop: tuple[str, ...], most: int, folder: Path
) -> Arrays:
    """A table of mlbench or modeldata: rows with missing values left out, factors as one column a
    level but the first, at most `most` rows.
    """
    import rdata
    from regression_tables import modeldata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an unknown encoding
        if package == "modeldata":
            table = modeldata(folder, name)
        else:
            table = rdata.read_rda(folder / f"mlbench/data/{name}.rda")[name]
    table = table.rename(columns=str).drop(columns=list(drop)).dropna()
    table = table.sample(min(len(table), most), random_state=0)
    y = table.pop(target)
    x = pd.get_dummies(table, drop_first=True).to_numpy(float)
    if isinstance(y.dtype, pd.CategoricalDtype):
        return x, pd.factorize(y, sort=True)[0]
    return x, y.to_numpy(float)


def _concrete(folder: Path) -> Arrays:
    from regression_tables import concrete

    values = concrete(folder).to_numpy(float)
    return values[:, :-1], values[:, -1]


# images, curves, sequences


def _fashion(rows: int, folder: Path) -> Arrays:
    data = bmr.load("fashion-mnist")
    first = np.random.default_rng(1).permutation(len(data.x_train))[:rows]
    return data.x_train[first, 0].numpy(), data.y_train[first].numpy()


def _curves(folder: Path) -> Arrays:
    data = bmr.load("mnist-1d")
    return (
        torch.cat([data.x_train, data.x_test]).numpy(),
        torch.cat([data.y_train, data.y_test]).numpy(),
    )


def _pieces(folder: Path) -> Arrays:
    """The curves as ten pieces of four points, one after another."""
    x, y = _curves(folder)
    return x.reshape(len(x), 10, 4), y


class _Column(nn.Module):
    """(rows, length) → (rows, 1, length)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, None]


def convolution(data: bmr.Data, prior: bmr.priors.Prior) -> bmr.BayesianNetwork:
    """Two 1-D convolutions with stride 2 and a linear layer, for curves."""
    net = nn.Sequential(
        _Column(), nn.Conv1d(1, 12, 5, 2), nn.ReLU(), nn.Conv1d(12, 24, 3, 2), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(data.outputs),
    )  # fmt: skip
    net(data.x_train[:1])
    return bmr.BayesianNetwork(net, prior, data.likelihood())


# regressions whose truth is known


def _sparse(rows: int, columns: int, folder: Path) -> Arrays:
    """y = 3x₀ − 2x₁ + x₂ + noise of standard deviation ½; a third as many rows again for
    validation and twice a fifth for the test.
    """
    total = round(rows / 0.6)
    rng = np.random.default_rng(rows + columns)
    x = rng.standard_normal((total, columns))
    return x, x[:, :3] @ [3.0, -2.0, 1.0] + 0.5 * rng.standard_normal(total)


def _friedman(rows: int, folder: Path) -> Arrays:
    from sklearn.datasets import make_friedman1

    return make_friedman1(rows, 10, noise=1.0, random_state=rows)


def _mlbench_problem(
    name: str, table: str, target: str, chooses: bool, drop: tuple[str, ...] = (), most: int = 10**6
) -> Problem:
    rows = partial(_table, "mlbench", table, target, drop, most)
    return Problem(name, rows, "mlp:100-50", chooses)


def _modeldata_problem(name: str, table: str, target: str, drop: tuple[str, ...] = ()) -> Problem:
    return Problem(
        name, partial(_table, "modeldata", table, target, drop, 10**6), "mlp:100-50", False
    )


_CLASSES = (
    Problem("iris", partial(_embedded, "iris"), "mlp:100-50", True),
    Problem("wine", partial(_embedded, "wine"), "mlp:100-50", False),
    Problem("breast-cancer", partial(_embedded, "breast_cancer"), "mlp:100-50", True),
    Problem("digits", _digits, "mlp", True),
    _mlbench_problem("sonar", "Sonar", "Class", True),
    _mlbench_problem("pima", "PimaIndiansDiabetes", "diabetes", False),
    _mlbench_problem("vehicle", "Vehicle", "Class", True),
    _mlbench_problem("vowel", "Vowel", "Class", False),
    _mlbench_problem("letters", "LetterRecognition", "lettr", True, most=12_000),
    _mlbench_problem("satellite", "Satellite", "classes", False),
    _mlbench_problem("dna", "DNA", "Class", True),
    _mlbench_problem("shuttle", "Shuttle", "Class", False),
    Problem("fashion-lenet", partial(_fashion, 4000), "lenet:4-10-60-40", True, cost=6),
    Problem("fashion-mlp", partial(_fashion, 6000), "mlp:100-50", False),
    Problem("curves-mlp", _curves, "mlp:100-50", True),
    Problem("curves-convolution", _curves, convolution, False, cost=2),
    Problem("sequence-transformer", _pieces, "transformer:16-1-2-2", True, cost=6),
    Problem("sequence-gru", _pieces, "gru:24", False, cost=6),
    # tables that came when the defaults were fixed
    _mlbench_problem("glass", "Glass", "Type", True),
    _mlbench_problem("ionosphere", "Ionosphere", "Class", True, drop=("V2",)),
    _mlbench_problem("soybean", "Soybean", "Class", False),
    _mlbench_problem("votes", "HouseVotes84", "Class", False),
    _modeldata_problem("alzheimer", "ad_data", "Class"),
    _modeldata_problem("attrition", "attrition", "Attrition"),
    _modeldata_problem("cells", "cells", "class", drop=("case",)),
    _modeldata_problem("speech", "pd_speech", "class"),
    _modeldata_problem("jobs", "hpc_data", "class"),
    _modeldata_problem("credit", "credit_data", "Status"),
    _modeldata_problem("churn", "mlc_churn", "churn"),
)
_TARGETS = (
    Problem("diabetes", partial(_embedded, "diabetes"), "mlp:100-50", True),
    _mlbench_problem("boston", "BostonHousing", "medv", False),
    Problem("sparse-200x10", partial(_sparse, 200, 10), "linear_regression", True),
    Problem("sparse-100x100", partial(_sparse, 100, 100), "linear_regression", False),
    Problem("friedman", partial(_friedman, 2000), "mlp:100-50", True),
    Problem("concrete", _concrete, "mlp:100-50", False),
    _mlbench_problem("ozone", "Ozone", "V4", True, drop=("V1", "V2", "V3")),
    Problem("friedman-tall", partial(_friedman, 50_000), "mlp:100-50", False),
    _mlbench_problem("servo", "Servo", "Class", False),
    _modeldata_problem("biomass", "biomass", "HHV", drop=("sample",)),
    _modeldata_problem("cars", "car_prices", "Price"),
    _modeldata_problem("salaries", "stackoverflow", "Salary"),
)
PROBLEMS = {p.name: p for p in _CLASSES} | {p.name: replace(p, real=True) for p in _TARGETS}
