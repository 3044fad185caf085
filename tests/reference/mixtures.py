"""Makes mixtures.npz: what reductions of single weights to Laplace, Student-t and horseshoe priors
must be.

`python tests/reference/mixtures.py` writes the file beside this one, in a minute. Each table has
2,000 rows: h, L, prior variance (all exact in float32), scale, and ΔF, logit κ, reduced mean,
reduced variance. Laplace: by mpmath's error function at 60 digits and more. Student-t and
horseshoe: by the trapezoid rule over the logarithm of the mixing scale in 80-bit floats, in an
order without differences of large numbers; at 30 digits a row takes a second, so `by_nodes` does it
for a few rows of each table, with another step, when the tables are made and in
`tests/formulas/test_precision_mixtures.py`.
"""

from __future__ import annotations

from pathlib import Path

import mpmath as mp
import numpy as np

ROWS, SCALES = 2000, 10


def inputs(seed: int, scales: list[float]) -> np.ndarray:
    """Rows of h, L, prior variance and scale: signals from none to overwhelming, posteriors from as
    wide as the prior to 10⁻⁵ of it.
    """
    rng = np.random.default_rng(seed)
    n = ROWS
    var = 10 ** rng.uniform(-1, 1, n)
    precision = 10 ** rng.uniform(-4, 9, n) / var
    m = rng.choice([-1, 1], n) * np.sqrt(var) * 10 ** rng.uniform(-5, 1.5, n)
    scale = np.repeat(scales, n // len(scales))
    table = np.stack([m * precision, precision, var], 1).astype(np.float32).astype(np.float64)
    return np.concatenate([table, scale[:, None]], 1)


def laplace(h: float, precision: float, var: float, b: float) -> tuple[mp.mpf, ...]:
    """ΔF, logit κ, mean and variance by moments of the two halves of a Gaussian."""
    size = float(max(abs(h), 1 / b) / precision**0.5) + 10
    with mp.workdps(60 + int(4 * np.log10(size))):
        h, precision, var, b = map(mp.mpf, (h, precision, var, b))
        root, halves = mp.sqrt(precision), []
        for x in ((1 / b - h) / root, (1 / b + h) / root):
            j0 = mp.sqrt(mp.pi / 2) * mp.erfc(x / mp.sqrt(2)) * mp.exp(x * x / 2)
            j1 = 1 - x * j0
            halves.append((j0, j1, j0 - x * j1))
        (a0, a1, a2), (c0, c1, c2) = halves
        evidence = (
            mp.log((a0 + c0) / (2 * b * root))
            + mp.log1p(var * precision) / 2
            - h * h * var / 2 / (1 + var * precision)
        )
        mean = (a1 - c1) / (a0 + c0) / root
        kappa = (a0 - c0) / (a0 + c0) / b / h
        return (
            evidence,
            mp.log(kappa) - mp.log(mean * precision / h),
            mean,
            (a2 + c2) / (a0 + c0) / precision - mean**2,
        )


def by_nodes(
    h: float, precision: float, var: float, nodes: list[tuple[mp.mpf, mp.mpf]]
) -> tuple[mp.mpf, ...]:
    """The same from (variance, weight) nodes."""
    h, precision, var = map(mp.mpf, (h, precision, var))
    s0 = s1 = v1 = v2 = mp.mpf(0)
    half = h * h / 2
    for v, w in nodes:
        shrunk = 1 / (1 + v * precision)
        share = v * shrunk
        p = w * mp.sqrt(shrunk) * mp.exp(half * share)
        s0 += p
        s1 += p * shrunk
        v1 += p * share
        v2 += p * share * share
    mean, square = v1 / s0, v2 / s0
    evidence = mp.log(s0) + mp.log1p(var * precision) / 2 - half * var / (1 + var * precision)
    return (
        evidence,
        mp.log(s1) - mp.log(precision * v1),
        h * mean,
        mean + h * h * (square - mean * mean),
    )


def by_floats(rows: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The same for many rows, in 80-bit floats: exponents and variances counted from their largest
    and their mean.
    """
    h, precision, var = (c[:, None] for c in rows.T[:3].astype(np.longdouble))
    shrunk = 1 / (1 + v * precision)
    share = v * shrunk
    p = w * np.sqrt(shrunk) * np.exp(-h * h / 2 / precision * shrunk)
    s0 = p.sum(1, keepdims=True)
    p = p / s0
    kappa, mean = (p * shrunk).sum(1, keepdims=True), (p * share).sum(1, keepdims=True)
    spread = (
        h
        * h
        * np.where(
            kappa < 0.5,
            (p * (shrunk - kappa) ** 2).sum(1, keepdims=True) / precision**2,
            (p * (share - mean) ** 2).sum(1, keepdims=True),
        )
    )
    evidence = (
        np.log(s0) + np.log1p(var * precision) / 2 + h * h / 2 / precision / (1 + var * precision)
    )
    return np.concatenate(
        [evidence, np.log(kappa) - np.log(precision * mean), h * mean, mean + spread], 1
    ).astype(np.float64)


def horseshoe(
    tau: float, slab: float | None, step: float = 0.08, reach: float = 60.0
) -> tuple[np.ndarray, np.ndarray]:
    """Variances and weights of the trapezoid rule over log λ, λ half-Cauchy."""
    step = np.longdouble(step)
    t = np.arange(-int(reach / step), int(reach / step) + 1) * step
    psi = np.longdouble(tau) ** 2 * np.exp(2 * t)
    return (
        psi if slab is None else psi / (1 + psi / np.longdouble(slab) ** 2)
    ), step / np.longdouble(mp.pi) / np.cosh(t)


def student(
    df: float, scale: float, step: float = 0.1, reach: float = 150.0
) -> tuple[np.ndarray, np.ndarray]:
    """The same over log g, g ~ Gamma(ν/2, ν/2), v = s²/g."""
    half = np.longdouble(df) / 2
    step = np.longdouble(step) / max(np.longdouble(1), np.sqrt(half) / 2)
    u = np.arange(-int(reach / step), int(5 / step) + 1) * step
    w = np.exp(half * (u - np.exp(u)))
    return np.longdouble(scale) ** 2 * np.exp(-u), w / w.sum()


STUDENT = [
    (1.0, 1e-4),
    (1.0, 0.1),
    (2.5, 1e-6),
    (2.5, 0.3),
    (4.0, 1e-3),
    (4.0, 1.0),
    (4.0, 1e-7),
    (7.0, 0.05),
    (30.0, 0.2),
    (30.0, 1e-2),
]
TAUS = [1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 2.0, 20.0]
SLAB = 0.8
MIXTURES = {  # table → (nodes of its k-th scale with another step and range, its scales)
    "student": (lambda k, **grid: student(*STUDENT[k], **grid), [s for _, s in STUDENT]),
    "horseshoe": (lambda k, **grid: horseshoe(TAUS[k], None, **grid), TAUS),
    "regularised": (lambda k, **grid: horseshoe(TAUS[k], SLAB, **grid), TAUS),
}


def part(k: int) -> slice:
    """The rows of the k-th scale."""
    return slice(k * ROWS // SCALES, (k + 1) * ROWS // SCALES)


def at_30_digits(name: str, k: int, row: list[float]) -> list[float]:
    """One row of a table of nodes by mpmath, with a step that is not that of the table."""
    with mp.workdps(30):
        nodes = [
            (mp.mpf(str(v)), mp.mpf(str(w)))
            for v, w in zip(
                *MIXTURES[name][0](k, step=0.145, reach=55.0 if name != "student" else 140.0),
                strict=True,
            )
        ]
        return list(map(float, by_nodes(*row[:3], nodes)))


def tables() -> dict[str, np.ndarray]:
    rows = inputs(1, [1.0])
    rows[:, 3] = 10 ** np.random.default_rng(0).uniform(-6, 1.5, ROWS)
    found = {"laplace": np.array([[*r, *map(float, laplace(*r))] for r in rows.tolist()])}
    for seed, (name, (nodes, scales)) in enumerate(MIXTURES.items(), start=2):
        rows = inputs(seed, scales)
        found[name] = np.concatenate(
            [
                np.concatenate([rows[part(k)], by_floats(rows[part(k)], *nodes(k))], 1)
                for k in range(SCALES)
            ]
        )
        for k in range(SCALES):
            row = found[name][part(k)][seed].tolist()
            np.testing.assert_allclose(at_30_digits(name, k, row), row[4:], rtol=1e-12, atol=1e-14)
    return found


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **tables())
