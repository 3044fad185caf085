"""Occam's window at the end of a reduction, for each kind of reduced prior."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import pyro_bmr as bmr
from pyro_bmr.formulas.spike_and_slab import exact_inclusion
from pyro_bmr.posteriors.site import Site
from tests.exact import windowed

RNG = np.random.default_rng(11)
VAR = torch.tensor(RNG.uniform(0.01, 0.06, (4, 5)))
# estimates of all sizes, many of them near the border of the evidence
MEAN = torch.tensor(RNG.normal(0, 2.6, (4, 5))) * VAR.sqrt()
PRIOR = bmr.formulas.Diagonal(*(torch.tensor(t, dtype=torch.float64) for t in (0.0, 1.7)))
POINT = bmr.Gaussian(scale=0)


def posterior(mask=None, mean=MEAN, var=VAR):
    return bmr.Posterior({"w": Site(mean, var, PRIOR)}).masked({} if mask is None else {"w": mask})


def spike_by_hand(mean=MEAN, var=VAR):
    return stats.norm(mean, var**0.5).logpdf(0) - stats.norm(0, 1.7**0.5).logpdf(0)


def left(gain, decisions):
    """Which decisions are kept, by a search over all subsets of those with evidence."""
    return np.array(windowed(np.asarray(gain, dtype=float).tolist(), decisions)) <= 0


@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_the_point_spike_goes_on_to_the_smallest_model_in_the_window(threshold):
    gain = spike_by_hand().flatten() - threshold
    plain = bmr.reduce(posterior(), to=POINT, threshold=threshold)
    result = bmr.reduce(posterior(), to=POINT, threshold=threshold, window=True)
    expected = left(np.where(gain > 0, math.inf, gain), gain.size).reshape(4, 5)
    assert np.array_equal(result.masks["w"], expected)
    assert 0 < result.kept < plain.kept
    pruned = ~expected.flatten()
    assert result.delta_f == pytest.approx((gain + threshold)[pruned].sum(), abs=1e-9)
    odds = result.sites["w"].drop_log_odds
    assert torch.equal(odds > threshold, ~result.masks["w"])
    still = result.masks["w"]
    np.testing.assert_allclose(odds[still], spike_by_hand()[still.numpy()], atol=1e-10)


def test_weights_that_were_pruned_before_are_decisions_too():
    """Its width is that of the whole site, log 20, and what is pruned stays so."""
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[[0, 1, 1, 3], [1, 2, 3, 2]] = True
    gain = np.where(mask.numpy(), spike_by_hand(), math.inf)
    gain[gain > 0] = math.inf
    narrow, wide = (left(gain.flatten(), n).reshape(4, 5) for n in (int(mask.sum()), 20))
    assert not np.array_equal(narrow, wide)
    found = bmr.reduce(posterior(mask), to=POINT, window=True)
    assert np.array_equal(found.masks["w"], wide & mask.numpy())


def test_sites_share_a_window_and_a_horseshoe_has_its_own():
    mean = 1.2 * MEAN
    sites = {"a": Site(mean[:2], VAR[:2], PRIOR), "b": Site(mean[2:], VAR[2:], PRIOR)}
    gain = spike_by_hand(mean).flatten()
    whole = left(np.where(gain > 0, math.inf, gain), 20).reshape(4, 5)
    alone = left(np.where(gain > 0, math.inf, gain)[10:], 10).reshape(2, 5)
    assert not np.array_equal(whole[2:], alone)
    found = bmr.reduce(bmr.Posterior(sites), to=POINT, window=True)
    assert np.array_equal(np.concatenate([found.masks["a"], found.masks["b"]]), whole)
    mixed = bmr.reduce(bmr.Posterior(sites), to={"a": bmr.Horseshoe(), "b": POINT}, window=True)
    assert np.array_equal(mixed.masks["b"], alone)
    shrunk = bmr.reduce(bmr.Posterior(sites), to={"a": bmr.Horseshoe(), "b": None})
    assert torch.equal(mixed.masks["a"], shrunk.masks["a"])


def test_the_log_odds_of_a_spike_and_slab():
    drop = exact_inclusion(torch.tensor(spike_by_hand().flatten())).drop_log_odds
    expected = left(drop.where(drop <= 0, torch.inf), 20).reshape(4, 5)
    plain, found = (
        bmr.reduce(posterior(), to=bmr.SpikeAndSlab(), window=window) for window in (False, True)
    )
    assert np.array_equal(found.masks["w"], expected) and found.kept < plain.kept
    assert found.delta_f == plain.delta_f  # of the prior, and not of the mask


@pytest.mark.parametrize("per, axis", [("unit", 1), ("input", 0)])
def test_groups_have_one_window(per, axis):
    mean = MEAN * torch.tensor([[0.05, 0.9, 0.6, 1.5]]).T.double() * torch.linspace(0.4, 1, 5)
    gain = spike_by_hand(mean).sum(axis)
    expected = left(np.where(gain > 0, math.inf, gain), gain.size)
    plain, found = (
        bmr.reduce(posterior(mean=mean), to=POINT, per=per, window=window)
        for window in (False, True)
    )
    assert np.array_equal(found.masks["w"].any(axis), expected)
    assert found.kept <= plain.kept


def test_groups_that_were_pruned_before_are_decisions_too():
    mean = MEAN.clone()
    mean[:, :] = 0.01 * VAR.sqrt()
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2:] = False
    # two units are left, each with evidence of 1.1 nats: log 2 prunes none, log 4 one
    sd = VAR[:2].sqrt()
    target = spike_by_hand(torch.zeros(2, 5).double(), VAR[:2]).sum(1) + np.array([1.1, 1.2])
    mean[:2] = torch.tensor(np.sqrt(2 * target / (5 * (1 / 1 - 0))))[:, None] * sd
    gain = spike_by_hand(mean[:2], VAR[:2]).sum(1)
    assert (gain < 0).all() and math.log(2) < -gain.max() < math.log(4) < -gain.sum()
    found = bmr.reduce(posterior(mask, mean), to=POINT, per="unit", window=True)
    assert found.masks["w"].any(1).sum() == 1


def test_a_horseshoe_has_one_window_and_a_size_has_none():
    to = bmr.Horseshoe(tau0=0.5)
    plain, same = (bmr.reduce(posterior(), to=to, window=window) for window in (False, True))
    assert torch.equal(plain.masks["w"], same.masks["w"]) and 0 < plain.kept < 1
    for kept in (0.5, {"w": 0.5}):
        sized = bmr.reduce(posterior(), to=POINT, kept=kept, window=True)
        assert torch.equal(
            sized.masks["w"], bmr.reduce(posterior(), to=POINT, kept=kept).masks["w"]
        )


def test_a_hundred_columns_of_noise_are_left_out():
    """Estimates in their exact distribution under a slab of 38 errors, as three large coefficients
    of unit size among 97 of zero have it: how often the three alone are kept.
    """
    rng, exact = np.random.default_rng(3), {False: 0, True: 0}
    prior = bmr.Gaussian(1.5)
    for _ in range(200):
        data = rng.normal(0, 1, 100)
        data[:3] += 25
        var = torch.full((100,), 1 / (1 + 1 / 38**2)).double() * (1.5 / 38) ** 2
        mean = torch.tensor(data) * (1.5 / 38) * var / (1.5 / 38) ** 2
        one = bmr.Posterior.from_moments({"w": mean}, {"w": var}, prior)
        for window in exact:
            mask = bmr.reduce(one, to=POINT, window=window).masks["w"]
            exact[window] += mask.nonzero()[:, 0].tolist() == [0, 1, 2]
    # P(|z| < 2.7)⁹⁷ = .5, P(all of them within the window) = .98 or more
    assert exact[False] < 140 and exact[True] >= 190


def test_the_decision_of_the_prior_of_the_fit_has_no_window():
    """The third weight is in the slab by less than log n nats, which a window would prune."""
    mean, var = (torch.tensor(t, dtype=torch.float64) for t in ([0.1, 1.4, 0.22], [0.9, 0.3, 0.02]))
    inclusion = (torch.tensor(t, dtype=torch.float64) for t in (-1.0, 0.01))
    fitted = bmr.Posterior(
        {
            "w": Site(mean, var, None, bmr.SpikeAndSlab(0.1)),
            "w_inclusion": Site(*inclusion, support="unit_interval"),
        }
    )
    odds = -1.0 + math.log(0.1) - 0.5 * (mean**2 + var) * (1 - 100)
    assert 0 < float(odds[2]) < math.log(3) < float(odds[:2].min())
    for per in ("weight", {"w": torch.arange(3)}):
        assert bool(bmr.reduce(fitted, to=None, per=per, window=True).masks["w"].all())
