"""The Gaussian formulas in 200 digits, as the textbook has them: `python -m
tests.reference.gaussian` writes `gaussian.npz`, in about two minutes.

Sources: the densities themselves. ΔF = log ∫ q p̃/p, the reduced posterior by P̃ = P + Π̃ − Π,
pruned entries by log N(0; ·). What the library says of a posterior wider than its prior is its own
rule, and is here as `delta_f` states it. An answer outside the dtype's range is ±inf here; one that
does not exist is NaN.
"""

from __future__ import annotations

from itertools import combinations, islice
from pathlib import Path

import mpmath as mp
import numpy as np

from tests.reference import gaussian_grid as grid

FILE = Path(__file__).with_name("gaussian.npz")
MOMENTS = 400  # problems of each structure whose reduced moments are kept, beside ΔF of all
SEARCHED = 70  # Dense problems of five entries whose 32 models are kept
mp.mp.dps = 200


def exact(x):
    """Numbers of a dtype as mpmath numbers, matrices as matrices."""
    if np.ndim(x) == 2:
        return mp.matrix([[mp.mpf(float(v)) for v in row] for row in x])
    return mp.matrix([mp.mpf(float(v)) for v in x]) if np.ndim(x) == 1 else mp.mpf(float(x))


def weight(mean, var, prior_mean, prior_var, reduced_mean, reduced_var) -> list:
    """ΔF, μ̃, σ̃², h, L, and ΔF of the point spike at 0."""
    m, s, eta, p, eta_, v = map(
        exact, (mean, var, prior_mean, prior_var, reduced_mean, reduced_var)
    )
    spike = log_normal(m, s) - log_normal(eta, p)
    h, precision = (m - eta) / s, 1 / s - 1 / p
    if v == 0:
        return [log_normal(m - eta_, s) - log_normal(eta - eta_, p), eta_, v, h, precision, spike]
    if s >= p:
        return [mp.mpf(0), eta_, v, h, precision, spike]
    new = 1 / s + 1 / v - 1 / p
    centre = (m / s + eta_ / v - eta / p) / new
    gain = (mp.log(p / (s * v * new)) - m**2 / s - eta_**2 / v + eta**2 / p + centre**2 * new) / 2
    return [gain, centre, 1 / new, h, precision, spike]


def log_normal(x, var):
    return -(mp.log(2 * mp.pi * var) + x**2 / var) / 2


def from_message(h, precision, prior_var, reduced_var, shift) -> list:
    """ΔF of N(e, v) and, for L > 0, the best v and its ΔF."""
    h, lam, p, v, e = map(exact, (h, precision, prior_var, reduced_var, shift))

    def evidence(mean, var):  # log ∫ N(w; mean, var) exp(hw − ½Lw²)
        spread = 1 + var * lam
        return (
            -mp.log(spread) / 2
            + h * mean
            - lam * mean**2 / 2
            + (h - lam * mean) ** 2 * var / (2 * spread)
        )

    gain = mp.mpf(0) if lam <= 0 and v > 0 else evidence(e, v) - evidence(mp.mpf(0), p)
    if lam <= 0:
        return [gain, p, mp.mpf(0)]
    best = max(mp.mpf(0), (h / lam - e) ** 2 - 1 / lam)
    return [gain, best, evidence(e, best) - evidence(mp.mpf(0), p)]


def log_det(a):
    return mp.log(mp.det(a))


def positive(a) -> bool:
    return all(mp.det(a[:k, :k]) > 0 for k in range(1, a.rows + 1))


def joint(mean, cov, prior_mean, prior_cov, reduced_mean, reduced_cov) -> list:
    """ΔF, μ̃ and the covariance."""
    post, prior, reduced = cov**-1, prior_cov**-1, reduced_cov**-1
    new = post + reduced - prior
    if not positive(new):
        return [mp.nan, mean * mp.nan, cov * mp.nan]
    new_cov = new**-1
    centre = new_cov * (post * mean + reduced * reduced_mean - prior * prior_mean)
    logs = log_det(post) + log_det(reduced) - log_det(new) - log_det(prior)
    energy = sum(
        sign * (x.T * a * x)[0]
        for sign, x, a in (
            (1, mean, post),
            (1, reduced_mean, reduced),
            (-1, prior_mean, prior),
            (-1, centre, new),
        )
    )
    return [(logs - energy) / 2, centre, new_cov]


def pruned(mean, cov, prior_mean, prior_cov, gone) -> list:
    """ΔF, mean and covariance of the rest."""
    s, r = np.flatnonzero(gone).tolist(), np.flatnonzero(~gone).tolist()

    def part(a, rows, columns):
        return mp.matrix([[a[i, j] for j in columns] for i in rows])

    def vector(a, rows):
        return mp.matrix([a[i] for i in rows])

    def log_at_zero(mu, a):
        block, x = part(a, s, s), vector(mu, s)
        return -(log_det(block) + (x.T * block**-1 * x)[0]) / 2

    gain = log_at_zero(mean, cov) - log_at_zero(prior_mean, prior_cov) if s else mp.mpf(0)
    if not s or not r:
        return [gain, None, None]
    pull = part(cov, r, s) * part(cov, s, s) ** -1
    return [
        gain,
        vector(mean, r) - pull * vector(mean, s),
        part(cov, r, r) - pull * part(cov, s, r),
    ]


def as_dense(kind: str, one: dict) -> list:
    """Mean and covariance of posterior, prior and reduced prior of a problem of any structure, and
    its pruned entries.
    """
    shape = one["mean"].shape
    flat = [exact(np.asarray(one[k]).flatten()) for k in ("mean", "prior_mean", "reduced_mean")]
    gone = one["pruned"]
    if kind == "dense":
        covs = [exact(one[k]) for k in ("cov", "prior_cov", "reduced_cov")]
    else:
        diagonals = [
            mp.diag([mp.mpf(float(v)) for v in np.broadcast_to(one[k], shape).flatten()])
            for k in ("prior_var", "reduced_var")
        ]
        if kind == "low_rank":
            factor = exact(one["factor"])
            covs = [mp.diag([mp.mpf(float(v)) for v in one["var"]]) + factor * factor.T, *diagonals]
        else:
            rows, columns = exact(one["row_cov"]), exact(one["col_cov"])
            m, size = columns.rows, rows.rows * columns.rows
            covs = [
                mp.matrix(
                    [
                        [rows[i // m, j // m] * columns[i % m, j % m] for j in range(size)]
                        for i in range(size)
                    ]
                ),
                *diagonals,
            ]
            gone = np.repeat(gone, m)
    return [flat[0], covs[0], flat[1], covs[1], flat[2], covs[2], gone]


def structure(kind: str, one: dict) -> tuple[float, float, list, list]:
    """ΔF, ΔF of the pruned entries, and the moments after each as flat lists (lower triangles of
    covariances).
    """
    *gaussians, gone = as_dense(kind, one)
    gain, mean, cov = joint(*gaussians)
    drop, rest, rest_cov = pruned(*gaussians[:4], gone)
    return float(gain), float(drop), flattened(mean, cov), flattened(rest, rest_cov)


def flattened(mean, cov) -> list:
    return [float(x) for x in mean] + [
        float(cov[i, j]) for i in range(cov.rows) for j in range(i + 1)
    ]


def models(one: dict) -> list:
    """ΔF of all 32 models of five entries, from none pruned to all, in the order of `subsets`."""
    mean, cov, prior_mean, prior_cov, *_ = as_dense("dense", one)
    return [
        float(pruned(mean, cov, prior_mean, prior_cov, np.isin(np.arange(5), gone))[0])
        for gone in subsets()
    ]


def subsets() -> list:
    return [gone for k in range(6) for gone in combinations(range(5), k)]


def searched(dtype: str) -> list:
    return list(islice((one for one in grid.dense(dtype) if len(one["mean"]) == 5), SEARCHED))


def answers(dtype: str) -> dict[str, np.ndarray]:
    """Every answer for the grid of one dtype."""
    largest = float(np.finfo(grid.DTYPES[dtype]).max)
    out = {}
    out["weights"] = np.array(
        [
            [float(x) for x in weight(*row)]
            for row in zip(*grid.weights(dtype).values(), strict=True)
        ]
    )
    out["messages"] = np.array(
        [
            [float(x) for x in from_message(*row)]
            for row in zip(*grid.messages(dtype).values(), strict=True)
        ]
    )
    for kind in ("dense", "low_rank", "matrix_normal"):
        results = [structure(kind, one) for one in getattr(grid, kind)(dtype)]
        out[f"{kind}_delta_f"] = np.array([result[:2] for result in results])
        every = len(results) // MOMENTS
        out[f"{kind}_moments"] = np.array(
            [x for result in results[::every] for x in result[2] + result[3]]
        )
    out["models"] = np.array([models(one) for one in searched(dtype)])
    return {
        f"{dtype}_{key}": np.where(np.abs(value) > largest, np.copysign(np.inf, value), value)
        for key, value in out.items()
    }


if __name__ == "__main__":
    np.savez_compressed(
        FILE, **{key: value for dtype in grid.DTYPES for key, value in answers(dtype).items()}
    )
