"""Draws: which dimension is which, chains that disagree, draws without moments."""

import numpy as np
import pytest
import torch

import pyro_bmr as bmr

PRIOR = bmr.Gaussian(1.3)


def normal(*shape, mean=0.4, std=0.3, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(mean, std, shape))


def read(samples, prior=PRIOR, **options):
    return bmr.Posterior.from_samples(
        samples if isinstance(samples, dict) else {"w": samples}, prior, **options
    )


def test_chains_are_the_draws_of_all_of_them():
    chains = torch.tensor([1.0, 0.0, -1.0]) + 0.05 * normal(4, 500, 3, mean=0.0, std=1.0)
    whole, flat = read({"w": chains}, chains=True), read({"w": chains.reshape(2000, 3)})
    torch.testing.assert_close(whole["w"].mean, flat["w"].mean)
    torch.testing.assert_close(whole["w"].joint.cov, flat["w"].joint.cov)
    scalar = read({"w": chains[..., 0], "v": chains[:, :, None]}, chains=True)
    assert scalar["w"].mean.shape == () and scalar["v"].mean.shape == (1, 3)
    assert read({"w": chains}, chains=False)["w"].mean.shape == (500, 3)


MAYBE = {
    "a site": normal(4, 500, 3),
    "a number": normal(4, 500),
    "two sites": {"w": normal(4, 500, 3), "v": normal(4, 500)},
    "many chains": {"w": normal(64, 1000, 2), "v": normal(64, 1000)},
    "the entries first": normal(3, 500),
    "many entries first": normal(40, 1000),
    "more entries than draws": torch.linspace(-2, 2, 900)[:, None] + normal(900, 100),
}


@pytest.mark.parametrize("case", MAYBE)
def test_what_may_be_chains_is_refused_with_the_question(case):
    with pytest.raises(
        bmr.errors.ModelError,
        match=r"are they \d+ chains of \d+ draws, or .*say chains=True or chains=False",
    ):
        read(MAYBE[case])


def test_what_cannot_be_chains_is_read():
    # an ensemble: no common second dimension
    weights = {"0.weight": normal(5, 30, 8), "0.bias": normal(5, 30), "2.weight": normal(5, 10, 30)}
    assert read(weights)["0.weight"].mean.shape == (30, 8)
    assert read(normal(50, 4))["w"].mean.shape == (4,) and read(normal(6, 10, 10))[
        "w"
    ].mean.shape == (10, 10)
    # fewer draws than coefficients, which differ
    wide = normal(100, 1, std=0.3) + torch.linspace(-2, 2, 300) + normal(100, 300, std=0.2, seed=1)
    assert read(wide)["w"].mean.shape == (300,)


def test_a_site_without_entries_is_one():
    assert read(normal(50, 0))["w"].mean.shape == (0,)


def test_shapes_that_are_refused():
    for samples, options, words in (
        (
            {"w": normal(500, 3), "v": normal(400, 2)},
            {},
            r"one number of draws for all sites.*\[400, 500\] \(w 500, v 400\)",
        ),
        (
            {"w": normal(4, 500, 3), "v": normal(4, 400)},
            {"chains": True},
            r"shape \(chains, draws, \.\.\.\), the first two the same",
        ),
        (normal(500), {"chains": True}, "expected samples of shape"),
        (normal(500, 3), {"chains": 4}, "chains=4: expected True"),
        (normal(1, 500, 3), {}, "1 draw; a variance needs at least two"),
        (normal(500, 3) * torch.nan, {}, "finite means"),
        ({}, {}, "samples: expected site name → tensor, got none"),
        (
            normal(500, 3),
            {"supports": ["w"]},
            r"supports: expected site name → support, got \['w'\]",
        ),
        (normal(500, 3), {"joint_up_to": "all"}, "joint_up_to='all'"),
    ):
        with pytest.raises(bmr.errors.ModelError, match=words):
            read(samples, **options)


def test_chains_that_disagree_come_with_a_warning():
    apart = normal(4, 200, 2)
    apart[3, :, 1] += 1.0
    with pytest.warns(
        bmr.PyroBMRWarning, match=r"site 'w': its chains disagree, split R-hat is 1\.[5-9]"
    ):
        read(apart, chains=True)
    drifting = normal(2, 400) + torch.linspace(0, 1.5, 400)
    with pytest.warns(bmr.PyroBMRWarning, match="chains disagree"):
        read(drifting, chains=True)
    stuck = normal(4, 200, 2)
    stuck[2, :, 0] = 0.4
    with pytest.warns(bmr.PyroBMRWarning, match="split R-hat is inf"):
        read(stuck, chains=True)


def test_draws_that_do_not_move():
    draws = normal(300, 3, mean=2.0)
    draws[:, 1] = 0.7
    with pytest.raises(
        bmr.errors.ModelError, match="site 'w': 1 of 3 entries have the same value in all 300 draws"
    ):
        read(draws)
    draws[:, 1] = 0.0  # as samples under a mask
    site = read(draws)["w"]
    assert site.mask.tolist() == [True, False, True] and not site.joint.cov[1].any()
    assert bmr.reduce(read(draws), to=bmr.Gaussian(0)).masks["w"].tolist() == [True, False, True]


def test_heavy_tails_are_said():
    half_cauchy = torch.tensor(np.abs(np.random.default_rng(5).standard_cauchy(1000)))
    with pytest.warns(
        bmr.PyroBMRWarning,
        match=(
            r"site 'tau': one draw of 1000 makes up \d+% of a variance.*supports=\{'tau':"
            r" 'positive'\}"
        ),
    ):
        read({"tau": half_cauchy}, None)
    log = read({"tau": half_cauchy}, None, supports={"tau": "positive"})["tau"]
    # of the log of a half-Cauchy
    assert log.mean.abs() < 0.2 and log.var.item() == pytest.approx(np.pi**2 / 4, rel=0.15)
    laplace = torch.tensor(np.random.default_rng(6).laplace(size=(1000, 50)))
    # and nothing is said of lighter ones
    assert read(laplace)["w"].var.mean().item() == pytest.approx(2.0, rel=0.05)


def test_low_precision_is_raised_before_anything_is_computed():
    draws = normal(4000, 2, mean=30.0, std=100.0)
    half = read(draws.half())["w"]
    assert half.mean.dtype == torch.float32 and torch.allclose(
        half.var.double(), draws.var(0), rtol=0.01
    )
    moments = bmr.Posterior.from_moments(
        {"w": torch.ones(3, dtype=torch.bfloat16, requires_grad=True)},
        {"w": torch.full((3,), 0.5).half()},
        PRIOR,
    )
    assert (
        moments["w"].mean.dtype == moments["w"].var.dtype == torch.float32
        and not moments["w"].mean.requires_grad
    )
