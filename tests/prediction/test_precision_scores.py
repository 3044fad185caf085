"""Scores of 1,000 predictions of a few rows held against exact fractions, and entropies against
mpmath at 50 digits.
"""

import math
from fractions import Fraction

import mpmath as mp
import numpy as np
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.predict import ClassPrediction

PROBLEMS = 1000  # of 2.5 rows each
DTYPES = [torch.float32, torch.float64]


def problems(dtype):
    """Probabilities of a dtype, labels and their exact values; every fourth has confidences on the
    edges of bins.
    """
    rng = np.random.default_rng(17)
    for k in range(PROBLEMS):
        rows, classes = int(rng.integers(1, 5)), int(rng.integers(2, 5))
        p = rng.dirichlet(np.full(classes, 0.7), rows)
        if k % 4 == 0:
            top = rng.integers(8, 16, rows) / 15
            p = np.stack([top, 1 - top], 1)
        probs = torch.tensor(p, dtype=dtype)
        y = rng.integers(0, probs.shape[1], rows)
        yield (
            probs,
            torch.tensor(y),
            [[Fraction(x) for x in row] for row in probs.double().tolist()],
            y,
        )


def exact_ece(exact, y, bins):
    table = {}
    for row, label in zip(exact, y, strict=True):
        confidence = max(row)
        place = min(math.ceil(confidence * bins), bins) - 1  # (b/bins, (b + 1)/bins]
        table.setdefault(place, []).append((confidence, int(row.index(confidence) == label)))
    return float(sum(abs(sum(c - r for c, r in part)) for part in table.values()) / len(exact))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fractions(dtype):
    for k, (probs, y, exact, labels) in enumerate(problems(dtype)):
        brier = sum(
            (x - (c == label)) ** 2
            for row, label in zip(exact, labels, strict=True)
            for c, x in enumerate(row)
        ) / len(exact)
        assert metrics.brier(probs, y) == pytest.approx(float(brier), rel=1e-14)
        bins = (15, 5, 10, 7)[k % 4] if k % 4 else 15
        assert metrics.ece(probs, y, bins) == pytest.approx(
            exact_ece(exact, labels, bins), rel=1e-13, abs=1e-15
        )
        assert metrics.accuracy(probs, y) == sum(
            row.index(max(row)) == label for row, label in zip(exact, labels, strict=True)
        ) / len(exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logarithms(dtype):
    within = 2e-7 if dtype == torch.float32 else 1e-14
    with mp.workdps(50):
        for probs, y, exact, labels in list(problems(dtype))[::8]:
            values = [[mp.mpf(x.numerator) / x.denominator for x in row] for row in exact]
            entropy = [float(-sum(x * mp.log(x) for x in row if x)) for row in values]
            np.testing.assert_allclose(
                metrics.predictive_entropy(probs), entropy, rtol=within, atol=within
            )
            log_p = [
                float(mp.log(row[label])) if row[label] else -math.inf
                for row, label in zip(values, labels, strict=True)
            ]
            if min(log_p) > -80:
                got = ClassPrediction(probs, probs[:, 0], probs[:, 0]).log_prob(y)
                np.testing.assert_allclose(got, log_p, rtol=within, atol=within)


def test_the_area_under_the_curve_counts_pairs():
    rng = np.random.default_rng(4)
    for _ in range(PROBLEMS):
        a, b = (rng.integers(0, 6, rng.integers(1, 8)) / 3 for _ in range(2))
        low, high = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float64)
        x, z = ([Fraction(v) for v in t.double().tolist()] for t in (low, high))
        want = sum(Fraction((v > u) * 2 + (v == u), 2) for u in x for v in z) / (len(x) * len(z))
        assert metrics.auroc(low, high) == float(want)
    assert (
        metrics.auroc(
            torch.tensor([1.0, 2.0]), torch.tensor([1 + 1e-9, 2 + 1e-9], dtype=torch.float64)
        )
        == 0.75
    )
    assert metrics.auroc(torch.tensor([2**53, 5]), torch.tensor([2**53 + 1])) == 1.0


def test_scores_of_other_dtypes():
    p, y = [[0.75, 0.25], [0.5, 0.5]], torch.tensor([0, 1])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        probs = torch.tensor(p, dtype=dtype)
        assert (
            metrics.brier(probs, y) == 0.3125
            and metrics.ece(probs, y) == 0.375
            and metrics.accuracy(probs, y) == 0.5
        )
        assert metrics.predictive_entropy(probs)[1].item() == pytest.approx(math.log(2), rel=1e-6)
    hard = torch.tensor([[1, 0], [0, 1]])
    assert metrics.brier(hard, y) == 0 and metrics.ece(hard, torch.tensor([0, 0])) == 0.5
    assert metrics.rmse(
        torch.tensor([1e200, 0.0], dtype=torch.float64), torch.zeros(2)
    ) == pytest.approx(1e200 / math.sqrt(2))
    assert metrics.rmse(torch.tensor([3, 0]), torch.tensor([0, 4])) == pytest.approx(
        math.sqrt(12.5)
    )


two, zeros = torch.tensor([[0.5, 0.5]]), torch.zeros(3, dtype=torch.long)
REFUSED = {
    "sums to 0": (
        lambda: metrics.ece(torch.tensor([[0.0, 0.0]]), zeros[:1]),
        "row 0 sums to 0, its least is 0; of logits take softmax",
    ),
    "negative": (
        lambda: metrics.predictive_entropy(torch.tensor([[1.1, -0.1]])),
        "its least is -0.1",
    ),
    "logits": (
        lambda: metrics.brier(torch.tensor([[2.0, 3.0]]), zeros[:1]),
        "sum to 1 in each row",
    ),
    "no classes": (lambda: metrics.brier(torch.zeros(1, 0), zeros[:1]), "one row at least"),
    "no entropy": (lambda: metrics.predictive_entropy(torch.zeros(0, 2)), "one row at least"),
    "half a bin": (lambda: metrics.ece(two, zeros[:1], bins=2.5), "bins=2.5: a whole number"),
    "True bins": (lambda: metrics.ece(two, zeros[:1], bins=True), "bins=True"),
    "binning": (
        lambda: metrics.ece(two, zeros[:1], binning="nonsense"),
        "binning='nonsense': one of 'width', 'mass'",
    ),
    "infinite errors": (
        lambda: metrics.rmse(torch.tensor([math.inf]), torch.ones(1)),
        "mean not finite",
    ),
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
        "rows: a pair",
    ),
    "most": (
        lambda: bmr.prediction.best_widening(lambda x: None, None, (two, two), most=math.nan),
        "most=nan",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_score(case):
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
