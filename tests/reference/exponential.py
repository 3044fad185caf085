"""The law of exponential families in 200 digits, by A(λ̃') − A(λ̃) − A(λ') + A(λ): `python -m
tests.reference.exponential` writes `exponential.npz`.

A family here is how its natural parameters follow from the parameters of torch's class, its
log-normaliser, and the way back. NaN: no such member.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mpmath as mp
import numpy as np

from tests.reference.gaussian_grid import DTYPES, choice, power, rounded, signed

FILE = Path(__file__).with_name("exponential.npz")
POINTS = 2000
mp.mp.dps = 200


class Family(NamedTuple):
    """`draw`: parameters of prior, posterior, reduced prior; `lam`, `log_normalizer`, `back`: as in
    the law; `inside`: where A is finite.
    """

    draw: Callable
    lam: Callable
    log_normalizer: Callable
    back: Callable
    inside: Callable


def conjugate(r: random.Random, n: int) -> list[list[float]]:
    """Counts of every size added to a prior, and another prior."""
    prior = [power(r, -8, 12) for _ in range(n)]
    reduced = [choice(r, power(r, -8, 12), a, a * (1 + signed(r, -20, -2))) for a in prior]
    return [prior, [a + choice(r, power(r, -4, 10), power(r, 10, 30)) for a in prior], reduced]


def normals(r: random.Random) -> list[list[float]]:
    eta, scale = choice(r, 0.0, signed(r, -4, 12)), power(r, -20, 10)
    narrow = scale * choice(r, power(r, -30, -1), 1 - power(r, -20, -2))
    mu = eta + signed(r, -4, 4) * scale
    return [
        [eta, scale],
        [mu, narrow],
        [choice(r, eta, mu, 0.0), scale * choice(r, power(r, -20, 0), power(r, -1, 1) / 2)],
    ]


def chances(r: random.Random) -> list[list[float]]:
    return [
        [choice(r, r.random(), power(r, -40, -1) / 2, 1 - power(r, -22, -1) / 2)] for _ in range(3)
    ]


def falling(r: random.Random) -> list[list[float]]:
    """For λ = log p the sum λ' + λ̃ − λ must stay below 0: the posterior falls faster than the
    prior.
    """
    p = choice(r, r.random() / 2, power(r, -20, -2))
    return [
        [p],
        [choice(r, p + (1 - p) * r.random(), p * 1.5)],
        [choice(r, p + (1 - p) * r.random() / 2, p * 1.25)],
    ]


FAMILIES = {
    "Normal": Family(
        normals,
        lambda m, s: (m / s**2, s**-2),
        lambda h, p: h**2 / p / 2 - mp.log(p) / 2,
        lambda h, p: (h / p, 1 / mp.sqrt(p)),
        lambda h, p: p > 0,
    ),
    "HalfNormal": Family(
        lambda r: [row[1:] for row in normals(r)],
        lambda s: (s**-2,),
        lambda p: -mp.log(p) / 2,
        lambda p: (1 / mp.sqrt(p),),
        lambda p: p > 0,
    ),
    "Gamma": Family(
        lambda r: conjugate(r, 2),
        lambda a, b: (a, b),
        lambda a, b: mp.loggamma(a) - a * mp.log(b),
        lambda a, b: (a, b),
        lambda a, b: a > 0 and b > 0,
    ),
    "Beta": Family(
        lambda r: conjugate(r, 2),
        lambda a, b: (a, b),
        lambda a, b: mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b),
        lambda a, b: (a, b),
        lambda a, b: a > 0 and b > 0,
    ),
    "Dirichlet": Family(
        lambda r: conjugate(r, 3),
        lambda *a: a,
        lambda *a: sum(map(mp.loggamma, a)) - mp.loggamma(sum(a)),
        lambda *a: a,
        lambda *a: min(a) > 0,
    ),
    "Poisson": Family(
        lambda r: conjugate(r, 1),
        lambda x: (mp.log(x),),
        mp.exp,
        lambda x: (mp.exp(x),),
        lambda x: True,
    ),
    "Bernoulli": Family(
        chances,
        lambda p: (mp.log(p) - mp.log(1 - p),),
        lambda x: mp.log(1 + mp.exp(x)),
        lambda x: (1 / (1 + mp.exp(-x)),),
        lambda x: True,
    ),
    "Geometric": Family(
        falling,
        lambda p: (mp.log(1 - p),),
        lambda x: -mp.log(1 - mp.exp(x)),
        lambda x: (1 - mp.exp(x),),
        lambda x: x < 0,
    ),
    "VonMises": Family(
        lambda r: [[signed(r, -6, 1), power(r, -4, 8)] for _ in range(3)],
        lambda m, k: (k * mp.cos(m), k * mp.sin(m)),
        lambda c, s: mp.log(mp.besseli(0, mp.sqrt(c**2 + s**2))),
        lambda c, s: (mp.atan2(s, c), mp.sqrt(c**2 + s**2)),
        lambda c, s: True,
    ),
}


def parameters(name: str, dtype: str) -> np.ndarray:
    """(points, 3, parameters) of prior, posterior and reduced prior."""
    r = random.Random(f"{name}")
    family = FAMILIES[name]
    points: list[list[list[float]]] = []
    while len(points) < POINTS:
        point = [[rounded(x, dtype) for x in row] for row in family.draw(r)]
        if name not in ("Bernoulli", "Geometric") or all(0 < row[0] < 1 for row in point):
            points.append(point)
    return np.array(points, dtype=DTYPES[dtype])


def answer(name: str, point: np.ndarray) -> list[float]:
    """ΔF and the parameters of the reduced posterior."""
    family = FAMILIES[name]
    prior, post, reduced = (family.lam(*(mp.mpf(float(x)) for x in row)) for row in point)
    new = [a + c - b for a, b, c in zip(post, prior, reduced, strict=True)]
    if not family.inside(*new):
        return [float("nan")] * (1 + len(point[0]))
    a = family.log_normalizer
    return [float(x) for x in (a(*new) - a(*reduced) - a(*post) + a(*prior), *family.back(*new))]


if __name__ == "__main__":
    np.savez_compressed(
        FILE,
        **{
            f"{dtype}_{name}": np.array([answer(name, x) for x in parameters(name, dtype)])
            for dtype in DTYPES
            for name in FAMILIES
        },
    )
