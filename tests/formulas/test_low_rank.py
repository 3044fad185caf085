"""Low rank plus diagonal: blocks set to zero, against the dense form and the exact conjugate
model.
"""

import numpy as np
import pytest
import torch
from scipy import stats

import pyro_bmr as bmr
from pyro_bmr.formulas.gaussian import prune_subset
from pyro_bmr.formulas.low_rank import LowRank, log_density_at_zero

RNG = np.random.default_rng(5)
D, K = 9, 3
MEAN, VAR, FACTOR = (
    torch.tensor(a)
    for a in (RNG.normal(size=D), RNG.uniform(0.05, 0.6, D), RNG.normal(size=(D, K)) * 0.5)
)
PRIOR = bmr.formulas.Diagonal(
    torch.tensor(RNG.normal(size=D) * 0.4), torch.tensor(RNG.uniform(0.8, 3.0, D))
)
POSTERIOR = LowRank(MEAN, VAR, FACTOR)
COV = torch.diag(VAR) + FACTOR @ FACTOR.mT
PRUNED = torch.tensor([True, False, True, True, False, False, True, False, False])


def test_a_block_at_zero_is_the_ratio_of_two_densities_and_leaves_the_conditional():
    gain, rest = prune_subset(POSTERIOR, PRIOR, PRUNED)
    s, r = PRUNED.numpy(), ~PRUNED.numpy()
    cov = COV.numpy()
    log_q = stats.multivariate_normal(MEAN.numpy()[s], cov[np.ix_(s, s)]).logpdf(np.zeros(s.sum()))
    log_p = stats.norm(PRIOR.mean.numpy()[s], PRIOR.var.numpy()[s] ** 0.5).logpdf(0).sum()
    assert gain.item() == pytest.approx(log_q - log_p, abs=1e-10)
    solve = np.linalg.solve(
        cov[np.ix_(s, s)], np.column_stack([cov[np.ix_(s, r)], MEAN.numpy()[s]])
    )
    np.testing.assert_allclose(
        rest.mean, MEAN.numpy()[r] - cov[np.ix_(r, s)] @ solve[:, -1], atol=1e-10
    )
    np.testing.assert_allclose(
        torch.diag(rest.var) + rest.factor @ rest.factor.mT,
        cov[np.ix_(r, r)] - cov[np.ix_(r, s)] @ solve[:, :-1],
        atol=1e-10,
    )


def test_it_agrees_with_the_dense_form_block_after_block():
    first, rest = prune_subset(POSTERIOR, PRIOR, PRUNED)
    inner = torch.tensor([False, True, True, False, False])
    second, last = prune_subset(
        rest, bmr.formulas.Diagonal(PRIOR.mean[~PRUNED], PRIOR.var[~PRUNED]), inner
    )
    both = PRUNED.clone()
    both[~PRUNED] = inner
    gain, direct = prune_subset(bmr.formulas.Dense(MEAN, COV), PRIOR, both)
    assert (first + second).item() == pytest.approx(gain.item(), abs=1e-10)
    torch.testing.assert_close(last.mean, direct.mean)
    torch.testing.assert_close(torch.diag(last.var) + last.factor @ last.factor.mT, direct.cov)


def test_a_large_site_needs_no_matrix_of_its_size():
    """300,000 entries: a (d, d) matrix would take 360 gigabytes."""
    d = 300_000
    generator = torch.Generator().manual_seed(1)
    posterior = LowRank(
        torch.randn(d, generator=generator),
        torch.rand(d, generator=generator) + 0.1,
        torch.randn(d, 2, generator=generator) / 500,
    )
    pruned = torch.rand(d, generator=generator) < 0.5
    gain, rest = prune_subset(posterior, bmr.Gaussian(2.0), pruned)
    assert gain.isfinite() and rest.mean.shape == (int((~pruned).sum()),)
    block = LowRank(posterior.mean[pruned], posterior.var[pruned], posterior.factor[pruned])
    independent = (
        torch.distributions.Normal(block.mean, (block.var + block.factor.square().sum(1)).sqrt())
        .log_prob(torch.zeros(()))
        .sum()
    )
    # correlations are small here
    assert log_density_at_zero(block).item() == pytest.approx(independent.item(), rel=1e-3)
