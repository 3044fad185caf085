"""Scores of 2,000 small predictions a dtype, 400 of them in the fast suite, held against exact
fractions, and entropies and likelihoods against mpmath at 50 digits.

The predictions have ties, probabilities 0 and 1, one class, one row, confidences on and beside the
edges of bins, and numbers of half precision. The best temperatures are in
test_precision_calibration.py.
"""

import math
import random
import warnings
from collections import defaultdict
from fractions import Fraction
from functools import cache

import mpmath as mp
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.predict import ClassPrediction

# Scores are summed in double precision, so float32 input is the harder half. The kinds of problems
# recur after 128.
CASES = [
    pytest.param(torch.float32, 400, id="some"),
    pytest.param(torch.float32, 2000, id="float32", marks=pytest.mark.slow),
    pytest.param(torch.float64, 2000, id="float64", marks=pytest.mark.slow),
]
LABELS = [torch.int64, torch.int32, torch.uint8, torch.float32]
BINS = (15, 5, 10, 7, 15, 1, 3, 2**24)
ULP = {torch.float16: 2.0**-10, torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def distribution(rng, classes, sharpness):
    weights = [rng.random() ** sharpness + 1e-12 for _ in range(classes)]
    return [w / sum(weights) for w in weights]


def on_edges(rng, rows, bins, dtype):
    """Confidences of two classes: the numbers of the dtype that are nearest to k/bins, and their
    neighbours.
    """
    top = torch.tensor(
        [rng.randint((bins + 1) // 2, bins) / bins for _ in range(rows)], dtype=dtype
    )
    towards = torch.tensor([rng.choice([0.0, 0.0, 1.0]) for _ in range(rows)], dtype=dtype)
    beside = torch.tensor([rng.random() < 0.5 for _ in range(rows)])
    top = torch.where(beside, top.nextafter(towards), top)
    return torch.stack([top, 1 - top], 1)


def probabilities(rng, k, dtype):
    """Of eight kinds in turn."""
    rows, classes, kind = rng.randint(1, 4), rng.randint(2, 4), k % 8
    if kind == 1:
        return on_edges(rng, rows, 15, dtype)
    if kind == 2:  # the edges of eighths are numbers of every dtype
        return on_edges(rng, rows, 8 if k % 16 == 2 else 10, dtype)
    if kind == 3:
        hot = [[float(c == h) for c in range(classes)] for h in rng.choices(range(classes), k=rows)]
        return torch.tensor(hot, dtype=dtype)
    if kind == 4:  # ties
        return torch.tensor(rng.choices([[0.5, 0.5, 0], [0.25, 0.375, 0.375]], k=rows), dtype=dtype)
    if kind == 5:
        return torch.ones(rows, 1, dtype=dtype)
    sharpness = (0.5, 1, 1, 1, 1, 1, 2, 12)[kind]
    p = [distribution(rng, classes, sharpness) for _ in range(rows)]
    # of half precision, which are one distribution up to its own rounding
    return torch.tensor(p, dtype=torch.float16 if kind == 6 else dtype)


@cache
def problems(dtype, count):
    """Probabilities, labels, and both as exact numbers."""
    rng = random.Random(17)  # the same numbers in every version of Python
    made = []
    for k in range(count):
        probs = probabilities(rng, k, dtype)
        labels = [rng.randrange(probs.shape[1]) for _ in probs]
        exact = [[Fraction(x) for x in row] for row in probs.tolist()]
        made.append((probs, torch.tensor(labels, dtype=LABELS[k // 8 % 4]), exact, labels))
    return made


@pytest.mark.parametrize(("dtype", "count"), CASES)
def test_brier_and_accuracy(dtype, count):
    for probs, y, exact, labels in problems(dtype, count):
        brier = Fraction(0)
        for row, label in zip(exact, labels, strict=True):
            brier += sum((x - (c == label)) ** 2 for c, x in enumerate(row))
        right = sum(row.index(max(row)) == c for row, c in zip(exact, labels, strict=True))
        assert metrics.brier(probs, y) == pytest.approx(float(brier / len(exact)), rel=3e-15)
        assert metrics.accuracy(probs, y) == right / len(exact)


def exact_ece(exact, labels, bins, binning):
    order = sorted(range(len(exact)), key=lambda i: max(exact[i]))  # ties in their order
    gaps = defaultdict(Fraction)
    for place, i in enumerate(order):
        confidence = max(exact[i])
        inside = max(math.ceil(confidence * bins), 1) - 1  # of (b/bins, (b + 1)/bins]
        b = min(inside, bins - 1) if binning == "width" else place * bins // len(exact)
        gaps[b] += (exact[i].index(confidence) == labels[i]) - confidence
    return float(sum(map(abs, gaps.values())) / len(exact))


@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize(("dtype", "count"), CASES)
def test_calibration_error(dtype, count, binning):
    for k, (probs, y, exact, labels) in enumerate(problems(dtype, count)):
        bins = {2: 8, 10: 10, 1: 15, 9: 15}.get(k % 16, BINS[k // 8 % 8])
        assert metrics.ece(probs, y, bins, binning) == pytest.approx(
            exact_ece(exact, labels, bins, binning), rel=1e-15, abs=1e-15
        )


@pytest.mark.parametrize(("dtype", "count"), CASES)
def test_logarithms(dtype, count):
    """In units of the last place of the answers, which have the dtype of the probabilities, an
    entropy at least single precision.
    """
    with mp.workdps(50), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "log_prob: .* have a probability of 0", bmr.PyroBMRWarning
        )
        for probs, y, exact, labels in problems(dtype, count):
            logs = [
                [mp.log(mp.mpf(x.numerator) / x.denominator) if x else 0 for x in row]
                for row in exact
            ]
            got = metrics.predictive_entropy(probs)
            assert got.dtype == (torch.float32 if probs.dtype == torch.float16 else dtype)
            for value, row, log in zip(got.tolist(), exact, logs, strict=True):
                entropy = float(-sum(float(x) * part for x, part in zip(row, log, strict=True)))
                assert abs(value - entropy) <= (1 + 3 * (got.dtype == torch.float64)) * ULP[
                    got.dtype
                ] * abs(entropy)
            least = torch.finfo(probs.dtype).tiny  # counts for what is less
            log_p = ClassPrediction(probs, probs[:, 0], probs[:, 0]).log_prob(y)
            for value, row, log, label in zip(log_p.tolist(), exact, logs, labels, strict=True):
                want = float(log[label]) if row[label] >= least else math.log(least)
                assert abs(value - want) <= ULP[probs.dtype] * abs(want)


def real_numbers(rng, k, dtype):
    """Means and targets: near each other, far apart, equal, or as large and as small as the dtype
    has them.
    """
    rows, kind, last = rng.randint(1, 4), k % 5, torch.finfo(dtype)
    y = [rng.gauss(0, 3) for _ in range(rows)]
    if kind == 0:
        mean = [v + rng.gauss(0, 1) for v in y]
    elif kind == 1:
        mean = [v * (1 + rng.choice([0, 1, -3]) * last.eps) for v in y]
    elif kind == 2:  # of other dtypes
        return (
            torch.tensor([rng.gauss(0, 9) for _ in y], dtype=torch.float16),
            torch.tensor([rng.randrange(-9, 9) for _ in y]),
        )
    else:
        size = last.max if kind == 3 else last.tiny * 4
        y, mean = ([size * rng.uniform(-1, 1) for _ in y] for _ in range(2))
        if k % 10 == 4:
            mean = list(y)
    return torch.tensor(mean, dtype=dtype), torch.tensor(y, dtype=dtype)


@pytest.mark.parametrize(("dtype", "count"), CASES)
def test_root_mean_squared_error(dtype, count):
    rng = random.Random(3)
    with mp.workdps(50):
        for k in range(count):
            mean, y = real_numbers(rng, k, dtype)
            squares = [
                (Fraction(a) - Fraction(b)) ** 2
                for a, b in zip(mean.tolist(), y.tolist(), strict=True)
            ]
            total = sum(squares) / len(squares)
            want = float(mp.sqrt(mp.mpf(total.numerator) / total.denominator))
            got = metrics.rmse(mean, y)  # infinite where the exact one is beyond all floats
            assert got == want or abs(got - want) <= max(1e-15 * want, 5e-324), (mean, y)


def scores(rng, dtype):
    """One to seven scores with ties; some infinite, some as near to each other as the dtype has
    them.
    """
    values = [rng.choice([rng.randrange(6) / 3, rng.gauss(0, 1)]) for _ in range(rng.randint(1, 7))]
    values += rng.choice([[], [], [math.inf, 1e300], [-math.inf, -0.0, 0.0, 5e-324]])
    made = torch.tensor(values, dtype=torch.float64)
    if not dtype.is_floating_point:
        return made.clamp(-(2**40), 2**40).to(dtype)
    made = made.to(dtype)
    return (
        torch.cat([made, made[:1].nextafter(made.new_tensor([9.0]))])
        if rng.random() < 0.3
        else made
    )


@pytest.mark.parametrize(("dtype", "count"), CASES)
def test_the_area_under_the_curve_counts_pairs(dtype, count):
    rng = random.Random(4)
    others = [dtype, torch.float64, torch.float32, torch.float16, torch.int64, torch.int32]
    for k in range(count):
        inside, outside = scores(rng, dtype), scores(rng, others[k % 6])
        x, z = inside.tolist(), outside.tolist()  # Python compares them exactly
        twice = sum((v > u) * 2 + (v == u) for u in x for v in z)
        assert metrics.auroc(inside, outside) == twice / (2 * len(x) * len(z))
        assert metrics.auroc(outside, inside) == (2 * len(x) * len(z) - twice) / (
            2 * len(x) * len(z)
        )


def test_scores_that_double_precision_alone_tells_apart():
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
    "no classes": (lambda: metrics.brier(torch.zeros(1, 0), zeros[:1]), "at least one row"),
    "no entropy": (
        lambda: metrics.predictive_entropy(torch.zeros(0, 2)),
        "at least one row, and no NaN, got shape \\(0, 2\\)",
    ),
    "half a bin": (
        lambda: metrics.ece(two, zeros[:1], bins=2.5),
        "bins=2.5: expected a whole number",
    ),
    "too many bins": (lambda: metrics.ece(two, zeros[:1], bins=2**24 + 1), "from 1 to 16,777,216"),
    "True bins": (lambda: metrics.ece(two, zeros[:1], bins=True), "bins=True"),
    "binning": (
        lambda: metrics.ece(two, zeros[:1], binning="nonsense"),
        "binning='nonsense': expected one of 'width', 'mass'",
    ),
    "infinite errors": (
        lambda: metrics.rmse(torch.tensor([math.inf]), torch.ones(1)),
        "mean not finite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_score(case):
    call, words = REFUSED[case]
    with pytest.raises(bmr.errors.DataError, match=words):
        call()
