"""Occam's window against a search over all subsets, and how often it keeps a weight of noise."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_bmr.formulas.occams_window import window_shift
from tests.exact import windowed


@pytest.mark.parametrize("seed", range(6))
def test_it_prunes_the_most_that_costs_no_more_than_the_window(seed):
    rng = np.random.default_rng(seed)
    gain = torch.tensor(rng.normal(-1.5, 2.0, 9))
    gain[rng.integers(9)] = torch.inf
    gain[rng.integers(9)] = -torch.inf
    for decisions in (1, 3, 9, 400):
        shifted = gain + window_shift(gain, decisions)
        expected = torch.tensor(windowed(gain.tolist(), decisions), dtype=torch.float64)
        torch.testing.assert_close(shifted, expected)
        cost = -float(gain[(shifted > 0) & (gain <= 0)].sum())
        assert cost <= math.log(decisions)


def test_one_decision_has_no_window_and_ties_stay_together():
    assert window_shift(torch.tensor([-0.001]), 1) == 0
    assert window_shift(torch.tensor([]), 0) == 0
    equal = torch.full((8,), -0.9)  # log 8 is 2.08: two of them could go, and which is not known
    assert not (equal + window_shift(equal, 8) > 0).any()


def test_a_bayes_factor_of_n_is_rarer_than_one_in_n():
    """The bound that gives the window its width, for a slab of twenty errors: P(BF ≥ k) ≤ 1/k."""
    wide = 1 + 20.0**2
    for k in (3.0, 10.0, 100.0):
        limit = 2 * (math.log(k) + 0.5 * math.log(wide)) * wide / (wide - 1)  # of z²
        assert stats.chi2(1).sf(limit) <= 1 / k
