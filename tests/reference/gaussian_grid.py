"""Inputs on which the Gaussian formulas are held against many digits: the same numbers on every
machine, by exact operations.

Uniform numbers are Python's `random()`, whose sequence is fixed by the seed; they meet powers of
two, products of small integers, and one rounding to the dtype.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

POINTS = 2200  # of each formula of one weight
PROBLEMS = {2: 600, 3: 600, 4: 500, 5: 500}  # of each structure with correlations, by dimension
DTYPES = {"float32": np.float32, "float64": np.float64}
# the exponent of the smallest variance, 1e-40 in float32
LOWEST = {"float32": -133, "float64": -220}


def power(r: random.Random, low: float, high: float) -> float:
    """A positive number whose binary exponent is uniform."""
    return float(np.ldexp(1 + r.random(), int(low + (high - low) * r.random())))


def signed(r: random.Random, low: float, high: float) -> float:
    return power(r, low, high) * (1 if r.random() < 0.5 else -1)


def choice(r: random.Random, *made):
    """One of what was made; all of it is made, so that the sequence of random numbers does not
    depend on the choice.
    """
    return made[int(len(made) * r.random())]


def rounded(x: float, dtype: str) -> float:
    return float(DTYPES[dtype](x))


def weights(dtype: str) -> dict[str, np.ndarray]:
    """Moments of one weight: posterior, prior, reduced prior. Variances down to 1e-40, means to 1e6
    and to many standard deviations from each other.
    """
    r, low = random.Random(11), LOWEST[dtype]
    rows: list[list[float]] = []
    while len(rows) < POINTS:
        p = rounded(choice(r, power(r, -20, 20), power(r, -8, 4), power(r, low, 40)), dtype)
        near = p * (1 - power(r, -20, -2))
        s = rounded(
            choice(
                r,
                p * power(r, -60, 0) / 2,
                p * power(r, -12, 0) / 2,
                near,
                p * power(r, 0, 6),
                power(r, low, -60),
            ),
            dtype,
        )
        close, around = p * (1 + signed(r, -20, -2)), s * power(r, -10, 10)
        v = rounded(
            choice(r, 0.0, p, s, p * power(r, -40, 0), p * power(r, 0, 20), close, around), dtype
        )
        prior_sd, sd = np.sqrt(p), np.sqrt(s)
        eta = rounded(choice(r, 0.0, signed(r, -10, 20), prior_sd * signed(r, -3, 8)), dtype)
        mu = rounded(
            choice(
                r,
                eta + prior_sd * signed(r, -6, 4),
                eta + sd * signed(r, -4, 4),
                eta,
                signed(r, -20, 3),
                0.0,
            ),
            dtype,
        )
        to = rounded(
            choice(r, eta, mu, 0.0, mu + sd * signed(r, -4, 4), eta + prior_sd * signed(r, -6, 3)),
            dtype,
        )
        row = [mu, s, eta, p, to, v]
        if s > 0 and p > 0 and np.isfinite(row).all():
            rows.append(row)
    names = ("mean", "var", "prior_mean", "prior_var", "reduced_mean", "reduced_var")
    return dict(zip(names, np.array(rows, dtype=DTYPES[dtype]).T.copy(), strict=True))


def messages(dtype: str) -> dict[str, np.ndarray]:
    """What the data said of one weight, with prior variance, reduced variance and shift. h and L
    are numbers of the dtype, whatever moments they come from.
    """
    r = random.Random(12)
    rows = []
    for _ in range(POINTS):
        p = rounded(power(r, -30, 20), dtype)
        precision = rounded(
            choice(r, power(r, -30, 60), power(r, -12, 6) / p, -power(r, -9, -1) / p / 2), dtype
        )
        root = np.sqrt(abs(precision))
        shift = rounded(choice(r, 0.0, signed(r, -8, 6), signed(r, -4, 4) * np.sqrt(p)), dtype)
        far = shift * precision + signed(r, -6, 6) * root
        h = rounded(
            choice(r, signed(r, -6, 6) * root, far, 0.0, root * (1 + signed(r, -18, -2))), dtype
        )
        v = rounded(choice(r, 0.0, p, p * power(r, -40, 10), p * (1 + signed(r, -20, -2))), dtype)
        rows.append([h, precision, p, v, shift])
    return dict(
        zip(
            ("h", "precision", "prior_var", "reduced_var", "shift"),
            np.array(rows, dtype=DTYPES[dtype]).T.copy(),
            strict=True,
        )
    )


def covariance(r: random.Random, d: int, weakest: int, tallest: int) -> np.ndarray:
    """T E Tᵀ of a unit triangular T with quarters of integers and powers of two E, scaled by powers
    of two: exact in float64, its factor is known.
    """
    triangle = np.eye(d)
    for i in range(d):
        for j in range(i):
            triangle[i, j] = (int(17 * r.random()) - 8) / 4
    values = np.ldexp(1.0, [-int(weakest * r.random()) for _ in range(d)])
    scale = np.ldexp(1.0, [int((2 * tallest + 1) * r.random()) - tallest for _ in range(d)])
    return scale[:, None] * ((triangle * values) @ triangle.T) * scale


def dense(dtype: str) -> Iterator[dict[str, np.ndarray]]:
    """Correlated posteriors of 2 to 5 entries under correlated priors, with condition numbers to
    1e8, and which entries are pruned.
    """
    r, to = random.Random(13), DTYPES[dtype]
    weakest = 12 if dtype == "float32" else 22
    for d, count in PROBLEMS.items():
        for _ in range(count):
            narrow = np.ldexp(1.0, -2 * int(4 + 12 * r.random()))
            prior, post, reduced = (
                covariance(r, d, 6, 2),
                narrow * covariance(r, d, weakest, 2),
                covariance(r, d, 10, 3),
            )
            post, reduced = choice(
                r,
                (post, reduced),
                (post, reduced * narrow),
                (narrow * np.diag(np.diag(prior)), prior),
            )
            means = [
                np.array([choice(r, 0.0, signed(r, -6, 3)) for _ in range(d)]) for _ in range(3)
            ]
            if r.random() < 0.3:
                means[2] = means[0]
            one = dict(
                zip(
                    ("mean", "prior_mean", "reduced_mean", "cov", "prior_cov", "reduced_cov"),
                    [x.astype(to) for x in (*means, post, prior, reduced)],
                    strict=True,
                )
            )
            yield one | {
                "pruned": np.array([k == 0 or (k < d - 1 and r.random() < 0.4) for k in range(d)])
            }


def low_rank(dtype: str) -> Iterator[dict[str, np.ndarray]]:
    """Low rank plus diagonal, with diagonals to 1e-24 of the rest, under independent priors."""
    r, to = random.Random(14), DTYPES[dtype]
    for d, count in PROBLEMS.items():
        for _ in range(count):
            rank, small = 1 + int(2 * r.random()), choice(r, 12.0, 40.0, 80.0)
            columns = {
                "var": [power(r, -small, -4) for _ in range(d)],
                "factor": [[signed(r, -12, -2) for _ in range(rank)] for _ in range(d)],
                "prior_var": [power(r, 0, 4) for _ in range(d)],
                "reduced_var": [choice(r, power(r, -30, 0), power(r, -4, 6)) for _ in range(d)],
                **{
                    name: [choice(r, 0.0, signed(r, -6, 3)) for _ in range(d)]
                    for name in ("mean", "prior_mean", "reduced_mean")
                },
            }
            yield {k: np.array(v, dtype=to) for k, v in columns.items()} | {
                "pruned": np.array([k == 0 or (k < d - 1 and r.random() < 0.4) for k in range(d)])
            }


def matrix_normal(dtype: str) -> Iterator[dict[str, np.ndarray]]:
    """2 × 2 and 2 × 3 matrices under priors with a variance for each row, each column, or one;
    which rows are pruned.
    """
    r, to = random.Random(15), DTYPES[dtype]
    weakest = 10 if dtype == "float32" else 20
    for k in range(sum(PROBLEMS.values())):
        n, m = 2, 2 + k % 2
        shape = ((n, 1), (1, m), ())[k % 3]
        size = int(np.prod(shape))
        one = {
            "row_cov": np.ldexp(covariance(r, n, weakest, 1), -8),
            "col_cov": np.ldexp(covariance(r, m, weakest, 1), -int(4 + 16 * r.random())),
        }
        for name in ("mean", "prior_mean", "reduced_mean"):
            one[name] = np.array([choice(r, 0.0, signed(r, -6, 2)) for _ in range(n * m)]).reshape(
                n, m
            )
        one["prior_var"] = np.array([power(r, 3, 6) for _ in range(size)]).reshape(shape)
        one["reduced_var"] = np.array(
            [choice(r, power(r, -20, 0), power(r, 0, 8)) for _ in range(size)]
        ).reshape(shape)
        yield {key: value.astype(to) for key, value in one.items()} | {
            "pruned": np.array([True, False])
        }
