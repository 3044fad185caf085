"""The inverse from a Cholesky factor, held against another algorithm."""

import pytest
import torch

from pyro_bmr.formulas.covariance import factor_in_place
from pyro_bmr.formulas.factor_inverse import inverse_of_factor


def positive_definite(size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(size)
    root = torch.randn(size, size + 3, generator=generator, dtype=torch.float64)
    return (root @ root.mT / size + 0.1 * torch.eye(size)).to(dtype)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 513, 700])
@pytest.mark.parametrize("turned", [False, True])
def test_it_is_the_inverse_of_the_matrix(size, turned):
    matrix = positive_definite(size)
    chol = torch.linalg.cholesky(matrix)
    chol = chol.mT.contiguous().mT if turned else chol.contiguous()
    place = chol.data_ptr()
    found = inverse_of_factor(chol)
    assert found.data_ptr() == place and found.is_contiguous()
    torch.testing.assert_close(found, torch.linalg.inv(matrix), rtol=1e-9, atol=1e-11)
    assert torch.equal(found, found.mT)


def test_a_factor_takes_the_memory_of_its_matrix():
    matrix = positive_definite(40)
    place, given = matrix.data_ptr(), matrix.clone()
    factor, minor = factor_in_place(matrix)
    assert minor == 0 and factor.data_ptr() == place
    assert bool((factor.triu(1) == 0).all())
    torch.testing.assert_close(factor @ factor.mT, given, rtol=1e-12, atol=1e-13)


def test_the_leading_minor_that_is_not_positive_is_named():
    matrix = positive_definite(6)
    matrix[3, 3] = -1.0
    assert factor_in_place(matrix)[1] == 4


def test_float32_has_its_own_digits():
    matrix = positive_definite(300, torch.float32)
    found = inverse_of_factor(torch.linalg.cholesky(matrix))
    exact = torch.linalg.inv(matrix.double())
    assert float((found - exact).norm() / exact.norm()) < 1e-4
