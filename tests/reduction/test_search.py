"""Searches over correlated posteriors, against exact evidences of every subset, computed by
scipy.
"""

import itertools

import numpy as np
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.formulas.conditioning import initial_state
from pyro_bmr.formulas.gaussian import prune_subset
from pyro_bmr.formulas.low_rank import LowRank
from pyro_bmr.formulas.matrix_normal import MatrixNormal
from pyro_bmr.formulas.spike_and_slab import exact_inclusion
from pyro_bmr.posteriors.site import Site
from pyro_bmr.reduction import search_path
from pyro_bmr.reduction.visited_models import search_result
from tests.exact import linear_gaussian, random_spd

D = 5
SCALE = 1.3


def problem(seed=3, d=D):
    """Posterior, prior and {alive: exact ΔF against the full model}."""
    model = linear_gaussian(seed=seed, d=d)
    mean, cov = model.posterior(np.zeros(d), SCALE**2 * np.eye(d))
    full = model.log_evidence(np.zeros(d), SCALE**2 * np.eye(d))
    gains = {
        alive: model.log_evidence(np.zeros(d), SCALE**2 * np.diag(np.array(alive, float))) - full
        for alive in itertools.product((True, False), repeat=d)
    }
    return bmr.formulas.Dense(torch.tensor(mean), torch.tensor(cov)), bmr.Gaussian(SCALE), gains


def low_rank(seed=4, d=7, k=2):
    rng = np.random.default_rng(seed)
    factor, var = torch.tensor(rng.normal(size=(d, k))), torch.tensor(rng.uniform(0.05, 0.4, d))
    mean = torch.tensor(rng.normal(size=d) * 0.7)
    return (
        LowRank(mean, var, factor),
        bmr.formulas.Dense(mean, torch.diag(var) + factor @ factor.mT),
        bmr.formulas.Diagonal(mean * 0 + 0.2, mean * 0 + 2.3),
    )


def test_exhaustive_is_the_exact_evidence_of_every_subset():
    posterior, prior, exact = problem()
    search = bmr.reduction.exhaustive_search(posterior, prior)
    assert len(search.kept) == 2**D
    for alive, gain in zip(search.kept.tolist(), search.delta_f.tolist(), strict=True):
        assert gain == pytest.approx(exact[tuple(alive)], abs=1e-9)
    best = max(exact, key=exact.get)
    assert tuple(search.mask.tolist()) == best and 0 < sum(best) < D
    weights = np.exp(np.array(list(exact.values())))
    inclusion = (weights[:, None] * np.array(list(exact))).sum(0) / weights.sum()
    np.testing.assert_allclose(search.inclusion, inclusion, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_finds_the_best_subset_and_knows_the_evidence_of_all_it_visits(seed):
    posterior, prior, exact = problem(seed)
    search = bmr.reduction.greedy_search(posterior, prior)
    for alive, gain in zip(search.kept.tolist(), search.delta_f.tolist(), strict=True):
        assert gain == pytest.approx(exact[tuple(alive)], abs=1e-9)
    assert tuple(search.mask.tolist()) == max(exact, key=exact.get)
    assert len({tuple(row) for row in search.kept.tolist()}) == len(search.kept)


def test_two_copies_of_one_regressor_are_not_both_pruned():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 1)).repeat(2, 1) + 0.05 * rng.normal(size=(60, 2))
    precision = torch.tensor(x.T @ x / 0.5**2 + np.eye(2) / SCALE**2)
    cov = torch.linalg.inv(precision)
    posterior = bmr.formulas.Dense(cov @ torch.tensor(x.T @ (0.8 * x[:, 0]) / 0.5**2), cov)
    prior = bmr.Gaussian(SCALE)
    alone = bmr.delta_f(
        bmr.formulas.Diagonal(posterior.mean, cov.diagonal()), prior, bmr.Gaussian(0.0)
    )
    assert bool((alone > 0).all())  # each is superfluous given the other
    assert int(bmr.reduction.greedy_search(posterior, prior).mask.sum()) == 1


def test_pairs_change_places_where_no_single_step_helps():
    stuck = 0
    for seed in range(8):
        posterior, prior, exact = problem(seed, d=6)
        search = bmr.reduction.greedy_search(posterior, prior)
        best = max(exact.values())
        assert search.delta_f[0].item() == pytest.approx(best, abs=0.8)
        singles = [
            exact[tuple(bool(a) ^ (k == j) for k, a in enumerate(search.mask.tolist()))]
            for j in range(6)
        ]
        pairs = [
            exact[tuple(bool(a) ^ (k in pair) for k, a in enumerate(search.mask.tolist()))]
            for pair in itertools.combinations(range(6), 2)
        ]
        assert max(singles + pairs) <= search.delta_f[0].item() + 1e-9
        stuck += search.delta_f[0].item() < best - 1e-9
    assert stuck <= 1


def test_low_rank_is_dense():
    thin, dense, prior = low_rank(d=6)
    labels = torch.tensor([0, 0, 1, 2, 2, -1])
    for groups in (None, labels):
        for method in (bmr.reduction.exhaustive_search, bmr.reduction.greedy_search):
            a, b = method(thin, prior, groups), method(dense, prior, groups)
            assert torch.equal(a.kept, b.kept)
            torch.testing.assert_close(a.delta_f, b.delta_f)
    assert bool(bmr.reduction.exhaustive_search(thin, prior, labels).masks[0][5])


def test_groups_are_the_joint_density_ratio():
    _, dense, prior = low_rank()
    labels = torch.tensor([0, 0, 1, 2, 2, 2, -1])
    search = bmr.reduction.exhaustive_search(dense, prior, labels)
    for model, gain in enumerate(search.delta_f.tolist()):
        mask = search.masks_of(model)[0]
        assert gain == pytest.approx(
            0.0 if bool(mask.all()) else prune_subset(dense, prior, ~mask)[0].item(), abs=1e-9
        )


def test_rows_of_a_matrix_normal():
    rng = np.random.default_rng(2)
    rows, columns, mean = (
        torch.tensor(random_spd(rng, 4, 0.3)),
        torch.tensor(random_spd(rng, 2, 0.5)),
        torch.tensor(rng.normal(size=(4, 2)) * 0.6),
    )
    prior = bmr.formulas.Diagonal(torch.tensor(0.1).double(), torch.tensor(1.7).double())
    thin = bmr.reduction.exhaustive_search(MatrixNormal(mean, rows, columns), prior)
    dense = bmr.reduction.exhaustive_search(
        bmr.formulas.Dense(mean.flatten(), torch.kron(rows, columns)),
        prior,
        torch.arange(4).repeat_interleave(2),
    )
    assert torch.equal(thin.kept, dense.kept)
    torch.testing.assert_close(thin.delta_f, dense.delta_f)


def test_a_prior_with_correlations():
    rng = np.random.default_rng(6)
    model = linear_gaussian(d=4)
    eta, pi = rng.normal(size=4), random_spd(rng, 4, 1.8)
    posterior, prior = (
        bmr.formulas.Dense(*map(torch.tensor, pair))
        for pair in (model.posterior(eta, pi), (eta, pi))
    )
    search = bmr.reduction.exhaustive_search(posterior, prior)
    for model_, gain in enumerate(search.delta_f.tolist()):
        mask = search.masks_of(model_)[0]
        assert gain == pytest.approx(
            0.0 if bool(mask.all()) else prune_subset(posterior, prior, ~mask)[0].item(), abs=1e-9
        )


def test_a_state_forgets_what_is_let_go():
    thin, dense, prior = low_rank()
    index = torch.tensor([1, 4])
    for structure in (thin, dense):
        state = initial_state(structure, prior)
        back = (
            state.flipped(index, True)
            .flipped(torch.tensor([3]), True)
            .flipped(index, False)
            .flipped(torch.tensor([3]), False)
        )
        torch.testing.assert_close(back.log_ratios(), state.log_ratios())


@pytest.mark.parametrize("correlated_prior", [False, True])
def test_ratios_after_each_flip_are_those_of_the_flipped_states(correlated_prior):
    _, dense, prior = low_rank()
    if correlated_prior:
        prior = bmr.formulas.Dense(
            prior.mean, torch.tensor(random_spd(np.random.default_rng(1), 7, 1.4))
        )
    state = initial_state(dense, prior).flipped(torch.tensor([1, 4]), True)
    index = torch.tensor([4, 0, 6, 1, 2])
    after = state.log_ratios_after_each(index)
    for row, k in zip(after, index, strict=True):
        flipped = state.flipped(k[None], not bool(state.held[k]))
        torch.testing.assert_close(row, flipped.log_ratios()[index], rtol=1e-12, atol=1e-12)


def gains_by_model(search):
    return dict(zip(map(tuple, search.kept.tolist()), search.delta_f.tolist(), strict=True))


@pytest.mark.slow
def test_letting_go_by_rank_one_finds_what_a_fresh_start_finds(monkeypatch):
    differences = []
    for seed in range(12):
        posterior, prior, _ = problem(seed, d=7)
        quick = gains_by_model(bmr.reduction.greedy_search(posterior, prior))
        with monkeypatch.context() as patch:
            patch.setattr(search_path, "_LOSS", -1.0)
            fresh = gains_by_model(bmr.reduction.greedy_search(posterior, prior))
        assert quick.keys() == fresh.keys()
        differences += [abs(quick[alive] - fresh[alive]) for alive in quick]
    assert 0 < max(differences) < 1e-11


def test_nothing_is_let_go_where_that_costs_digits():
    """Two copies but for 1e-9: given one, little is left of the other's variance."""
    near = 1 - 1e-9
    cov = torch.tensor([[1, near, 0.3], [near, 1, 0.3], [0.3, 0.3, 1]], dtype=torch.float64)
    mean = torch.tensor([0.4, 0.4 + 1e-5, -0.2], dtype=torch.float64)
    state = initial_state(bmr.formulas.Dense(mean, cov), bmr.Gaussian(1.5))
    one = state.flipped(torch.tensor([1]), True)
    assert state.inflation() == 1.0 and one.inflation() == pytest.approx(1.0)
    both = one.flipped(torch.tensor([0]), True)
    assert both.inflation() == pytest.approx(1 / (1 - near**2), rel=1e-6)
    path = search_path.SearchPath([state], [[(0, torch.tensor([k]))] for k in range(3)], 0.0)
    for g in (0, 1, 0):
        path.drop_gains()
        assert path.move(torch.tensor([g]))
    torch.testing.assert_close(path.drop_gains(), one.log_ratios(), rtol=1e-13, atol=1e-13)


def test_more_groups_than_bits_and_as_many_are_told_apart():
    """Models count once; the first group is the sign of the integer that stands for 64 of them."""
    rng = np.random.default_rng(0)
    for count in (63, 64, 65):
        table = torch.tensor(rng.random((20, count)) < 0.5)
        table[1], table[2] = table[0], table[0].clone()
        table[2, 0] = ~table[2, 0]
        totals = torch.tensor(rng.normal(size=20))
        totals[1] = totals[0]
        found = search_result(table, totals, 0.0, ((), ()), [])
        assert len(found.kept) == 19
        seen = {tuple(row): gain for row, gain in zip(table.tolist(), totals.tolist(), strict=True)}
        order = sorted(seen, key=seen.get, reverse=True)
        assert [tuple(row) for row in found.kept.tolist()] == order
        assert found.delta_f.tolist() == [seen[row] for row in order]


def test_averages_over_models():
    posterior, prior, exact = problem()
    search = bmr.reduction.exhaustive_search(posterior, prior)
    model = linear_gaussian(d=D)
    weights = np.exp(np.array(list(exact.values())))
    mean, second = np.zeros(D), np.zeros(D)
    for weight, alive in zip(weights / weights.sum(), exact, strict=True):
        m, cov = model.posterior(np.zeros(D), SCALE**2 * np.diag(np.array(alive, float)))
        mean, second = mean + weight * m, second + weight * (np.diag(cov) + m**2)
    (average,) = search.average(window=1e3)
    np.testing.assert_allclose(average.mean, mean, atol=1e-9)
    np.testing.assert_allclose(average.var, second - mean**2, atol=1e-9)
    (narrow,) = search.average(window=0.0)
    torch.testing.assert_close(narrow.mean, search.reduced()[0].mean)


def test_threshold_and_target():
    posterior, prior, exact = problem()
    search = bmr.reduction.exhaustive_search(posterior, prior, threshold=4.0)
    score = {alive: gain - 4.0 * alive.count(False) for alive, gain in exact.items()}
    assert tuple(search.mask.tolist()) == max(score, key=score.get) != max(exact, key=exact.get)
    assert torch.equal(
        bmr.reduction.greedy_search(posterior, prior, threshold=4.0).mask, search.mask
    )
    two = bmr.reduction.exhaustive_search(posterior, prior, kept=0.4)
    assert tuple(two.mask.tolist()) == max((a for a in exact if sum(a) <= 2), key=exact.get)
    greedy = bmr.reduction.greedy_search(posterior, prior, kept=0.4)
    assert int(greedy.mask.sum()) == 2 and greedy.delta_f[0].item() == pytest.approx(
        exact[tuple(greedy.mask.tolist())], abs=1e-9
    )


@pytest.mark.slow
def test_a_batch_never_lowers_the_evidence():
    thin, _, prior = low_rank(d=60, k=4)
    one, many = (bmr.reduction.greedy_search(thin, prior, batch=batch) for batch in (1, 25))
    assert one.delta_f[0] > 0 and many.delta_f[0] > 0
    again = bmr.reduction.greedy_search(thin, prior, batch=25).mask
    assert torch.equal(again, many.mask)
    gain = prune_subset(thin, prior, ~many.mask)[0]
    assert many.delta_f[0].item() == pytest.approx(gain.item(), abs=1e-8)
    assert abs(float(one.delta_f[0] - many.delta_f[0])) < 0.1 * float(one.delta_f[0])


def sites(structure, prior, shape):
    var = (
        structure.cov.diagonal()
        if hasattr(structure, "cov")
        else structure.var + structure.factor.square().sum(1)
    )
    return Site(
        structure.mean.view(shape),
        var.view(shape),
        bmr.formulas.Diagonal(
            *(
                torch.as_tensor(part, dtype=torch.float64).flatten()[0]
                for part in (prior.mean, prior.var)
            )
        ),
        joint=structure,
    )


def test_reduce_searches_where_a_site_has_correlations():
    posterior, prior, exact = problem()
    best = max(exact, key=exact.get)
    post = bmr.Posterior({"w": sites(posterior, prior, (D,))})
    result = bmr.reduce(post, to=bmr.Gaussian(0), search=bmr.reduction.exhaustive_search)
    assert (
        tuple(result.masks["w"].tolist())
        == best
        == tuple(bmr.reduce(post, to=bmr.Gaussian(0)).masks["w"].tolist())
    )
    assert result.delta_f == pytest.approx(exact[best], abs=1e-9)
    alive = np.array(best)
    # the refit
    mean, cov = linear_gaussian(d=D).posterior(np.zeros(D), SCALE**2 * np.diag(alive.astype(float)))
    np.testing.assert_allclose(result.posterior["w"].mean, mean, atol=1e-9)
    np.testing.assert_allclose(result.posterior["w"].var, np.diag(cov), atol=1e-9)
    np.testing.assert_allclose(result.posterior["w"].joint.cov, cov, atol=1e-9)
    # goes on from the conditional
    again = bmr.reduce(result.posterior, to=bmr.Gaussian(0), kept=0.2)
    assert int(again.masks["w"].sum()) == 1
    assert result.delta_f + again.delta_f == pytest.approx(
        exact[tuple(again.masks["w"].tolist())], abs=1e-9
    )
    single = bmr.reduce(post, to=bmr.Gaussian(0), search=None)
    assert single.delta_f == pytest.approx(exact[tuple(single.masks["w"].tolist())], abs=1e-9)


def test_a_unit_with_correlations_is_searched_over_sites():
    thin, _, prior = low_rank(d=6)
    bias = Site(
        torch.tensor([0.9, -0.1]).double(),
        torch.tensor([0.05, 0.2]).double(),
        bmr.formulas.Diagonal(torch.tensor(0.0).double(), torch.tensor(1.4).double()),
    )
    post = bmr.Posterior({"fc.weight": sites(thin, prior, (2, 3)), "fc.bias": bias})
    gains = {}
    for alive in itertools.product((True, False), repeat=2):
        mask = torch.tensor(alive)
        joint = (
            0.0 if all(alive) else prune_subset(thin, prior, ~mask.repeat_interleave(3))[0].item()
        )
        gains[alive] = joint + float(bmr.delta_f(bias, bias.prior, bmr.Gaussian(0))[~mask].sum())
    result = bmr.reduce(post, to=bmr.Gaussian(0), per="unit", threshold=-30.0)
    score = {alive: gain + 30.0 * alive.count(False) for alive, gain in gains.items()}
    assert tuple(result.masks["fc.bias"].tolist()) == max(score, key=score.get)
    assert result.delta_f == pytest.approx(gains[tuple(result.masks["fc.bias"].tolist())], abs=1e-9)
    # a unit's ratio is joint, those of two units are not
    with pytest.warns(bmr.PyroBMRWarning, match="2 terms taken as independent"):
        slab = bmr.reduce(post, to=bmr.SpikeAndSlab(), per="unit")
    exact = exact_inclusion(
        torch.tensor([gains[False, True], gains[True, False]], dtype=torch.float64)
    )
    assert slab.sites["fc.weight"].delta_f == pytest.approx(
        exact.log_evidence_gain.item(), abs=1e-9
    )


@pytest.mark.parametrize("per", ["unit", "input"])
def test_rows_and_columns_of_a_matrix_normal_site(per):
    rng = np.random.default_rng(2)
    rows, columns, mean = (
        torch.tensor(random_spd(rng, 4, 0.3)),
        torch.tensor(random_spd(rng, 3, 0.5)),
        torch.tensor(rng.normal(size=(4, 3)) * 0.6),
    )
    prior = bmr.formulas.Diagonal(torch.tensor(0.0).double(), torch.tensor(1.7).double())
    dense = bmr.formulas.Dense(mean.flatten(), torch.kron(rows, columns))
    site = Site(
        mean, dense.cov.diagonal().view(4, 3), prior, joint=MatrixNormal(mean, rows, columns)
    )
    result = bmr.reduce(bmr.Posterior({"w": site}), to=bmr.Gaussian(0), per=per, kept=0.6)
    went = ~result.masks["w"].flatten()
    gain, rest = prune_subset(dense, prior, went)
    reduced = result.posterior["w"]
    assert result.delta_f == pytest.approx(gain.item(), abs=1e-9) and 0 < int(went.sum()) < 12
    torch.testing.assert_close(reduced.mean.flatten()[~went], rest.mean)
    torch.testing.assert_close(
        torch.kron(reduced.joint.row_cov, reduced.joint.col_cov)[~went][:, ~went], rest.cov
    )
    assert not reduced.var.flatten()[went].any() and not reduced.joint.mean.flatten()[went].any()


def test_another_gaussian_prior_for_a_correlated_site():
    thin, dense, prior = low_rank(d=6)
    flat = bmr.formulas.Dense(torch.zeros(6).double() + 0.2, 2.3 * torch.eye(6).double())
    narrow = bmr.formulas.Dense(torch.zeros(6).double(), 0.6**2 * torch.eye(6).double())
    exact = bmr.formulas.reduced_posterior(dense, flat, narrow)
    for structure in (thin, dense):
        result = bmr.reduce(
            bmr.Posterior({"w": sites(structure, prior, (2, 3))}), to=bmr.Gaussian(0.6)
        )
        assert result.delta_f == pytest.approx(bmr.delta_f(dense, flat, narrow).item(), abs=1e-9)
        torch.testing.assert_close(result.posterior["w"].mean.flatten(), exact.mean)
        torch.testing.assert_close(result.posterior["w"].var.flatten(), exact.cov.diagonal())


def test_what_searches_refuse():
    posterior, prior, _ = problem()
    with pytest.raises(bmr.errors.ReductionError, match="one integer for each of the 5 entries"):
        bmr.reduction.greedy_search(posterior, prior, torch.zeros(4).long())
    with pytest.raises(bmr.errors.ReductionError, match="nothing to search"):
        bmr.reduction.greedy_search(posterior, prior, -torch.ones(5).long())
    with pytest.raises(bmr.errors.ReductionError, match="16 groups make 2\\^16 models"):
        bmr.reduction.exhaustive_search(bmr.formulas.Dense(torch.zeros(16), torch.eye(16)), prior)
    with pytest.raises(bmr.errors.ReductionError, match="posterior is not positive definite"):
        bmr.reduction.greedy_search(bmr.formulas.Dense(torch.zeros(2), torch.ones(2, 2)), prior)
    with pytest.raises(
        bmr.errors.ReductionError,
        match="posterior: expected finite moments and variance > 0, got 2 of 2",
    ):
        bmr.reduction.greedy_search(
            LowRank(torch.zeros(2), torch.zeros(2), torch.ones(2, 1)), prior
        )
    with pytest.raises(bmr.errors.ReductionError, match="a group, which are always kept"):
        bmr.reduction.exhaustive_search(
            posterior, prior, torch.tensor([0, -1, -1, -1, -1]), kept=0.4
        )
    with pytest.raises(bmr.errors.ReductionError, match="take masks"):
        _ = bmr.reduction.greedy_search([posterior, posterior], [prior, prior]).mask
