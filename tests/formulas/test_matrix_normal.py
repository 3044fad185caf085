"""Matrix normal: rows, columns and moments, against the dense form over all entries."""

import numpy as np
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.formulas.gaussian import prune_subset, reduced_posterior
from pyro_bmr.formulas.matrix_blocks import reduced_mean, reduced_var
from pyro_bmr.formulas.matrix_normal import MatrixNormal
from tests.exact import random_spd

RNG = np.random.default_rng(8)
N, M = 4, 3
MEAN = torch.tensor(RNG.normal(size=(N, M)))
ROWS, COLUMNS = torch.tensor(random_spd(RNG, N, 0.3)), torch.tensor(random_spd(RNG, M, 0.7))
POSTERIOR = MatrixNormal(MEAN, ROWS, COLUMNS)
DENSE = bmr.formulas.Dense(MEAN.flatten(), torch.kron(ROWS, COLUMNS))
PRIOR = bmr.formulas.Diagonal(
    torch.tensor(RNG.normal(size=(N, M)) * 0.3), torch.tensor(RNG.uniform(0.9, 2.5, (N, M)))
)
FLAT = bmr.formulas.Dense(PRIOR.mean.flatten(), torch.diag(PRIOR.var.flatten()))


@pytest.mark.parametrize(
    "pruned",
    [
        torch.tensor([True, False, True, False]),
        torch.tensor([[False], [True], [True], [True]]),
        torch.tensor([[False, True, True]]),
    ],
    ids=["rows", "rows as a column", "columns"],
)
def test_whole_rows_or_columns(pruned):
    gain, rest = prune_subset(POSTERIOR, PRIOR, pruned)
    entries = (pruned[:, None] if pruned.ndim == 1 else pruned).expand(N, M).flatten()
    dense_gain, dense_rest = prune_subset(DENSE, FLAT, entries)
    assert gain.item() == pytest.approx(dense_gain.item(), abs=1e-10)
    torch.testing.assert_close(rest.mean.flatten(), dense_rest.mean)
    torch.testing.assert_close(torch.kron(rest.row_cov, rest.col_cov), dense_rest.cov)


def test_other_masks_are_refused():
    with pytest.raises(
        bmr.errors.ReductionError,
        match=r"whole rows, a mask of shape \(4,\), by whole columns, \(1, 3\), or by single"
        r" entries, \(4, 3\); got \(3, 4\)",
    ):
        prune_subset(POSTERIOR, PRIOR, torch.ones(M, N, dtype=torch.bool))


@pytest.mark.parametrize("by_column", [False, True])
def test_reduced_moments(by_column):
    shape = (1, M) if by_column else (N, 1)
    prior, reduced = (
        bmr.formulas.Diagonal(
            torch.tensor(RNG.normal(size=shape)), torch.tensor(RNG.uniform(*low_high, shape))
        )
        for low_high in ((0.9, 1.8), (0.2, 0.6))
    )
    flat = [
        bmr.formulas.Dense(g.mean.expand(N, M).flatten(), torch.diag(g.var.expand(N, M).flatten()))
        for g in (prior, reduced)
    ]
    exact = reduced_posterior(DENSE, *flat)
    torch.testing.assert_close(reduced_mean(POSTERIOR, prior, reduced).flatten(), exact.mean)
    torch.testing.assert_close(
        reduced_var(POSTERIOR, prior, reduced).flatten(), exact.cov.diagonal()
    )
