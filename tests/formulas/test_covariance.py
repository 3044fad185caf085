"""The symmetric part of a matrix, tile by tile."""

from unittest.mock import patch

import numpy as np
import pytest
import torch

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas import covariance
from pyro_bmr.formulas.covariance import covariance_factor, symmetrised
from tests.exact import random_spd


@pytest.mark.parametrize("tile", [1, 3, 7, 512])
def test_the_average_with_the_transpose_and_its_factor(tile):
    rng = np.random.default_rng(1)
    matrix = torch.tensor(random_spd(rng, 10) + 1e-9 * rng.normal(size=(10, 10)))
    with patch.multiple(covariance, _TILE=tile):
        average = symmetrised(matrix, lambda a, b: torch.tensor(1e-7))
        root = covariance_factor(matrix, "posterior", torch.arange(10).flip(0))
        same = matrix.clone()
        assert symmetrised(same, lambda a, b: torch.tensor(1e-7), same) is same
    torch.testing.assert_close(average, (matrix + matrix.mT) / 2, rtol=1e-15, atol=0)
    assert torch.equal(same, average) and torch.equal(average, average.mT)
    torch.testing.assert_close(root @ root.mT, average.flip(0, 1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("place", [(0, 1), (2, 9), (9, 2), (9, 9)])
def test_an_uneven_pair_in_any_tile_is_seen(place):
    matrix = torch.tensor(random_spd(np.random.default_rng(2), 10))
    matrix[place] = torch.nan if place == (9, 9) else matrix[place] + 0.1
    with patch.multiple(covariance, _TILE=4):
        assert symmetrised(matrix, lambda a, b: torch.tensor(1e-3)) is None
        with pytest.raises(ReductionError, match="not symmetric|not finite"):
            covariance_factor(matrix, "posterior")
