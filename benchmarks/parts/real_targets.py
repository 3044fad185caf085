"""Real data for each likelihood: what scikit-learn and statsmodels bring along.

Owns `REAL`: name → function that returns (likelihood, network, x, y, columns of x that the network
does not see). Inputs are standardised; the last third of the mixed rows is for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr import likelihoods

Real = tuple[Any, nn.Module, Tensor, Tensor, int]
_LENGTH, _BEFORE = 60, 3  # characters of a line, and before the one to predict


def frame(name: str) -> Any:
    """A table of statsmodels."""
    from statsmodels import datasets

    return getattr(datasets, name).load_pandas().data


def standardised(values: Any) -> Tensor:
    x = torch.as_tensor(np.asarray(values, dtype=np.float32))
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-6)


def column(table: Any, name: str) -> Tensor:
    return torch.as_tensor(np.asarray(table[name], dtype=np.float32))


def linear(x: Tensor, outputs: int = 1, bias: bool = True) -> nn.Linear:
    return nn.Linear(x.shape[-1], outputs, bias=bias)


def diabetes() -> Real:
    data = bmr.load("diabetes")
    x = torch.cat([data.x_train, data.x_test])
    return bmr.Normal(), linear(x), x, torch.cat([data.y_train, data.y_test]), 0


def spending(likelihood: Any, outputs: int) -> Real:
    """Expenditure on food by income (Engel 1857), both on the log scale."""
    table = frame("engel")
    x = standardised(np.log(table[["income"]]))
    y = standardised(np.log(table["foodexp"]))
    return likelihood, linear(x, outputs), x, y, 0


def affairs() -> Real:
    table = frame("fair")
    x = standardised(table.drop(columns="affairs"))
    return bmr.Bernoulli(), linear(x), x, (column(table, "affairs") > 0).float(), 0


def schools() -> Real:
    """Pupils above the median by district; the exposure is the thousands of its pupils."""
    table = frame("star98")
    x = standardised(table[table.columns[2:14]])
    above, below = column(table, "NABOVE"), column(table, "NBELOW")
    x = torch.cat([(above + below)[:, None] / 1000, x], 1)
    return bmr.NegativeBinomial(exposure=0), nn.Linear(12, 1), x, above, 1


def visits(likelihood: Any) -> Real:
    """Visits to the doctor in the RAND health insurance experiment."""
    table = frame("randhie").iloc[::5]
    x = standardised(table.drop(columns="mdvis"))
    return likelihood, linear(x), x, column(table, "mdvis"), 0


def growth() -> Real:
    """The next quarter's growth of consumption and investment in the USA, from this quarter's."""
    names = ["realgdp", "realcons", "realinv", "realgovt", "realdpi", "m1"]
    change = standardised(np.diff(np.log(frame("macrodata")[names].to_numpy()), axis=0))
    return bmr.Normal(noise="per output"), linear(change, 2), change[:-1], change[1:, 1:3], 0


def text() -> Real:
    """The kind of the next character (vowel, other letter, space, other) in lines of the
    descriptions that come with scikit-learn; lines are padded.
    """
    folder = resources.files("sklearn.datasets.descr")
    files = sorted(f.name for f in folder.iterdir() if f.name.endswith(".rst"))
    lines = [
        line.strip().lower() for f in files for line in (folder / f).read_text("utf-8").split("\n")
    ]
    lines = [line[:_LENGTH] for line in lines if len(line) > 20]
    kind = {c: 0 for c in "aeiou"} | {
        chr(97 + k): 1 for k in range(26) if chr(97 + k) not in "aeiou"
    }
    kinds = torch.full((len(lines), _LENGTH), -100)
    for row, line in enumerate(lines):
        kinds[row, : len(line)] = torch.tensor([kind.get(c, 2 if c == " " else 3) for c in line])
    one_hot = nn.functional.one_hot(kinds.clamp_min(0), 4).float() * (kinds >= 0)[..., None]
    before = [one_hot[:, _BEFORE - k : _LENGTH - k] for k in range(1, _BEFORE + 1)]
    x, y = torch.cat(before, -1), kinds[:, _BEFORE:]
    return bmr.Categorical(ignore_index=-100), linear(x, 4), x, y, 0


def ink() -> Real:
    """No, some or much ink of each pixel of a digit, from the other pixels of a checkerboard."""
    data = bmr.load("digits")
    image = torch.cat([data.x_train, data.x_test]).view(-1, 8, 8)
    level = (image > image.min()).long() + (image > image.median()).long().where(image > 0.5, 0)
    seen = (torch.arange(8)[:, None] + torch.arange(8)) % 2 == 0
    y = level.masked_fill(seen, -100)
    net = nn.Conv2d(1, 3, 3, padding=1)
    return bmr.Categorical(class_axis=1, ignore_index=-100), net, (image * seen)[:, None], y, 0


def properties() -> Real:
    """Four properties of a digit: even, at least 5, with a loop, prime."""
    data = bmr.load("digits")
    x = torch.cat([data.x_train, data.x_test]).flatten(1)
    digit = torch.cat([data.y_train, data.y_test])
    sets = ({0, 2, 4, 6, 8}, {5, 6, 7, 8, 9}, {0, 6, 8, 9}, {2, 3, 5, 7})
    y = torch.stack([torch.tensor([int(d) in own for d in digit]) for own in sets], 1).float()
    return bmr.Bernoulli(), linear(x, 4), x, y, 0


def parties() -> Real:
    """Identification with a party, from 0 (strong Democrat) to 6 (strong Republican)."""
    table = frame("anes96")
    x = standardised(table[["logpopul", "TVnews", "selfLR", "age", "educ", "income"]])
    return bmr.Ordinal(7), linear(x, bias=False), x, column(table, "PID").long(), 0


REAL: dict[str, Callable[[], Real]] = {
    "normal: diabetes": diabetes,
    "Student-t: food and income": lambda: spending(likelihoods.StudentT(), 1),
    "normal, noise of the inputs: food and income": lambda: spending(
        bmr.Normal(noise="network"), 2
    ),
    "Bernoulli: affairs": affairs,
    "Poisson: visits to the doctor": lambda: visits(bmr.Poisson()),
    "negative binomial: visits to the doctor": lambda: visits(bmr.NegativeBinomial()),
    "negative binomial, exposure: pupils": schools,
    "two outputs: growth": growth,
    "tokens with padding: text": text,
    "pixels: digits": ink,
    "many labels: digits": properties,
    "grades: parties": parties,
}


def mixed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in another order, the same at every call."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]
