"""The variance with the best evidence: closed form, groups, zeros; against scipy's optimum of the
exact evidence.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

import pyro_bmr as bmr
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.line_search import line_maximum
from pyro_bmr.formulas.message import message
from pyro_bmr.formulas.relevance import best_var

PRIOR_VAR = 1.7


def posterior(mean, var):
    q = Diagonal(torch.tensor(mean, dtype=torch.float64), torch.tensor(var, dtype=torch.float64))
    return q, Diagonal(
        torch.tensor(0.2, dtype=torch.float64), torch.tensor(PRIOR_VAR, dtype=torch.float64)
    )


def log_evidence(v, q, e):
    """Σ log N(m; e, v + 1/L), the estimates of the data alone under a prior N(e, v)."""
    precision = 1 / q.var.numpy() - 1 / PRIOR_VAR
    m = (q.mean.numpy() / q.var.numpy() - 0.2 / PRIOR_VAR) / precision
    return stats.norm(e, np.sqrt(v + 1 / precision)).logpdf(m)


@pytest.mark.parametrize("e", [0.2, 0.0])
def test_one_weight_by_its_evidence(e):
    q, p = posterior([0.9, 0.05, -1.4, 0.3], [0.05, 0.3, 0.2, 0.02])
    got = best_var(message(q, p), p.var, shift=e - 0.2)
    for i in range(4):
        alone = Diagonal(q.mean[i], q.var[i])
        loss = lambda v, alone=alone: -log_evidence(v, alone, e)  # noqa: E731
        best = optimize.minimize_scalar(
            loss, bounds=(0, 20), method="bounded", options={"xatol": 1e-9}
        )
        v, value = (0.0, -loss(0.0)) if -loss(0.0) >= -best.fun else (best.x, -best.fun)
        assert got.var[i].item() == pytest.approx(v, abs=1e-5)
        prior = stats.norm(0.2, np.sqrt(PRIOR_VAR + 1 / (1 / q.var[i].item() - 1 / PRIOR_VAR)))
        m = (q.mean[i].item() / q.var[i].item() - 0.2 / PRIOR_VAR) / (
            1 / q.var[i].item() - 1 / PRIOR_VAR
        )
        assert got.delta_f[i].item() == pytest.approx(value - prior.logpdf(m), abs=1e-6)
    assert (got.var > 0).any() and (got.var == 0).any()


def test_a_group_shares_its_variance():
    rng = np.random.default_rng(5)
    q, p = posterior(
        np.concatenate([rng.normal(0, 0.9, 30), rng.normal(0, 0.02, 30)]),
        rng.uniform(0.02, 0.3, 60),
    )
    groups = torch.arange(2).repeat_interleave(30)
    got = best_var(message(q, p), p.var, groups)
    big = Diagonal(q.mean[:30], q.var[:30])
    best = optimize.minimize_scalar(
        lambda x: -log_evidence(np.exp(x), big, 0.2).sum(),
        bounds=(-6, 3),
        method="bounded",
        options={"xatol": 1e-8},
    ).x
    assert got.var[0].item() == pytest.approx(np.exp(best), rel=1e-3)
    assert got.delta_f[0].item() == pytest.approx(
        bmr.delta_f(big, p, Diagonal(p.mean, got.var[0])).sum().item(), abs=1e-9
    )
    small = [
        log_evidence(v, Diagonal(q.mean[30:], q.var[30:]), 0.2).sum()
        for v in (0.0, 1e-4, 1e-3, 1e-2, 0.1)
    ]
    assert got.var[1].item() == 0 and small[0] == max(small)


def test_a_group_of_one_is_the_closed_form():
    q, p = posterior([0.9, 0.05, -1.4, 0.3], [0.05, 0.3, 0.2, 0.02])
    single, closed = (best_var(message(q, p), p.var, groups) for groups in (torch.arange(4), None))
    torch.testing.assert_close(single.var, closed.var, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(single.delta_f, closed.delta_f, rtol=0, atol=1e-6)


def test_a_weight_that_the_data_ignore_keeps_its_prior():
    q, p = posterior([0.9, 0.4], [2.0, 1.7])
    got = best_var(message(q, p), p.var)
    assert got.var.tolist() == [PRIOR_VAR, PRIOR_VAR] and got.delta_f.abs().max() < 1e-12


def test_the_highest_of_several_maxima():
    x = line_maximum(
        lambda t: torch.cos(3 * t) - 0.05 * (t - 4).square(),
        torch.tensor([-5.0, -5.0]).double(),
        torch.tensor([9.0, 3.0]).double(),
        points=40,
    )
    assert x.tolist() == pytest.approx([4.1867, 2.1156], abs=2e-3)  # sin 3t = −(t − 4)/30


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float64]),
    st.lists(st.tuples(st.floats(-12, 12), st.floats(-12, 12)), min_size=1, max_size=4),
    st.booleans(),
)
def test_no_variance_is_nan_or_negative(dtype, cases, grouped):
    mean, var = (torch.tensor([10.0 ** case[k] for case in cases], dtype=dtype) for k in (0, 1))
    p = Diagonal(torch.zeros_like(mean), torch.full_like(mean, PRIOR_VAR))
    got = best_var(
        message(Diagonal(mean, var), p),
        p.var,
        torch.zeros(len(mean), dtype=torch.long) if grouped else None,
    )
    assert (
        not got.var.isnan().any()
        and (got.var >= 0).all()
        and got.var.dtype == dtype
        and not got.delta_f.isnan().any()
    )
