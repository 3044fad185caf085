"""The evidence of a Laplace approximation, against determinants of all of the precision."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from pyro_bmr.formulas import LaplaceEvidence
from tests.exact import random_spd


def problem(kind):
    """ŵ − η, the arguments for the curvature, and all of it."""
    rng = np.random.default_rng(3)
    distance = torch.tensor(rng.normal(size=(3, 4)) * 0.7)
    rows, columns = (torch.tensor(random_spd(rng, size, 2.0)) for size in (3, 4))
    columns[0] = columns[:, 0] = 0  # an input that is always 0
    if kind == "kronecker":
        return distance, (rows, columns), torch.kron(rows, columns)
    if kind == "all":
        whole = torch.kron(rows, columns)
        return distance, (whole, None), whole
    diagonal = torch.tensor(rng.uniform(0, 3, (3, 4)))
    return distance, (diagonal, None), diagonal.flatten().diag()


def dense(distance, whole, scale, temperature):
    """−½ wᵀw/s² − ½ log |I + s²H/T|."""
    total = torch.eye(len(whole)) + scale**2 * whole / temperature
    return float(-0.5 * (distance.square().sum() / scale**2 + torch.linalg.slogdet(total)[1]))


@pytest.mark.parametrize("kind", ["kronecker", "all", "diagonal"])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_it_is_that_of_the_whole_precision_and_has_its_maximum(kind, temperature):
    distance, curvature, whole = problem(kind)
    found = LaplaceEvidence.of(distance, *curvature, temperature)
    for scale in (0.01, 0.6, 30.0):
        expected = dense(distance, whole, scale, temperature)
        assert found.at(scale) == pytest.approx(expected, rel=1e-12)
    best = minimize_scalar(
        lambda log_scale: -dense(distance, whole, math.exp(log_scale), temperature),
        bounds=(-6, 6),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert found.best_scale() == pytest.approx(math.exp(best.x), rel=1e-5)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_far_from_where_it_starts(factor):
    """The maximum is where s² γ = ‖ŵ − η‖², to rounding."""
    distance, (rows, columns), _ = problem("kronecker")
    scale = LaplaceEvidence.of(distance, factor * rows, columns, 0.3).best_scale()
    products = torch.outer(*(torch.linalg.eigvalsh(t).clamp_min(0) for t in (rows, columns)))
    share = factor * scale**2 * products / 0.3
    count = float((share / (1 + share)).sum())
    assert scale**2 * count == pytest.approx(float(distance.square().sum()), rel=1e-9)


def test_without_a_maximum():
    distance, curvature, _ = problem("kronecker")
    assert LaplaceEvidence.of(0 * distance, *curvature, 1.0).best_scale() == 0
    assert (
        LaplaceEvidence.of(distance, 0 * curvature[0], curvature[1], 1.0).best_scale() == math.inf
    )
