"""`reduce`: the right formula for each target, the decisions, the table."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import pyro_bmr as bmr
from pyro_bmr.formulas.message import Message
from pyro_bmr.formulas.scale_mixture import scale_mixture_reduction
from pyro_bmr.formulas.spike_and_slab import exact_inclusion
from pyro_bmr.posteriors.site import Site
from tests.exact import windowed

RNG = np.random.default_rng(7)
MEAN = torch.tensor(
    np.where(RNG.random((4, 6)) < 0.4, RNG.normal(0, 1, (4, 6)), RNG.normal(0, 0.05, (4, 6)))
)
VAR = torch.tensor(RNG.uniform(0.005, 0.06, (4, 6)))
PRIOR = bmr.formulas.Diagonal(
    torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
)


def posterior(mask=None, **sites):
    return bmr.Posterior(
        {
            "w": Site(MEAN, VAR, PRIOR, mask=mask),
            "noise": Site(torch.tensor(0.1), torch.tensor(0.02), support="positive"),
            **sites,
        }
    )


def spike_by_hand(mean=MEAN, var=VAR):
    return stats.norm(mean, var**0.5).logpdf(0) - stats.norm(0, 1.7**0.5).logpdf(0)


def test_point_spike():
    result = bmr.reduce(posterior(), to=bmr.Gaussian(0))
    by_hand = spike_by_hand()
    assert np.array_equal(result.masks["w"], by_hand <= 0) and 0 < result.kept < 1
    assert result.delta_f == pytest.approx(by_hand[by_hand > 0].sum(), abs=1e-9)
    np.testing.assert_allclose(result.sites["w"].spike_delta_f, by_hand, atol=1e-10)
    reduced = result.posterior["w"]
    assert not reduced.mean[~result.masks["w"]].any() and torch.equal(
        reduced.mean[result.masks["w"]], MEAN[result.masks["w"]]
    )
    assert list(result.sites) == ["w"] and list(result.posterior) == ["w", "noise"]


def test_threshold_moves_the_decision():
    by_hand = spike_by_hand()
    assert np.array_equal(
        bmr.reduce(posterior(), to=bmr.Gaussian(0), threshold=1.2).masks["w"], by_hand <= 1.2
    )


def test_target_sparsity_keeps_the_best_by_evidence():
    result = bmr.reduce(posterior(), to=bmr.Gaussian(0), kept=0.25)
    assert int(result.masks["w"].sum()) == 6
    assert np.array_equal(
        result.masks["w"], spike_by_hand() <= np.sort(spike_by_hand().flatten())[5]
    )
    assert bmr.reduce(posterior(), to=bmr.Gaussian(0), kept=0.0).kept == 0.0
    assert bmr.reduce(posterior(), to=bmr.Gaussian(0), kept=1.0).kept == 1.0


def test_a_target_is_met_among_weights_that_the_data_say_nothing_of():
    """All of those have the ΔF of the prior, to the last digit: 12 of 20 here, and 6 are to
    stay.
    """
    mean, var = torch.zeros(20), torch.full((20,), 0.49)
    mean[:4], var[:4] = torch.tensor([2.0, -3.0, 1.5, 4.0]), 0.01  # needed
    var[16:] = 0.01  # not needed
    silent = bmr.Posterior.from_moments(
        {"w": mean.view(4, 5)}, {"w": var.view(4, 5)}, bmr.Gaussian(0.7)
    )
    for kept, count in ((0.3, 6), (0.2, 4), (0.85, 17), (0.05, 1)):
        mask = bmr.reduce(silent, to=bmr.Gaussian(0), kept=kept).masks["w"].flatten()
        assert int(mask.sum()) == count and int(mask[:4].sum()) == min(count, 4)
    assert bmr.reduce(silent, to=bmr.Gaussian(0), kept=0.85).masks["w"].flatten()[:16].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [0.0, 0.013, 0.4, 0.71, 0.9, 1.0])
def test_a_target_size_over_sites_with_masks_and_equal_weights(kept, dtype):
    """The least ΔF of all sites together; of equal ones the first in the order of the sites; never
    one that is pruned already.
    """
    rng = np.random.default_rng(3)
    sizes, sites, gains = {"a": 40, "b": 25, "c": 60}, {}, []
    for name, n in sizes.items():
        mean = torch.tensor(rng.integers(0, 4, n) / 4.0, dtype=dtype)
        mask = torch.tensor(rng.random(n) < 0.8) if name != "b" else None
        var = torch.full((n,), 0.25, dtype=dtype)
        if mask is not None:
            mean, var = mean.where(mask, 0), var.where(mask, 0)
        sites[name] = Site(mean, var, PRIOR, mask=mask)
        by_hand = 0.5 * np.log(1.7 / 0.25) - 0.5 * mean.double().numpy() ** 2 / 0.25
        gains.append(by_hand if mask is None else np.where(mask, by_hand, np.inf))
    pooled = np.concatenate(gains)
    order = np.argsort(pooled, kind="stable")[: round(kept * len(pooled))]
    want = np.zeros(len(pooled), dtype=bool)
    want[order] = True
    want &= np.isfinite(pooled)
    masks = bmr.reduce(bmr.Posterior(sites, rows=1000), to=bmr.Gaussian(0), kept=kept).masks
    got = torch.cat([masks[name] for name in sizes]).numpy()
    assert (got == want).all()


def test_pruned_weights_stay_pruned_and_count_nowhere():
    mask = torch.rand(4, 6) < 0.5
    result = bmr.reduce(posterior(mask), to=bmr.SpikeAndSlab(alpha=1.5, beta=2.5))
    alone = exact_inclusion(torch.tensor(spike_by_hand())[mask], 1.5, 2.5)
    assert result.delta_f == pytest.approx(alone.log_evidence_gain.item(), abs=1e-9)
    assert not (result.masks["w"] & ~mask).any()
    again = bmr.reduce(result.posterior, to=bmr.Gaussian(0), kept=0.1)
    assert (
        int(again.masks["w"].sum()) <= round(0.1 * 24)
        and not (again.masks["w"] & ~result.masks["w"]).any()
    )


def test_spike_and_slab_learns_the_inclusion():
    result = bmr.reduce(posterior(), to=bmr.SpikeAndSlab(alpha=1.5, beta=2.5))
    exact = exact_inclusion(torch.tensor(spike_by_hand()), 1.5, 2.5)
    assert torch.equal(result.masks["w"], exact.probability >= 0.5)
    assert result.delta_f == pytest.approx(exact.log_evidence_gain.item(), abs=1e-9)
    assert result.table()["scale"].iloc[0] == pytest.approx(exact.log_odds.item())


def test_spike_of_finite_width():
    result = bmr.reduce(posterior(), to=bmr.SpikeAndSlab(spike_scale=0.08))
    by_hand = bmr.delta_f(bmr.formulas.Diagonal(MEAN, VAR), PRIOR, bmr.Gaussian(0.08))
    assert result.delta_f == pytest.approx(
        exact_inclusion(by_hand, 1, 1).log_evidence_gain.item(), abs=1e-9
    )


def test_gaussian_of_another_scale_changes_moments_and_prunes_nothing():
    result = bmr.reduce(posterior(), to=bmr.Gaussian(0.4))
    q = bmr.formulas.Diagonal(MEAN, VAR)
    assert result.kept == 1.0
    assert result.delta_f == pytest.approx(
        bmr.delta_f(q, PRIOR, bmr.Gaussian(0.4)).sum().item(), abs=1e-9
    )
    torch.testing.assert_close(
        result.posterior["w"].mean, bmr.formulas.reduced_posterior(q, PRIOR, bmr.Gaussian(0.4)).mean
    )


def test_empirical_gaussian_finds_the_scale_of_the_best_evidence():
    result = bmr.reduce(posterior(), to=bmr.Gaussian())
    best = result.table()["scale"].iloc[0]
    gains = {
        s: bmr.reduce(posterior(), to=bmr.Gaussian(best * s)).delta_f for s in (0.98, 1.0, 1.02)
    }
    assert gains[1.0] > max(gains[0.98], gains[1.02])
    assert result.delta_f == pytest.approx(gains[1.0], abs=1e-6)


def test_horseshoe():
    result = bmr.reduce(posterior(), to=bmr.Horseshoe(tau0=0.5))
    tau = result.table()["scale"].iloc[0]
    data = (MEAN / VAR, 1 / VAR - 1 / 1.7)
    direct = scale_mixture_reduction(
        Message(*data), torch.full((4, 6), 1.7, dtype=torch.float64), *bmr.Horseshoe().mixture(tau)
    )
    kept = direct.kappa <= 0.5
    gain = torch.tensor(spike_by_hand()) - direct.delta_f  # log p(y | w = 0) − log p(y)
    left = torch.tensor(windowed(gain.where(kept, torch.inf).flatten().tolist(), 24)) <= 0
    assert torch.equal(result.masks["w"], left.view(4, 6)) and 0 < left.sum() < kept.sum()
    assert result.delta_f == pytest.approx(direct.delta_f.sum().item(), abs=1e-9)
    alive = result.masks["w"]
    torch.testing.assert_close(result.posterior["w"].mean[alive], direct.mean[alive])


def test_reducing_twice_does_not_compound_a_point_spike():
    """The prior of the fit stays the prior of the question: a second look finds nothing new."""
    first = bmr.reduce(posterior(), to=bmr.Gaussian(0))
    second = bmr.reduce(first.posterior, to=bmr.Gaussian(0))
    assert torch.equal(first.masks["w"], second.masks["w"]) and second.delta_f == 0


def test_own_decision_of_fitted_priors():
    unit = bmr.formulas.Diagonal(
        torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    )
    mean, var = (
        torch.tensor([0.1, 1.4, -0.02], dtype=torch.float64),
        torch.tensor([0.9, 0.3, 0.002], dtype=torch.float64),
    )
    horseshoe = bmr.Posterior({"w": Site(mean, var, unit, bmr.Horseshoe())})
    # the third is known to be near zero
    assert bmr.reduce(horseshoe, to=None).masks["w"].tolist() == [False, True, False]
    sites = {
        "w": Site(mean, var, None, bmr.SpikeAndSlab(0.1)),
        "w_inclusion": Site(
            torch.tensor(-1.0, dtype=torch.float64),
            torch.tensor(0.01, dtype=torch.float64),
            support="unit_interval",
        ),
    }
    odds = -1.0 + math.log(0.1) - 0.5 * (mean**2 + var) * (1 - 100)
    assert (
        bmr.reduce(bmr.Posterior(sites), to=None).masks["w"].tolist()
        == (odds >= 0).tolist()
        == [True, True, False]
    )
    gaussian = bmr.Posterior({"w": Site(mean, var, unit, bmr.Gaussian(1.0))})
    result = bmr.reduce(gaussian, to=None)
    assert result.kept == 1.0 and result.delta_f == 0.0


def test_patterns_choose_sites():
    sites = {
        "a.weight": Site(MEAN, VAR, PRIOR),
        "a.bias": Site(MEAN[0], VAR[0], PRIOR),
        "b.weight": Site(MEAN, VAR, PRIOR),
    }
    result = bmr.reduce(bmr.Posterior(sites), to={"a.bias": None, "a.*": bmr.Gaussian(0)})
    assert list(result.sites) == ["a.weight"]
    table = result.table()
    assert table.columns.tolist() == ["site", "size", "kept", "delta_f", "wider", "scale", "given"]
    assert table["size"].tolist() == [24] and table["kept"].iloc[0] == pytest.approx(result.kept)


def test_weights_wider_than_their_prior_are_counted_not_nan():
    sites = {
        "w": Site(
            torch.tensor([0.1, 0.5, -1.0]),
            torch.tensor([2.4, 0.1, 1.9]),
            bmr.formulas.Diagonal(torch.tensor(0.0), torch.tensor(1.7)),
        )
    }
    for target in (
        bmr.Gaussian(0.3),
        bmr.Gaussian(),
        bmr.Gaussian(0),
        bmr.SpikeAndSlab(),
        bmr.Horseshoe(),
    ):
        result = bmr.reduce(bmr.Posterior(sites), to=target)
        assert result.table()["wider"].iloc[0] == 2
        assert (
            math.isfinite(result.delta_f)
            and result.posterior["w"].mean.isfinite().all()
            and result.posterior["w"].var.isfinite().all()
        )


def test_a_wholly_pruned_site():
    result = bmr.reduce(posterior(torch.zeros(4, 6, dtype=torch.bool)), to=bmr.Gaussian(0))
    assert result.kept == 0.0 and result.delta_f == 0.0


def test_what_reduce_refuses():
    plain = posterior()
    with pytest.raises(bmr.errors.ReductionError, match="per='row'"):
        bmr.reduce(plain, to=bmr.Gaussian(0), per="row")
    with pytest.raises(bmr.errors.ReductionError, match="kept: .* between 0 and 1, got 1.5"):
        bmr.reduce(plain, to=bmr.Gaussian(0), kept=1.5)
    with pytest.raises(
        bmr.errors.ReductionError, match="'v' matches no site; the sites are: w, noise"
    ):
        bmr.reduce(plain, to={"v": bmr.Gaussian(0)})
    with pytest.raises(bmr.errors.ReductionError, match="site 'noise': expected a Gaussian prior"):
        bmr.reduce(plain, to={"noise": bmr.Gaussian(0)})
    with pytest.raises(bmr.errors.ReductionError, match="site 'w'.*a pruned weight is zero"):
        bmr.reduce(plain, to=bmr.Gaussian(0, mean=1.0))
    with pytest.raises(bmr.errors.ReductionError, match="site 'w'.*hyper-parameters"):
        bmr.reduce(plain, to=bmr.Gaussian("layer"))
    with pytest.raises(bmr.errors.ReductionError, match=r"no site to reduce.*noise \(positive\)"):
        bmr.reduce(bmr.Posterior({"noise": plain["noise"]}), to=bmr.Gaussian(0))


def test_kappa_is_the_expected_sigmoid():
    """logit κ > 0 is κ > ½."""
    drop = bmr.reduce(posterior(), to=bmr.Horseshoe()).sites["w"].drop_log_odds
    assert torch.equal(torch.special.expit(drop) > 0.5, drop > 0)


def test_reductions_do_not_compound():
    """A reduced posterior carries the prior it was reduced to, so that a chain of reductions is the
    direct one.
    """
    first = bmr.reduce(posterior(), to=bmr.Gaussian(0.5))
    chained = bmr.reduce(first.posterior, to=bmr.Gaussian(1.1))
    direct = bmr.reduce(posterior(), to=bmr.Gaussian(1.1))
    assert first.delta_f + chained.delta_f == pytest.approx(direct.delta_f, abs=1e-9)
    torch.testing.assert_close(chained.posterior["w"].mean, direct.posterior["w"].mean)
    torch.testing.assert_close(chained.posterior["w"].var, direct.posterior["w"].var)
    with pytest.raises(bmr.errors.ReductionError, match="site 'w'|no site to reduce"):
        bmr.reduce(bmr.reduce(posterior(), to=bmr.Horseshoe()).posterior, to={"w": bmr.Gaussian(0)})


def test_a_pattern_takes_what_can_be_reduced():
    assert list(bmr.reduce(posterior(), to={"*": bmr.Gaussian(0)}).sites) == ["w"]


def test_ranking_needs_a_spike_delta_f():
    sites = {
        "w": Site(MEAN[0], VAR[0], None, bmr.SpikeAndSlab()),
        "w_inclusion": Site(torch.tensor(0.0), torch.tensor(0.1), support="unit_interval"),
    }
    with pytest.raises(bmr.errors.ReductionError, match="use threshold="):
        bmr.reduce(bmr.Posterior(sites), to=None, kept=0.5)
