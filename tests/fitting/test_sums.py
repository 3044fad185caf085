"""Sums over whole vectors."""

import pytest
import torch

from pyro_bmr.fitting.sums import dot


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (1 << 16,), (300, 400), (900, 1000)])
def test_the_dot_product_is_the_sum_of_the_products(shape):
    one, other = torch.randn(2, *shape, dtype=torch.float64)
    found = dot(one, other)
    assert found.shape == ()
    torch.testing.assert_close(found, (one * other).sum(), rtol=1e-10, atol=1e-10)


def test_many_numbers_of_single_precision_lose_few_digits():
    ones = torch.full((20_000_000,), 1.1)
    exact = 20_000_000 * float(ones[0]) ** 2
    assert abs(float(dot(ones, ones)) / exact - 1) < 1e-3
