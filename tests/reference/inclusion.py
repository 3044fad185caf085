"""Makes inclusion.npz: what `exact_inclusion` must give for 2,000 problems of one to six weights.

`python tests/reference/inclusion.py` writes the file beside this one, in a minute. ΔF of 0.1 to
10⁶ nats (exact in float32), α and β from 10⁻⁶ to 10⁶ in half of the problems, from 10⁻²⁰ to 10²⁰ in
a quarter, and from 10⁻²⁰⁰ to 10²⁰⁰, at most 240 orders of magnitude apart, in the last.
∏(π + (1 − π) rᵢ) is a polynomial in π, so that every integral over the Beta prior is a sum of
positive terms: with mpmath at 60 digits.
"""

from __future__ import annotations

from pathlib import Path

import mpmath as mp
import numpy as np

PROBLEMS, MOST = 2000, 6


def problem(k: int) -> tuple[list[float], float, float]:
    """ΔF, α and β of the k-th problem."""
    rng = np.random.default_rng([5, k])
    d = (
        (rng.choice([0.1, 3.0, 40.0, 1e3, 1e6]) * rng.normal(size=rng.integers(1, MOST + 1)))
        .astype(np.float32)
        .tolist()
    )
    orders = (6, 6, 20, 200)[k % 4]
    a, b = rng.uniform(-orders, orders, 2)
    return d, float(10.0**a), float(10.0 ** np.clip(b, a - 240, a + 240))


def inclusion(d: list[float], alpha: float, beta: float) -> list[float]:
    """The log evidence gain, logit E[π], and the log odds of each weight being in the spike."""
    with mp.workdps(60):
        r, a, b = [mp.exp(mp.mpf(x)) for x in d], mp.mpf(alpha), mp.mpf(beta)

        def rising(x: mp.mpf, n: int) -> mp.mpf:
            return mp.fprod(x + i for i in range(n))

        def expectation(factors: list[mp.mpf], k: int, m: int) -> mp.mpf:
            """E[π^k (1 − π)^m ∏(π + (1 − π) r)] under Beta(α, β)."""
            poly = [mp.mpf(1)]
            for x in factors:
                poly = [
                    out + into
                    for out, into in zip([p * x for p in poly] + [0], [0, *poly], strict=True)
                ]
            n = len(factors)
            return sum(
                c * rising(a, j + k) * rising(b, n - j + m) / rising(a + b, n + k + m)
                for j, c in enumerate(poly)
            )

        drops = [
            mp.log(
                x * expectation(r[:i] + r[i + 1 :], 0, 1) / expectation(r[:i] + r[i + 1 :], 1, 0)
            )
            for i, x in enumerate(r)
        ]
        return [
            float(x)
            for x in (
                mp.log(expectation(r, 0, 0)),
                mp.log(expectation(r, 1, 0) / expectation(r, 0, 1)),
                *drops,
            )
        ]


def table() -> np.ndarray:
    """α, β, gain, logit E[π], six ΔF and six log odds of each problem; NaN if it has fewer
    weights.
    """
    rows = np.full((PROBLEMS, 4 + 2 * MOST), np.nan)
    for k, row in enumerate(rows):
        d, alpha, beta = problem(k)
        gain, log_odds, *drops = inclusion(d, alpha, beta)
        row[:4] = alpha, beta, gain, log_odds
        row[4 : 4 + len(d)], row[4 + MOST : 4 + MOST + len(d)] = d, drops
    return rows


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_suffix(".npz"), inclusion=table())
