"""The evidence of a Laplace approximation, against determinants of all of the precision and a
regression's own evidence.
"""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import multivariate_normal

from pyro_bmr.formulas import LaplaceEvidence
from tests.exact import random_spd


def problem(kind):
    """ŵ − η, the arguments for the curvature, and all of it."""
    rng = np.random.default_rng(3)
    n, m = (4, 4) if kind == "square" else (3, 4)
    distance = torch.tensor(rng.normal(size=(n, m)) * 0.7)
    rows, columns = (torch.tensor(random_spd(rng, size, 2.0)) for size in (n, m))
    columns[0] = columns[:, 0] = 0  # an input that is always 0
    if kind in ("kronecker", "square"):
        return distance, (rows, columns), torch.kron(rows, columns)
    if kind == "all":
        whole = torch.kron(rows, columns)
        return distance, (whole, None), whole
    diagonal = torch.tensor(rng.uniform(0, 30, (n, m)))
    return distance, (diagonal, None), diagonal.flatten().diag()


def dense(distance, whole, scale, temperature, penalised):
    """−½ wᵀQw − ½ log |I + s²H/T| with Q = I/s², or H(T + s²H)⁻¹."""
    total, w = torch.eye(len(whole)) + scale**2 * whole / temperature, distance.flatten()
    moved = w / scale**2 if penalised else whole @ torch.linalg.solve(total, w) / temperature
    return float(-0.5 * (w @ moved + torch.linalg.slogdet(total)[1]))


@pytest.mark.parametrize("penalised", [True, False])
@pytest.mark.parametrize("kind", ["kronecker", "square", "all", "diagonal"])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_it_is_that_of_the_whole_precision_and_has_its_maximum(kind, temperature, penalised):
    distance, curvature, whole = problem(kind)
    found = LaplaceEvidence.of(distance, *curvature, temperature, penalised)
    for scale in (0.01, 0.6, 30.0):
        expected = dense(distance, whole, scale, temperature, penalised)
        assert found.at(scale) == pytest.approx(expected, rel=1e-10)
    best = minimize_scalar(
        lambda log_scale: -dense(distance, whole, math.exp(log_scale), temperature, penalised),
        bounds=(-3, 3),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert found.best_scale() == pytest.approx(math.exp(best.x), rel=1e-5 if penalised else 1e-4)


def test_of_a_regression_it_is_exact():
    """At ŵ of least squares, and at the mode under each scale."""
    rng = np.random.default_rng(8)
    x, noise = rng.normal(size=(30, 4)), 0.5
    y = x @ rng.normal(size=4) + noise * rng.normal(size=30)
    curvature = torch.tensor(x.T @ x / noise**2)
    for scale in (0.2, 1.3):
        cov = noise**2 * np.eye(30) + scale**2 * x @ x.T
        exact = multivariate_normal(np.zeros(30), cov).logpdf(y)
        mode = np.linalg.solve(x.T @ x / noise**2 + np.eye(4) / scale**2, x.T @ y / noise**2)
        for at, penalised in ((np.linalg.lstsq(x, y)[0], False), (mode, True)):
            likelihood = multivariate_normal(x @ at, noise**2 * np.eye(30)).logpdf(y)
            one = LaplaceEvidence.of(torch.tensor(at), curvature, None, 1.0, penalised)
            assert likelihood + one.at(scale) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_far_from_where_it_starts(factor):
    """The maximum is where s² γ = ‖ŵ − η‖², to rounding."""
    distance, (rows, columns), _ = problem("kronecker")
    scale = LaplaceEvidence.of(distance, factor * rows, columns, 0.3, True).best_scale()
    products = torch.outer(*(torch.linalg.eigvalsh(t).clamp_min(0) for t in (rows, columns)))
    share = factor * scale**2 * products / 0.3
    count = float((share / (1 + share)).sum())
    assert scale**2 * count == pytest.approx(float(distance.square().sum()), rel=1e-9)


@pytest.mark.parametrize("penalised", [True, False])
def test_without_a_maximum(penalised):
    distance, (rows, columns), _ = problem("kronecker")
    assert LaplaceEvidence.of(0 * distance, rows, columns, 1.0, penalised).best_scale() == 0
    assert LaplaceEvidence.of(distance, 0 * rows, columns, 1.0, penalised).best_scale() == math.inf
    # weights that are small beside their noise
    small = LaplaceEvidence.of(1e-3 * distance, rows, columns, 1.0, penalised).best_scale()
    assert (small > 0) == penalised
