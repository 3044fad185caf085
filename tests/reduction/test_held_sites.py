"""Single entries of layers with Kronecker posteriors, from `reduce` to files and predictions."""

import numpy as np
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.formulas import Dense, Diagonal, HeldMatrixNormal, MatrixNormal, prune_subset
from pyro_bmr.posteriors.site import Site
from pyro_bmr.reduction.correlations import pruned_site
from pyro_bmr.reduction.reduce import quiet_reduction
from tests.exact import random_spd

SPIKE = bmr.Gaussian(scale=0.0)


def posterior(seed=3, rows=10_000):
    """Two layers with Kronecker factors, the second of a convolution, and a diagonal bias."""
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (6, 8), "b.weight": (4, 2, 3), "a.bias": (6,)}
    mean = {k: torch.tensor(rng.normal(size=s)) for k, s in shapes.items()}
    curvature = {
        "a.weight": tuple(torch.tensor(random_spd(rng, d, 4.0)) for d in (6, 8)),
        "b.weight": tuple(torch.tensor(random_spd(rng, d, 4.0)) for d in (4, 6)),
        "a.bias": torch.tensor(rng.uniform(1, 9, 6)),
    }
    return bmr.Posterior.from_curvature(
        mean, curvature, bmr.Gaussian(0.9, mean=0.1), rows=rows, penalised=False
    )


def exact(site, mask):
    """ΔF and the rest of a site by its dense covariance."""
    q = Dense(site.mean.flatten(), torch.kron(site.joint.row_cov, site.joint.col_cov))
    prior = Diagonal(
        *(t.expand(site.mean.shape).flatten() for t in (site.prior.mean, site.prior.var))
    )
    gain, rest = prune_subset(q, prior, ~mask.flatten())
    return float(gain), rest


LABELS = {"a.weight": torch.arange(48).view(6, 8) % 7, "b.weight": torch.arange(24).view(4, 2, 3)}


@pytest.mark.parametrize(
    "how",
    [
        {"kept": 0.5},
        {"kept": {"*.weight": 0.3}},
        {"kept": 0.0},
        {"threshold": 0.5},
        {"per": bmr.reduction.NofM(1, 2)},
        {"per": bmr.reduction.Block(2, 3), "kept": 0.5},
        {"per": LABELS, "kept": 0.6},
        {"per": "unit", "kept": 0.7},
        {"per": "input", "kept": 0.6},
    ],
    ids=str,
)
def test_the_rest_of_each_layer_is_that_of_the_dense_covariance(how):
    before = posterior()
    reduction = bmr.reduce(before, to=SPIKE, **how)
    assert 0 < reduction.kept < 1 or how == {"kept": 0.0}
    for name in ("a.weight", "b.weight"):
        site, result = before[name], reduction.sites[name]
        after, mask = result.site, result.site.kept
        gain, rest = exact(site, mask)
        assert result.delta_f == pytest.approx(gain, abs=1e-9)
        # so few entries are exact
        assert result.upper is None and (result.terms <= 1)
        torch.testing.assert_close(after.mean[mask], rest.mean, atol=1e-10, rtol=0)
        torch.testing.assert_close(after.var[mask], rest.cov.diagonal(), atol=1e-10, rtol=0)
        assert not after.mean[~mask].any() and not after.var[~mask].any()
    bias = reduction.sites["a.bias"].site
    assert torch.equal(bias.mean, before["a.bias"].mean.where(bias.kept, 0)) and bias.joint is None


def test_heads_of_attention():
    """Heads are rows of the projections and columns of the output: with one head gone all of its
    sites move to what the dense form says.
    """
    rng = np.random.default_rng(1)
    shapes = {"m.in_proj_weight": (12, 4), "m.out_proj.weight": (4, 4)}
    before = bmr.Posterior.from_curvature(
        {k: torch.tensor(rng.normal(size=s)) for k, s in shapes.items()},
        {k: tuple(torch.tensor(random_spd(rng, d, 4.0)) for d in s) for k, s in shapes.items()},
        bmr.Gaussian(0.9),
        rows=1000,
    )
    reduction = bmr.reduce(before, to=SPIKE, per="head", heads=2, kept=0.5)
    for name, result in reduction.sites.items():
        gain, rest = exact(before[name], result.site.kept)
        assert result.site.kept.double().mean() == 0.5
        assert result.delta_f == pytest.approx(gain, abs=1e-9)
        torch.testing.assert_close(result.site.mean[result.site.kept], rest.mean)


@pytest.mark.parametrize("second", [{"kept": 0.3}, {"per": "unit", "kept": {"*.weight": 0.3}}])
def test_nested_reductions_are_one(second):
    before = posterior()
    first = bmr.reduce(before, to=SPIKE, kept=0.6)
    both = first.then(bmr.reduce(first.posterior, to=SPIKE, **second))
    for name in ("a.weight", "b.weight"):
        result = both.sites[name]
        gain, rest = exact(before[name], result.site.kept)
        assert result.delta_f == pytest.approx(gain, abs=1e-9)
        torch.testing.assert_close(result.site.mean[result.site.kept], rest.mean)
    # undone: the posterior before is as it was
    assert both.before is before and torch.equal(
        both.before["a.weight"].mean, posterior()["a.weight"].mean
    )


def test_a_part_of_a_reduction_and_two_parts_together():
    before = posterior()
    whole = bmr.reduce(before, to=SPIKE, kept=0.5)
    a, b = whole.only("a.*"), whole.only("b.*")
    assert a.posterior["b.weight"] is before["b.weight"]
    together = a.then(b)
    assert together.delta_f == pytest.approx(whole.delta_f, rel=1e-12)
    for name in whole.sites:
        assert together.sites[name].site is whole.sites[name].site


def large(seed=5, dtype=torch.float64):
    """A layer with more entries held and left than are exact, under a prior of one variance."""
    rng = np.random.default_rng(seed)
    return bmr.Posterior.from_curvature(
        {"w": torch.tensor(rng.normal(size=(48, 60)), dtype=dtype)},
        {"w": tuple(torch.tensor(random_spd(rng, d, 4.0)) for d in (48, 60))},
        bmr.Gaussian(0.9),
        rows=10_000,
    )


@pytest.mark.slow  # test_held_entries.py has smaller layers
def test_the_bounds_of_a_larger_layer_hold_its_dense_evidence():
    before = large()
    first = bmr.reduce(before, to=SPIKE, kept=0.6)
    second = bmr.reduce(first.posterior, to=SPIKE, kept=0.45)
    both = first.then(second)
    gains = [exact(before["w"], r.masks["w"])[0] for r in (first, second)]
    truth = [gains[0], gains[1] - gains[0], gains[1]]
    for reduction, true in zip((first, second, both), truth, strict=True):
        result = reduction.sites["w"]
        assert result.delta_f < true < result.upper
        table = reduction.table()
        assert table["delta_f"].item() == result.delta_f and table["upper"].item() == result.upper
        assert list(table.columns)[3:5] == ["delta_f", "upper"]
        assert reduction.delta_f == result.delta_f
    # both at once is known as well as in one reduction
    one = bmr.reduce(before, to=SPIKE, kept=0.45)
    direct = bmr.formulas.held_delta_f(
        before["w"].joint.row_cov,
        before["w"].joint.col_cov,
        ~both.masks["w"],
        both.sites["w"].site.joint.energy,
        before["w"].prior,
    )
    assert both.sites["w"].delta_f == pytest.approx(direct.lower, rel=1e-12)
    assert both.sites["w"].upper == pytest.approx(direct.upper, rel=1e-12)
    assert one.sites["w"].upper - one.delta_f == pytest.approx(
        direct.upper - direct.lower, rel=0.05
    )
    rest = exact(before["w"], both.masks["w"])[1]
    torch.testing.assert_close(
        both.posterior["w"].mean[both.masks["w"]], rest.mean, atol=1e-9, rtol=0
    )


def test_float32_has_its_tolerance():
    double, single = (
        bmr.reduce(large(dtype=t), to=SPIKE, kept=0.5) for t in (torch.float64, torch.float32)
    )
    assert torch.equal(double.masks["w"], single.masks["w"])
    a, b = (r.posterior["w"].mean.double() for r in (double, single))
    moved = (a - large()["w"].mean).where(double.masks["w"], 0)
    assert float((a - b).norm()) < 2e-3 * float(moved.norm())
    assert single.delta_f == pytest.approx(double.delta_f, rel=1e-5)
    assert b.dtype == torch.float64 and single.posterior["w"].mean.dtype == torch.float32


@pytest.mark.parametrize("make", [posterior, large])
def test_files(tmp_path, make):
    before = make()
    first = bmr.reduce(before, to=SPIKE, kept=0.5)
    first.posterior.save(tmp_path / "p.safetensors")
    loaded = bmr.Posterior.load(tmp_path / "p.safetensors")
    name = next(iter(before))
    assert isinstance(loaded[name].joint, HeldMatrixNormal)
    for part, value in vars(first.posterior[name].joint).items():
        assert torch.equal(getattr(loaded[name].joint, part), value)
    draws = [p.draw(torch.Generator().manual_seed(1))[name] for p in (first.posterior, loaded)]
    assert torch.equal(*draws) and not draws[0][~first.masks[name]].any()
    # reduced further, they are the same
    again = [bmr.reduce(p, to=SPIKE, kept=0.4) for p in (first.posterior, loaded)]
    assert again[0].delta_f == pytest.approx(again[1].delta_f, rel=1e-12)
    torch.testing.assert_close(
        again[0].posterior[name].mean, again[1].posterior[name].mean, rtol=1e-12, atol=1e-12
    )
    first.save(tmp_path / "r")
    back = bmr.Reduction.load(tmp_path / "r")
    assert back.table().equals(first.table()) and back.warnings == first.warnings
    assert back.sites[name].upper == first.sites[name].upper
    both = [a.then(b).delta_f for a, b in ((back, again[1]), (first, again[0]))]
    assert both[0] == pytest.approx(both[1], rel=1e-12)


def test_a_damaged_file_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    first = bmr.reduce(posterior(), to=SPIKE, kept=0.5)
    first.posterior.save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["a.weight/joint_held"] = tensors["a.weight/joint_held"][:, :3].clone()
    save_file(tensors, tmp_path / "p.safetensors", metadata=metadata)
    with pytest.raises(bmr.errors.ModelError, match="a damaged posterior"):
        bmr.Posterior.load(tmp_path / "p.safetensors")


@pytest.mark.slow
def test_draws_of_a_posterior_have_the_conditional_covariance():
    before = posterior()
    after = bmr.reduce(before, to=SPIKE, kept=0.5)
    generator, count = torch.Generator().manual_seed(0), 4000
    draws = torch.stack([after.posterior.draw(generator)["b.weight"] for _ in range(count)])
    mask = after.masks["b.weight"]
    assert draws.shape[1:] == (4, 2, 3) and not draws[:, ~mask].any()
    rest = exact(before["b.weight"], mask)[1]
    scale = rest.cov.diagonal().sqrt()
    found = draws[:, mask].mT.cov() / scale / scale[:, None]
    target = rest.cov / scale / scale[:, None]
    assert float((found - target).abs().max()) < 4.8 * (2 / count) ** 0.5
    assert (
        float((target - target.diagonal().diag()).abs().max()) > 0.15
    )  # there is something to see
    wide = after.posterior.widened(4.0)
    again = torch.stack([wide.draw(generator)["b.weight"] for _ in range(count)])[:, mask]
    assert again.std(0).mean() == pytest.approx(2 * float(scale.mean()), rel=0.05)


def test_predictions_of_a_pruned_network():
    """A regression layer: the predictive mean is the mean of the rest, and its variance that of
    the dense form.
    """
    rng = np.random.default_rng(2)
    net = torch.nn.Linear(5, 3, bias=False).double()
    program = bmr.BayesianNetwork(net, bmr.Gaussian(0.9), bmr.Normal(noise=0.1))
    before = bmr.Posterior.from_curvature(
        {"weight": torch.tensor(rng.normal(size=(3, 5)))},
        {"weight": tuple(torch.tensor(random_spd(rng, d, 4.0)) for d in (3, 5))},
        bmr.Gaussian(0.9),
        rows=1000,
    )
    after = bmr.reduce(before, to=SPIKE, kept=0.6)
    x = torch.tensor(rng.normal(size=(4, 5)))
    prediction = bmr.predict(program, after.posterior, x, draws=4000, seed=1)
    mask, flat = after.masks["weight"], after.masks["weight"].flatten()
    rest = exact(before["weight"], mask)[1]
    mean = torch.zeros(15).double().masked_scatter(flat, rest.mean).view(3, 5)
    cov = torch.zeros(15, 15).double()
    cov[flat.nonzero(), flat.nonzero()[:, 0]] = rest.cov
    inputs = torch.stack([torch.kron(torch.eye(3).double(), row) for row in x])  # (4, 3, 15)
    var = torch.einsum("bki,ij,bkj->bk", inputs, cov, inputs)
    error = (prediction.mean - x @ mean.mT).abs()
    assert bool((error < 4.5 * (var / 4000).sqrt()).all())
    epistemic = prediction.variance - 0.1**2
    assert bool(((epistemic - var).abs() < 5 * (2 / 4000) ** 0.5 * var).all())


def test_other_decisions_condition_too():
    """A spike and slab, and priors that are not Gaussian: the rest moves, ΔF is theirs."""
    before = posterior()
    reduction = quiet_reduction(before, to=bmr.SpikeAndSlab(), kept=0.5)
    for name in ("a.weight", "b.weight"):
        result = reduction.sites[name]
        rest = exact(before[name], result.site.kept)[1]
        torch.testing.assert_close(result.site.mean[result.site.kept], rest.mean)
        assert result.upper is None
    site = before["a.weight"]
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    after, gain = pruned_site(Site(site.mean, site.var, None, joint=site.joint), mask)
    assert gain is None
    torch.testing.assert_close(after.mean[mask], exact(site, mask)[1].mean)


def test_units_and_then_entries_and_then_units():
    """Rows that are gone have no variance, and nothing of them is held again."""
    before = posterior()
    first = bmr.reduce(before, to={"a.weight": SPIKE}, per="unit", kept=0.7)
    assert isinstance(first.posterior["a.weight"].joint, MatrixNormal)
    second = bmr.reduce(first.posterior, to={"a.weight": SPIKE}, kept=0.4)
    third = bmr.reduce(second.posterior, to={"a.weight": SPIKE}, per="input", kept=0.2)
    both = first.then(second).then(third)
    gain, rest = exact(before["a.weight"], both.masks["a.weight"])
    assert both.delta_f == pytest.approx(gain, abs=1e-9)
    kept = both.masks["a.weight"]
    torch.testing.assert_close(both.posterior["a.weight"].mean[kept], rest.mean)
    torch.testing.assert_close(both.posterior["a.weight"].var[kept], rest.cov.diagonal())
    drawn = both.posterior.draw(torch.Generator().manual_seed(0))["a.weight"]
    assert not drawn[~kept].any() and bool((drawn[kept] != 0).all())


def test_the_curve_ends_where_the_reduction_does():
    before = posterior()
    reduction = bmr.reduce(before, to={"*.weight": SPIKE}, kept=0.5)
    curve = reduction.curve(points=73)
    at = curve[curve["pruned"] == 36]
    assert at["delta_f"].item() == pytest.approx(reduction.delta_f, rel=1e-9)
    everything = sum(
        exact(before[k], torch.zeros(before[k].mean.shape).bool())[0]
        for k in ("a.weight", "b.weight")
    )
    assert curve["delta_f"].iloc[-1] == pytest.approx(everything, rel=1e-9)


def test_a_prior_of_another_width_leaves_marginals_and_says_so():
    first = bmr.reduce(posterior(), to=SPIKE, kept=0.5)
    second = quiet_reduction(first.posterior, to={"a.weight": bmr.Gaussian(0.5)})
    assert second.posterior["a.weight"].joint is None
    assert any(
        words.startswith("site 'a.weight': under another prior than that of the fit")
        for words in second.warnings
    )


def test_weights_that_can_replace_each_other_are_told():
    """Two almost equal inputs: either can go, as each says by itself, but not both."""
    inputs = torch.tensor([[5.0, 4.99, 0.1], [4.99, 5.0, 0.05], [0.1, 0.05, 3.0]]).double()
    outputs = torch.tensor([[20.0, 3.0], [3.0, 10.0]]).double()
    mean = torch.tensor([[0.3, 0.29, 1.5], [0.02, 0.01, -1.4]]).double()
    before = bmr.Posterior.from_curvature(
        {"w": mean}, {"w": (outputs, inputs)}, bmr.Gaussian(1.0), rows=1000
    )
    with pytest.warns(bmr.PyroBMRWarning, match="they can replace each other") as told:
        reduction = bmr.reduce(before, to=SPIKE)
    mask, result = reduction.masks["w"], reduction.sites["w"]
    assert mask.tolist() == [[False, False, True]] * 2
    gain, _ = exact(before["w"], mask)
    assert gain < 0 and reduction.delta_f == pytest.approx(gain, abs=1e-9)
    alone = result.spike_delta_f[~mask]
    assert bool((alone > 0).all())
    words = f"ΔF is {float(alone.sum()):+.4g} nats as a sum over the 4 weights"
    assert words in str(told[0].message)
    assert f"no more than {gain:+.4g} together" in str(told[0].message)
    # where only weights go that do not replace each other, nothing is said
    better = mean.clone()
    better[0, :2] = 0.4
    fewer = bmr.reduce(
        bmr.Posterior.from_curvature(
            {"w": better}, {"w": (outputs, inputs)}, bmr.Gaussian(1.0), rows=1000
        ),
        to=SPIKE,
    )
    assert fewer.masks["w"].tolist() == [[True, True, True], [False, False, True]]
    assert fewer.delta_f > 0
    # nor to a size of the user's own
    assert quiet_reduction(before, SPIKE, kept=1 / 6).warnings == ()


@pytest.mark.parametrize("structure", ["dense", "low rank"])
@pytest.mark.parametrize("how", [{"kept": {"w": 0.4}}, {"per": bmr.reduction.NofM(1, 2)}], ids=str)
def test_the_rest_of_dense_and_low_rank_sites_moves_too(structure, how):
    rng = np.random.default_rng(7)
    mean = torch.tensor(rng.normal(size=(3, 4)))
    factor, var = torch.tensor(rng.normal(size=(12, 2))), torch.tensor(rng.uniform(0.1, 0.5, 12))
    cov = var.diag() + factor @ factor.mT
    joint = (
        Dense(mean.flatten(), cov)
        if structure == "dense"
        else bmr.formulas.LowRank(mean.flatten(), var, factor)
    )
    prior = Diagonal(torch.tensor(0.1).double(), torch.tensor(2.0).double())
    site = Site(mean, cov.diagonal().view(3, 4), prior, joint=joint)
    result = bmr.reduce(bmr.Posterior({"w": site}, rows=1000), to=SPIKE, **how).sites["w"]
    mask = result.site.kept
    flat = Diagonal(prior.mean.expand(12), prior.var.expand(12))
    gain, rest = prune_subset(Dense(mean.flatten(), cov), flat, ~mask.flatten())
    assert 0 < mask.double().mean() < 1 and result.delta_f == pytest.approx(float(gain), abs=1e-9)
    torch.testing.assert_close(result.site.mean[mask], rest.mean, atol=1e-10, rtol=0)
    torch.testing.assert_close(result.site.var[mask], rest.cov.diagonal(), atol=1e-10, rtol=0)
    after = result.site.joint
    full = after.cov if structure == "dense" else after.var.diag() + after.factor @ after.factor.mT
    torch.testing.assert_close(full[mask.flatten()][:, mask.flatten()], rest.cov)
