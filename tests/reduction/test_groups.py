"""Groups: which entries go together, their evidence, and the decision on them."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import special, stats

import pyro_bmr as bmr
from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.mean_field_inclusion import mean_field_log_odds
from pyro_bmr.formulas.spike_and_slab import exact_inclusion
from pyro_bmr.posteriors.site import Site
from pyro_bmr.reduction.groups import Block, NofM, group_labels
from pyro_bmr.reduction.slabs import spike_odds

SHAPES = {
    "conv.weight": (3, 2, 2, 2),
    "conv.bias": (3,),
    "fc.weight": (2, 6),
    "fc.bias": (2,),
    "gain": (4,),
}
RNG = np.random.default_rng(22)
PRIOR = bmr.formulas.Diagonal(
    torch.tensor(0.2, dtype=torch.float64), torch.tensor(1.9, dtype=torch.float64)
)


def posterior(shapes=None, mask=None, rng=RNG):
    sites = {}
    for name, shape in (shapes or SHAPES).items():
        mean = np.where(
            rng.random(shape) < 0.5, rng.normal(0.2, 0.9, shape), rng.normal(0, 0.1, shape)
        )
        alive = None if mask is None else torch.tensor(rng.random(shape) < mask)
        sites[name] = Site(
            torch.tensor(mean), torch.tensor(rng.uniform(0.01, 0.2, shape)), PRIOR, mask=alive
        )
    return bmr.Posterior(sites)


def spike(post, name):
    """log q(0) − log p(0), by torch's own densities."""
    site, zero = post[name], torch.zeros((), dtype=torch.float64)
    gain = torch.distributions.Normal(site.mean, site.var.sqrt()).log_prob(
        zero
    ) - torch.distributions.Normal(PRIOR.mean, PRIOR.var.sqrt()).log_prob(zero)
    return gain.masked_fill(~site.kept, 0)


def partition(labels):
    """The groups as a set of sets of (site, flat index); −1 left out."""
    groups = {}
    for name, label in labels.items():
        for k, number in enumerate(label.flatten().tolist()):
            groups.setdefault(number, set()).add((name, k))
    groups.pop(-1, None)
    return {frozenset(group) for group in groups.values()}


def test_a_unit_is_a_row_and_its_bias():
    labels = group_labels(SHAPES, "unit")
    expected = {
        frozenset({("conv.weight", 8 * i + k) for k in range(8)} | {("conv.bias", i)})
        for i in range(3)
    }
    expected |= {
        frozenset({("fc.weight", 6 * i + k) for k in range(6)} | {("fc.bias", i)}) for i in range(2)
    }
    assert partition(labels) == expected | {frozenset({("gain", k)}) for k in range(4)}
    assert partition(group_labels(SHAPES, "channel")) == partition(labels)
    assert all(tuple(label.shape) == SHAPES[name] for name, label in labels.items())


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("two_ways", [False, True])
def test_a_unit_of_a_projected_lstm_has_the_rows_of_all_its_gates(two_ways):
    """Without them its state is 0, and what the projection makes of it does not matter."""
    torch.manual_seed(1)
    cell = torch.nn.LSTM(3, 5, proj_size=2, batch_first=True, bidirectional=two_ways)
    parameters = dict(cell.named_parameters())
    labels = group_labels({name: tuple(p.shape) for name, p in parameters.items()}, "unit")
    x = torch.randn(4, 6, 3)
    for end in ["l0", "l0_reverse"][: 1 + two_ways]:
        own = [f"{kind}_{end}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        units = labels[own[0]].unique()
        assert len(units) == 5 and all(torch.equal(labels[name].unique(), units) for name in own)
        assert len(labels[f"weight_hr_{end}"].unique()) == 2
    own = [n for n in parameters if n.endswith("l0") and "hr" not in n]
    unit = labels["weight_ih_l0"][7, 0]  # row 7 is gate 1 of unit 2
    with torch.no_grad():
        for name in own:
            parameters[name][labels[name] == unit] = 0
        before = cell(x)[0]
        parameters["weight_hr_l0"][:, 2] += 3
        assert torch.equal(cell(x)[0], before)
        parameters["weight_hr_l0"][:, 1] += 3
        assert not torch.allclose(cell(x)[0], before)


def test_inputs_layers_and_tiles():
    inputs = partition(group_labels(SHAPES, "input"))
    assert len(inputs) == 2 + 6 and frozenset({("fc.weight", 4), ("fc.weight", 10)}) in inputs
    layers = partition(group_labels({**SHAPES, "weight": (2,), "bias": (2,)}, "layer"))
    assert {len(group) for group in layers} == {27, 14, 4} and len(layers) == 4
    tiles = partition(group_labels(SHAPES, Block(2, 4)))
    assert (
        frozenset({("fc.weight", 4), ("fc.weight", 5), ("fc.weight", 10), ("fc.weight", 11)})
        in tiles
        and len(tiles) == 2 * 2 + 2
    )


def test_a_head_is_its_projections():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(6, 3, batch_first=True)
    shapes = {f"block.attn.{name}": tuple(p.shape) for name, p in attention.named_parameters()} | {
        "head.weight": (4, 6)
    }
    labels = group_labels(shapes, "head", {"block.attn": 3})
    assert (
        len(partition(labels)) == 3
        and bool((labels["head.weight"] == -1).all())
        and bool((labels["block.attn.out_proj.bias"] == -1).all())
    )
    x = torch.randn(2, 5, 6)
    parameters = dict(attention.named_parameters())
    with torch.no_grad():
        # a head is dead when its output columns are zero, whatever else of it is left
        for p in parameters.values():
            p.uniform_(-1, 1)
        by_output = torch.nn.MultiheadAttention(6, 3, batch_first=True)
        by_output.load_state_dict(attention.state_dict())
        by_output.out_proj.weight[:, 2:4] = 0
        for name, p in parameters.items():
            p[labels[f"block.attn.{name}"] == 1] = 0
        torch.testing.assert_close(attention(x, x, x)[0], by_output(x, x, x)[0])


def test_labels_of_ones_own():
    own = {"fc.weight": torch.tensor([[7], [3]]), "gain": torch.tensor([-1, 7, 3, 5])}
    labels = partition(group_labels(SHAPES, own))
    assert labels == {
        frozenset({("fc.weight", k) for k in range(6)} | {("gain", 1)}),
        frozenset({("fc.weight", k) for k in range(6, 12)} | {("gain", 2)}),
        frozenset({("gain", 3)}),
    }


def test_no_labels_at_all():
    with pytest.raises(ReductionError, match="got an empty mapping"):
        group_labels(SHAPES, {})


@pytest.mark.parametrize("own", ["x", [0, 1, 2, 3], np.zeros(4, dtype=int), None])
def test_labels_that_are_no_tensors(own):
    with pytest.raises(ReductionError, match="expected a tensor of integers for site 'gain'"):
        group_labels(SHAPES, {"gain": own})


def test_the_evidence_decides_on_whole_groups():
    post = posterior(mask=0.8)
    result = bmr.reduce(post, to=bmr.Gaussian(0), per="unit", threshold=-3.0)
    labels = group_labels(SHAPES, "unit")
    total, went = 0.0, 0
    for group in partition(labels):
        gain = sum(float(spike(post, name).flatten()[k]) for name, k in group)
        living = [bool(post[name].kept.flatten()[k]) for name, k in group]
        kept = [bool(result.masks[name].flatten()[k]) for name, k in group]
        assert kept == [alive and gain <= -3.0 for alive in living]
        total, went = total + (gain if gain > -3.0 else 0.0), went + (gain > -3.0)
    assert result.delta_f == pytest.approx(total, abs=1e-9) and 0 < went < len(partition(labels))


@pytest.mark.parametrize("seed", [0, 1, 4, 5, 6])  # with 2 and 3 a layer is lost, with a warning
def test_a_target_takes_the_groups_that_cost_least_per_weight(seed):
    post = posterior(rng=np.random.default_rng(seed))
    units = group_labels(SHAPES, "unit")  # the outputs too
    result = bmr.reduce(post, to=bmr.Gaussian(0), per=units, kept=0.5)
    costs = {}
    for group in partition(units):
        alive = {bool(result.masks[name].flatten()[k]) for name, k in group}
        assert len(alive) == 1
        costs.setdefault(alive.pop(), []).append(
            np.mean([float(spike(post, name).flatten()[k]) for name, k in group])
        )
    assert max(costs[True]) <= min(costs[False])
    assert 0.5 <= result.kept < 0.5 + 9 / 45  # a group is left whole
    assert bmr.reduce(post, to=bmr.Gaussian(0), per=units, kept=0.0).kept == 0
    assert bmr.reduce(post, to=bmr.Gaussian(0), per=units, kept=1.0).kept == 1


@pytest.mark.parametrize("per", ["weight", "unit"])
def test_a_target_for_each_site(per):
    post = posterior({"a.weight": (8, 4), "b.weight": (8, 4), "c.weight": (8, 4)})
    result = bmr.reduce(post, to=bmr.Gaussian(0), per=per, kept={"a.*": 0.25, "b.*": 0.75})
    assert [float(result.masks[name].double().mean()) for name in ("a.weight", "b.weight")] == [
        0.25,
        0.75,
    ]
    free = bmr.reduce(post, to=bmr.Gaussian(0), per=per)
    assert torch.equal(result.masks["c.weight"], free.masks["c.weight"])
    ranks = (
        spike(post, "a.weight")
        if per == "weight"
        else spike(post, "a.weight").sum(1, keepdim=True).expand(8, 4)
    )
    assert ranks[result.masks["a.weight"]].max() <= ranks[~result.masks["a.weight"]].min()


def test_a_spike_and_slab_has_one_indicator_per_group():
    post = posterior()
    result = bmr.reduce(post, to=bmr.SpikeAndSlab(alpha=1.5, beta=2.5), per="unit")
    gains = torch.stack(
        [spike(post, "fc.weight")[i].sum() + spike(post, "fc.bias")[i] for i in range(2)]
    )
    exact = exact_inclusion(gains, 1.5, 2.5)
    assert (
        result.sites["fc.weight"].delta_f == pytest.approx(exact.log_evidence_gain.item(), abs=1e-9)
        and result.sites["fc.bias"].delta_f == 0
    )
    assert torch.equal(result.masks["fc.bias"], exact.probability >= 0.5) and torch.equal(
        result.masks["fc.weight"][:, 0], exact.probability >= 0.5
    )
    known = bmr.reduce(post, to=bmr.SpikeAndSlab(inclusion=0.2), per="unit").sites["fc.weight"]
    torch.testing.assert_close(known.drop_log_odds[:, 0], gains - math.log(0.2 / 0.8))
    assert known.delta_f == pytest.approx(float((0.2 + 0.8 * gains.exp()).log().sum()), abs=1e-9)
    narrow = bmr.reduce(post, to={"fc.*": bmr.SpikeAndSlab(spike_scale=0.07)}, per="unit")
    parts = [
        bmr.delta_f(post[f"fc.{part}"], PRIOR, bmr.Gaussian(0.07)) for part in ("weight", "bias")
    ]
    assert narrow.delta_f == pytest.approx(
        exact_inclusion(parts[0].sum(1) + parts[1], 1, 1).log_evidence_gain.item(), abs=1e-9
    )


def test_a_horseshoe_group_goes_by_the_sum_of_its_logits():
    post = posterior({"w": (5, 4)})
    centred = bmr.formulas.Diagonal(PRIOR.mean * 0, PRIOR.var)
    post = bmr.Posterior({"w": Site(post["w"].mean, post["w"].var, centred)})
    single, grouped = (bmr.reduce(post, to=bmr.Horseshoe(), per=per) for per in ("weight", "unit"))
    goes = single.sites["w"].drop_log_odds.sum(1) > 0
    assert torch.equal(grouped.masks["w"], ~goes[:, None].expand(5, 4))


def test_two_of_four():
    post = posterior({"fc.weight": (3, 8), "fc.bias": (3,)}, mask=0.9)
    result = bmr.reduce(post, to=bmr.Gaussian(0), per=NofM(2, 4))
    gain, mask = spike(post, "fc.weight").view(3, 2, 4), result.masks["fc.weight"].view(3, 2, 4)
    alive = post["fc.weight"].kept.view(3, 2, 4)
    for i in range(3):
        for j in range(2):
            living = [k for k in range(4) if alive[i, j, k]]
            best = sorted(living, key=lambda k: float(gain[i, j, k]))[:2]
            assert mask[i, j].nonzero()[:, 0].tolist() == sorted(best)
    assert torch.equal(result.masks["fc.bias"], post["fc.bias"].kept)


def test_what_groups_refuse():
    post = posterior()
    for kwargs, message in (
        ({"per": "row"}, r"per='row': one of 'weight', 'unit'"),
        ({"per": "head"}, "no site is a projection"),
        ({"per": "unit", "heads": 2}, "only per='head'"),
        ({"per": NofM(2, 4), "kept": 0.5}, "fixes the fraction itself"),
        (
            {"per": NofM(2, 5)},
            (
                r"leaves site 'conv.weight' \(8 inputs\), .*: the inputs do not divide by m = 5; no"
                r" other site"
            ),
        ),
        ({"per": {"other": torch.zeros(2).long()}}, "no reduced site 'other'"),
        ({"per": {"gain": torch.zeros(3).long()}}, r"integers that broadcast to \(4,\)"),
        ({"kept": {"x.*": 0.5}}, "pattern 'x.\\*' matches no reduced site"),
        ({"kept": {"fc.*": 1.5}}, "a fraction between 0 and 1"),
    ):
        with pytest.raises(bmr.errors.ReductionError, match=message):
            bmr.reduce(post, to=bmr.Gaussian(0), **kwargs)
    attention = posterior({"a.in_proj_weight": (18, 6), "a.out_proj.weight": (6, 6)})
    with pytest.raises(bmr.errors.ReductionError, match="how many heads has 'a'"):
        bmr.reduce(attention, to=bmr.Gaussian(0), per="head")
    with pytest.raises(
        bmr.errors.ReductionError, match="width 6 of site 'a.in_proj_weight' does not divide"
    ):
        bmr.reduce(attention, to=bmr.Gaussian(0), per="head", heads=4)
    with pytest.raises(bmr.errors.ReductionError, match="0 < n < m"):
        NofM(4, 4)
    with pytest.raises(bmr.errors.ReductionError, match="at least one row"):
        Block(0, 2)


def test_every_prunes_units_during_a_fit():
    data = (torch.randn(64, 3), torch.randn(64))
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    every = bmr.Every(epochs=2, per="unit", kept=0.4, start=0.3, stop=0.8)
    fit = bmr.fit(
        bmr.BayesianNetwork(net, bmr.Gaussian(1.0), bmr.Normal()),
        data,
        epochs=8,
        batch_size=16,
        reduce=every,
        progress=False,
    )
    rows, bias = fit.masks["0.weight"], fit.masks["0.bias"]
    assert (
        torch.equal(rows, rows[:, :1].expand(6, 3))
        and torch.equal(rows[:, 0], bias)
        and 0 < int(bias.sum()) < 6
    )


def linear_model(width, seed=4):
    """y = Xw + noise with orthogonal regressors, whose exact posterior is factorised: three units
    of four weights and a bias, of which one is needed.
    """
    rng = np.random.default_rng(seed)
    x = np.linalg.qr(rng.normal(size=(40, 15)))[0] * rng.uniform(1, 4, 15)
    w = np.zeros((3, 5))
    w[1] = rng.normal(0, 1.3, 5)
    y = x @ w.flatten() + 0.7 * rng.normal(size=40)
    var = 1 / ((x**2).sum(0) / 0.49 + 1 / 1.9)
    mean = var * (x.T @ y) / 0.49
    prior = bmr.formulas.Diagonal(
        torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.9, dtype=torch.float64)
    )
    moments = [torch.tensor(part).view(3, 5) for part in (mean, var)]
    sites = {
        "fc.weight": Site(moments[0][:, :4], moments[1][:, :4], prior),
        "fc.bias": Site(moments[0][:, 4], moments[1][:, 4], prior),
    }

    def log_evidence(alive, variances):
        """log N(y; 0, X V Xᵀ + noise² I) with the units `alive`, dense."""
        v = np.where(np.repeat(alive, 5), variances.flatten(), 0.0)
        return stats.multivariate_normal(np.zeros(40), (x * v) @ x.T + 0.49 * np.eye(40)).logpdf(y)

    slab = (
        np.full((3, 5), width**2)
        if np.ndim(width) == 0
        else np.broadcast_to(np.array(width) ** 2, (3, 5))
    )
    return bmr.Posterior(sites), log_evidence, slab


def enumerated(log_evidence, slab, alpha, beta):
    """Gain over the fit's prior and inclusion of each unit, by all eight models' exact
    evidences.
    """
    models = list(itertools.product([False, True], repeat=3))
    prior = [
        special.betaln(alpha + sum(m), beta + 3 - sum(m)) - special.betaln(alpha, beta)
        for m in models
    ]
    terms = np.array([p + log_evidence(m, slab) for p, m in zip(prior, models, strict=True)])
    total = special.logsumexp(terms)
    return total - log_evidence((True,) * 3, np.full((3, 5), 1.9)), np.exp(
        terms - total
    ) @ np.array(models)


@pytest.mark.parametrize("width, bias", [(0.8, 0.8), (2.3, 0.6)])
def test_groups_have_a_slab_of_their_own(width, bias):
    """A spike and slab on units, the slab other than the prior of the fit and another one for the
    bias: against dense exact evidences of all models.
    """
    post, log_evidence, slab = linear_model([width] * 4 + [bias])
    to = {
        "*.weight": bmr.SpikeAndSlab(slab_scale=width, alpha=1.5, beta=2.5),
        "*.bias": bmr.SpikeAndSlab(slab_scale=bias, alpha=1.5, beta=2.5),
    }
    result = bmr.reduce(post, to=to, per="unit")
    gain, inclusion = enumerated(log_evidence, slab, 1.5, 2.5)
    assert result.delta_f == pytest.approx(gain, abs=1e-8)
    np.testing.assert_allclose(
        result.sites["fc.weight"].inclusion, np.repeat(inclusion[:, None], 4, 1), atol=1e-8
    )
    np.testing.assert_allclose(result.sites["fc.bias"].inclusion, inclusion, atol=1e-8)
    assert (
        torch.equal(result.masks["fc.bias"], torch.tensor(inclusion >= 0.5))
        and not result.masks["fc.bias"].all()
    )
    alive = result.masks["fc.bias"]
    reduced = bmr.formulas.reduced_posterior(
        post["fc.bias"], post["fc.bias"].prior, bmr.Gaussian(bias)
    )
    torch.testing.assert_close(result.posterior["fc.bias"].mean, reduced.mean * alive)


def test_the_empirical_slab_of_groups_has_the_best_evidence():
    post, _, _ = linear_model(1.0)
    to = {
        "*.weight": bmr.SpikeAndSlab(slab_scale="empirical"),
        "*.bias": bmr.SpikeAndSlab(slab_scale=0.6),
    }
    found = bmr.reduce(post, to=to, per="unit")
    width = found.posterior["fc.weight"].prior.var.sqrt().item()
    # the width is that of the site's own part of the groups
    own = {"fc.weight": torch.arange(3)[:, None]}

    def bound(scale):
        return with_only_weights(post, bmr.SpikeAndSlab(slab_scale=scale), own)

    assert bound(width) > max(bound(width * 0.9), bound(width * 1.1))
    by_weight = bmr.reduce(post, to=to).posterior["fc.weight"].prior.var.sqrt().item()
    assert abs(width / by_weight - 1) > 0.02  # weights that decide one by one want another


def with_only_weights(post, to, own):
    site = bmr.Posterior({"fc.weight": post["fc.weight"]})
    odds, base = spike_odds(site, "fc.weight", to)
    return mean_field_log_odds(odds.view(3, 4).sum(1), to.alpha, to.beta)[1] + base


def test_entries_in_no_group_are_in_the_slab():
    """Their ΔF is the slab's whatever the groups do, and so they pull the width of an empirical
    one.
    """
    post, log_evidence, slab = linear_model(2.3)
    own = {"fc.weight": torch.tensor([[0], [1], [-1]]), "fc.bias": torch.tensor([-1, -1, -1])}
    to = bmr.SpikeAndSlab(slab_scale=2.3, inclusion=0.3)
    result = bmr.reduce(post, to=to, per=own)
    weights = [0.09, 0.21, 0.21, 0.49]

    def evidence(m):
        alive = slab.copy()
        alive[0, :4] *= m[0]
        alive[1, :4] *= m[1]
        return log_evidence((True,) * 3, alive)

    terms = [
        math.log(p) + evidence(m)
        for p, m in zip(weights, [(1, 1), (1, 0), (0, 1), (0, 0)], strict=True)
    ]
    assert result.delta_f == pytest.approx(
        special.logsumexp(terms) - log_evidence((True,) * 3, np.full((3, 5), 1.9)), abs=1e-8
    )
    assert (
        result.masks["fc.bias"].all()
        and result.masks["fc.weight"][2].all()
        and not result.masks["fc.weight"].all()
    )
    widths = [
        bmr.reduce(
            post,
            to={"fc.weight": bmr.SpikeAndSlab(slab_scale="empirical", inclusion=0.3)},
            per={"fc.weight": part},
        )
        .posterior["fc.weight"]
        .prior.var
        for part in (torch.tensor([[0], [1], [-1]]), torch.tensor([[0], [1], [2]]))
    ]
    assert widths[0] < 0.9 * widths[1]


def test_a_narrow_spike_of_groups_leaves_the_dead_alone():
    post = posterior({"fc.weight": (4, 5)}, mask=0.7)
    result = bmr.reduce(post, to=bmr.SpikeAndSlab(spike_scale=0.07), per="unit")
    each = torch.zeros(4, 5, dtype=torch.float64)
    alive = post["fc.weight"].kept
    each[alive] = bmr.delta_f(
        bmr.formulas.Diagonal(post["fc.weight"].mean[alive], post["fc.weight"].var[alive]),
        PRIOR,
        bmr.Gaussian(0.07),
    )
    assert result.delta_f == pytest.approx(
        exact_inclusion(each.sum(1), 1, 1).log_evidence_gain.item(), abs=1e-9
    )


@pytest.mark.filterwarnings("ignore:layer collapse")  # the targets are small, and empty a layer
@pytest.mark.parametrize("per", ["unit", "channel"])
def test_a_target_size_leaves_the_outputs_of_a_network(per):
    """Three layers of which the last is needed least: its rows stay, the size is reached without
    them; by the evidence, or by name, they go.
    """
    post = posterior(
        {
            "a.weight": (6, 4),
            "a.bias": (6,),
            "b.weight": (6, 6),
            "b.bias": (6,),
            "c.weight": (3, 6),
            "c.bias": (3,),
        }
    )
    weak = {
        name: replace(site, mean=0.01 * site.mean) if name.startswith("c") else site
        for name, site in post.sites.items()
    }
    post = bmr.Posterior(weak)
    result = bmr.reduce(post, to=bmr.Gaussian(0), per=per, kept=0.5)
    assert (
        result.masks["c.weight"].all()
        and result.masks["c.bias"].all()
        and result.kept == pytest.approx(0.5, abs=7 / 93)
    )
    assert not bmr.reduce(post, to=bmr.Gaussian(0), per=per, threshold=-1e9).masks["c.bias"].any()
    assert (
        not bmr.reduce(post, to={"c.*": bmr.Gaussian(0)}, per=per, kept=0.4).masks["c.bias"].all()
    )
    assert (
        not bmr.reduce(post, to=bmr.Gaussian(0), per=per, kept={"c.weight": 0.4})
        .masks["c.bias"]
        .all()
    )
    hidden = bmr.reduce(
        post, to={"a.*": bmr.Gaussian(0), "b.*": bmr.Gaussian(0)}, per=per, kept=0.1
    )
    assert not hidden.masks["b.bias"].all()  # the last of those reduced, but not of the network
    shapes = {name: tuple(site.mean.shape) for name, site in post.sites.items()}
    assert (
        not bmr.reduce(post, to=bmr.Gaussian(0), per=group_labels(shapes, per), kept=0.5)
        .masks["c.weight"]
        .all()
    )
