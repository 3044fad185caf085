"""Makes temperatures.npz: the temperature with the least cross entropy of 2,000 problems a dtype.

`python -m tests.reference.temperatures` writes the file beside this one, in a minute or two. A
problem is the logits and labels of one to eight rows: of every scale, tied, with the same large
number in a row, 10⁴ apart, impossible, of half precision, or of one class. With mpmath at 50 digits
the zero of

    g(β) = mean over rows of Σ_c p_c(β) (z_c − z_y),    p(β) = softmax(β z),    β = 1/T,

is found in 1/20 … 20 by bisection and Newton's method; g increases.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import mpmath as mp
import numpy as np
import torch
from torch import Tensor

PROBLEMS, COLDEST, HOTTEST = 2000, 0.05, 20.0
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def problem(k: int, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """Logits (rows, classes) and labels of the k-th problem, of eight kinds in turn."""
    rng = random.Random(k)  # the same numbers in every version of Python
    kind, rows, classes = k % 8, rng.randint(1, 8), rng.randint(2, 4)
    scale = rng.choice([0.1, 0.5, 2.0, 9.0]) if kind else 2.0
    z = [[rng.gauss(0, scale) for _ in range(classes)] for _ in range(rows)]
    if kind == 1:  # ties
        z = [[float(rng.randrange(3)) for _ in row] for row in z]
    true = 10 ** rng.uniform(-0.7, 0.7) * scale / 2  # a temperature
    for _ in range(9):
        labels = [
            rng.choices(range(classes), [math.exp((v - max(row)) / true) for v in row])[0]
            for row in z
        ]
        if 0 < sum(row[c] < max(row) for row, c in zip(z, labels, strict=True)) < rows / 2:
            break  # some are wrong, most are right: the best is seldom at an end
    for i, label in enumerate(labels):
        if kind == 2:
            large = rng.choice([1e4, 1e8 if dtype == torch.float64 else -1e4])
            z[i] = [v + large for v in z[i]]
        if kind == 3 and rng.random() < 0.5:  # sure
            z[i] = [1e4 if c == label else -1e4 for c in range(classes)]
        if kind == 4 and classes > 2:
            z[i][(label + 1) % classes] = -math.inf
        if kind == 5 and rng.random() < 0.05:  # wrong, and sure of it
            z[i][label] = -1e4
    if kind == 6 and k % 5 == 0:
        z, labels = [row[:1] for row in z], [0] * rows
    return torch.tensor(z, dtype=torch.float16 if kind == 7 else dtype), labels


def gaps(logits: Tensor, labels: list[int]) -> list[list[mp.mpf]]:
    """z_c − z_y of the possible classes."""
    return [
        [mp.mpf(v) - mp.mpf(row[label]) for v in row if v > -math.inf]
        for row, label in zip(logits.double().tolist(), labels, strict=True)
    ]


def moments(rows: list[list[mp.mpf]], beta: mp.mpf) -> tuple[mp.mpf, mp.mpf, mp.mpf, mp.mpf]:
    """g, its derivative, the mean of its terms without their signs, and the cross entropy."""
    g = slope = size = loss = mp.mpf(0)
    for row in rows:
        weights = [mp.exp(beta * d) for d in row]
        total = mp.fsum(weights)
        mean = mp.fsum(w * d for w, d in zip(weights, row, strict=True)) / total
        square = mp.fsum(w * d * d for w, d in zip(weights, row, strict=True)) / total
        size += mp.fsum(w * abs(d) for w, d in zip(weights, row, strict=True)) / total
        g, slope, loss = g + mean, slope + square - mean**2, loss + mp.log(total)
    return g / len(rows), slope / len(rows), size / len(rows), loss / len(rows)


def best(logits: Tensor, labels: list[int]) -> list[float]:
    """The best temperature in the range, NaN where all are equal; how many times the relative
    rounding of g is that of the temperature; and what the better end loses, in nats.
    """
    with mp.workdps(50):
        rows = gaps(logits, labels)
        low, high = mp.mpf(1) / 20, mp.mpf(20)
        ends = [moments(rows, beta) for beta in (low, high)]
        if not any(map(any, rows)):
            return [math.nan, 0.0, 0.0]
        if ends[1][0] <= 0 or ends[0][0] >= 0:
            return [COLDEST if ends[1][0] <= 0 else HOTTEST, 0.0, 0.0]
        for _ in range(24):
            beta = mp.sqrt(low * high)
            low, high = (low, beta) if moments(rows, beta)[0] > 0 else (beta, high)
        for _ in range(5):
            g, slope, size, loss = moments(rows, beta)
            beta -= g / slope
        if not low * 0.999 <= beta <= high * 1.001 or abs(g) > 1e-40 * size:
            raise ArithmeticError("Newton's method has not found the zero")
        short = min(end[3] for end in ends) - loss
        return [float(1 / beta), float(size / (beta * slope)), float(short)]


def table(dtype: torch.dtype) -> np.ndarray:
    """The three numbers of `best` of each problem."""
    return np.array([best(*problem(k, dtype)) for k in range(PROBLEMS)])


if __name__ == "__main__":
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"), **{name: table(d) for name, d in DTYPES.items()}
    )
