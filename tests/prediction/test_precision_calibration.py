"""Best temperatures of 2,000 problems a dtype held against mpmath at 50 digits, and best widenings
held against a predictive whose best one is known.
"""

import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.prediction import calibration
from tests.reference import temperatures

EPS = 2.0**-52


@pytest.mark.parametrize(
    ("dtype", "every"),
    [
        pytest.param(dtype, every, marks=[pytest.mark.slow] * (every == 1))
        for dtype in temperatures.DTYPES
        for every in (7, 1)
    ],
)
def test_best_temperature(dtype, every):
    """To within the rounding of the derivative that is 0 there, as float64 has it; with a warning
    where an end of the range is as good.
    """
    rows = np.load(Path(temperatures.__file__).with_suffix(".npz"))[dtype]
    inside = 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for k in range(0, len(rows), every):
            want, conditioning, short = rows[k]
            logits, labels = temperatures.problem(k, temperatures.DTYPES[dtype])
            said.clear()
            got = bmr.prediction.best_temperature(logits, torch.tensor(labels))
            if math.isnan(want):
                assert 0.05 <= got <= 20
            else:
                assert got == pytest.approx(want, rel=8 * EPS * (1 + conditioning)), k
            if not 5e-13 < short < 2e-12:
                assert len(said) == (short < 1e-12), k
            inside += short > 1e-12
    assert len(rows) == temperatures.PROBLEMS == 2000 and inside > 800 / every


class Predictive:
    """Normal(0, a + c b) of every row, whose best c for targets y is (mean y² − a)/b."""

    def __init__(self, a, b, c=1.0):
        self.a, self.b, self.c = a, b, c

    def widened(self, factor):
        return Predictive(self.a, self.b, self.c * factor)

    def log_prob(self, y):
        var = self.a + self.c * self.b
        return y.square() * (-0.5 / var) - 0.5 * math.log(2 * math.pi * var)


@pytest.mark.parametrize(
    ("seed", "count"),
    [(6, 150), *(pytest.param(k, 700, marks=pytest.mark.slow) for k in (6, 7, 8))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_best_widening(dtype, seed, count, monkeypatch):
    """To within the 2.5 % that the search promises, where the likelihood tells as much apart."""
    monkeypatch.setattr(calibration, "predict", lambda program, posterior, x, **_: posterior)
    rng, x = random.Random(seed), torch.ones(2, 1)
    for k in range(count):
        most = rng.choice([1.5, 8.0, 64.0, 1e4])
        a, c = 10 ** rng.uniform(-4, 4), most ** rng.uniform(-1.3, 1.3)
        b = a / c * 10 ** rng.uniform(-0.3, 3)
        y = math.sqrt(a + c * b) * torch.tensor([math.sqrt(0.5), math.sqrt(1.5)], dtype=dtype)
        got = bmr.prediction.best_widening(None, Predictive(a, b), (x, y), most=most)
        assert abs(math.log(got / min(max(c, 1 / most), most))) <= 0.0251, k


two, zeros = torch.tensor([[0.5, 0.5]]), torch.zeros(3, dtype=torch.long)
REFUSED = {
    "NaN logits": (
        lambda: bmr.prediction.best_temperature(torch.tensor([[1.0, math.nan]]), zeros[:1]),
        "logits is NaN, first in row 0",
    ),
    "an impossible label": (
        lambda: bmr.prediction.best_temperature(
            torch.tensor([[1.0, 2.0], [-math.inf, 0.0]]), zeros[:2]
        ),
        "finite; first in row 1",
    ),
    "an infinite logit": (
        lambda: bmr.prediction.best_temperature(torch.tensor([[math.inf, 2.0]]), zeros[:1]),
        "below \\+inf",
    ),
    "no logits": (
        lambda: bmr.prediction.best_temperature(torch.zeros(0, 2), zeros[:0]),
        "logits of shape \\(0, 2\\)",
    ),
    "a label out of range": (
        lambda: bmr.prediction.best_temperature(torch.zeros(3, 2), torch.tensor([1, 0, 5])),
        "label 5 in row 2",
    ),
    "rows": (
        lambda: bmr.prediction.best_widening(lambda x: None, None, torch.ones(3)),
        "rows: expected a pair",
    ),
    "most": (
        lambda: bmr.prediction.best_widening(lambda x: None, None, (two, two), most=math.nan),
        "most=nan",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_calibrated(case):
    call, words = REFUSED[case]
    with pytest.raises(bmr.errors.DataError, match=words):
        call()


def test_a_temperature_that_the_rows_do_not_say():
    with pytest.warns(bmr.PyroBMRWarning, match="at an end of the search"):
        bmr.prediction.best_temperature(
            torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
        )
    impossible = torch.tensor([[1.0, 2.0, -math.inf], [2.0, 1.0, -math.inf], [1.5, 1.0, -math.inf]])
    y = torch.tensor([1, 0, 1])
    assert bmr.prediction.best_temperature(impossible, y) == pytest.approx(
        bmr.prediction.best_temperature(impossible[:, :2], y)
    )
