"""Groups: which entries go together, their evidence, and the decision on them."""

import math

import numpy as np
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.reduction.groups import Block, NofM, group_labels
from pyro_bmr.reduction.spike_and_slab import exact_inclusion
from pyro_bmr.site import Site

SHAPES = {"conv.weight": (3, 2, 2, 2), "conv.bias": (3,), "fc.weight": (2, 6), "fc.bias": (2,), "gain": (4,)}
RNG = np.random.default_rng(21)
PRIOR = bmr.Diagonal(torch.tensor(0.2, dtype=torch.float64), torch.tensor(1.9, dtype=torch.float64))


def posterior(shapes=None, mask=None):
    sites = {}
    for name, shape in (shapes or SHAPES).items():
        mean = np.where(RNG.random(shape) < 0.5, RNG.normal(0.2, 0.9, shape), RNG.normal(0, 0.1, shape))
        alive = None if mask is None else torch.tensor(RNG.random(shape) < mask)
        sites[name] = Site(torch.tensor(mean), torch.tensor(RNG.uniform(0.01, 0.2, shape)), PRIOR, mask=alive)
    return bmr.Posterior(sites)


def spike(post, name):
    """log q(0) − log p(0), by torch's own densities."""
    site, zero = post[name], torch.zeros((), dtype=torch.float64)
    gain = torch.distributions.Normal(site.mean, site.var.sqrt()).log_prob(zero) - torch.distributions.Normal(PRIOR.mean, PRIOR.var.sqrt()).log_prob(zero)
    return gain.masked_fill(~site.alive, 0)


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
    expected = {frozenset({("conv.weight", 8 * i + k) for k in range(8)} | {("conv.bias", i)}) for i in range(3)}
    expected |= {frozenset({("fc.weight", 6 * i + k) for k in range(6)} | {("fc.bias", i)}) for i in range(2)}
    assert partition(labels) == expected | {frozenset({("gain", k)}) for k in range(4)}
    assert partition(group_labels(SHAPES, "channel")) == partition(labels)
    assert all(tuple(label.shape) == SHAPES[name] for name, label in labels.items())


def test_inputs_layers_and_tiles():
    inputs = partition(group_labels(SHAPES, "input"))
    assert len(inputs) == 2 + 6 and frozenset({("fc.weight", 4), ("fc.weight", 10)}) in inputs
    layers = partition(group_labels({**SHAPES, "weight": (2,), "bias": (2,)}, "layer"))
    assert {len(group) for group in layers} == {27, 14, 4} and len(layers) == 4
    tiles = partition(group_labels(SHAPES, Block(2, 4)))
    assert frozenset({("fc.weight", 4), ("fc.weight", 5), ("fc.weight", 10), ("fc.weight", 11)}) in tiles and len(tiles) == 2 * 2 + 2


def test_a_head_is_its_projections():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(6, 3, batch_first=True)
    shapes = {f"block.attn.{name}": tuple(p.shape) for name, p in attention.named_parameters()} | {"head.weight": (4, 6)}
    labels = group_labels(shapes, "head", {"block.attn": 3})
    assert len(partition(labels)) == 3 and bool((labels["head.weight"] == -1).all()) and bool((labels["block.attn.out_proj.bias"] == -1).all())
    x = torch.randn(2, 5, 6)
    parameters = dict(attention.named_parameters())
    with torch.no_grad():
        for p in parameters.values():  # a head is dead when its output columns are zero, whatever else of it is left
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


def test_the_evidence_decides_on_whole_groups():
    post = posterior(mask=0.8)
    result = bmr.reduce(post, to=bmr.Gaussian(0), per="unit", threshold=-3.0)
    labels = group_labels(SHAPES, "unit")
    total, went = 0.0, 0
    for group in partition(labels):
        gain = sum(float(spike(post, name).flatten()[k]) for name, k in group)
        living = [bool(post[name].alive.flatten()[k]) for name, k in group]
        kept = [bool(result.masks[name].flatten()[k]) for name, k in group]
        assert kept == [alive and gain <= -3.0 for alive in living]
        total, went = total + (gain if gain > -3.0 else 0.0), went + (gain > -3.0)
    assert result.delta_f == pytest.approx(total, abs=1e-9) and 0 < went < len(partition(labels))


@pytest.mark.parametrize("_draw", range(5))
def test_a_target_takes_the_groups_that_cost_least_per_weight(_draw):
    post = posterior()
    result = bmr.reduce(post, to=bmr.Gaussian(0), per="unit", kept=0.5)
    costs = {}
    for group in partition(group_labels(SHAPES, "unit")):
        alive = {bool(result.masks[name].flatten()[k]) for name, k in group}
        assert len(alive) == 1
        costs.setdefault(alive.pop(), []).append(np.mean([float(spike(post, name).flatten()[k]) for name, k in group]))
    assert max(costs[True]) <= min(costs[False])
    assert 0.5 <= result.kept < 0.5 + 9 / 45  # a group is left whole
    assert bmr.reduce(post, to=bmr.Gaussian(0), per="unit", kept=0.0).kept == 0
    assert bmr.reduce(post, to=bmr.Gaussian(0), per="unit", kept=1.0).kept == 1


@pytest.mark.parametrize("per", ["weight", "unit"])
def test_a_target_for_each_site(per):
    post = posterior({"a.weight": (8, 4), "b.weight": (8, 4), "c.weight": (8, 4)})
    result = bmr.reduce(post, to=bmr.Gaussian(0), per=per, kept={"a.*": 0.25, "b.*": 0.75})
    assert [float(result.masks[name].double().mean()) for name in ("a.weight", "b.weight")] == [0.25, 0.75]
    free = bmr.reduce(post, to=bmr.Gaussian(0), per=per)
    assert torch.equal(result.masks["c.weight"], free.masks["c.weight"])
    ranks = spike(post, "a.weight") if per == "weight" else spike(post, "a.weight").sum(1, keepdim=True).expand(8, 4)
    assert ranks[result.masks["a.weight"]].max() <= ranks[~result.masks["a.weight"]].min()


def test_a_spike_and_slab_has_one_indicator_per_group():
    post = posterior()
    result = bmr.reduce(post, to=bmr.SpikeAndSlab(alpha=1.5, beta=2.5), per="unit")
    gains = torch.stack([spike(post, "fc.weight")[i].sum() + spike(post, "fc.bias")[i] for i in range(2)])
    exact = exact_inclusion(gains, 1.5, 2.5)
    assert result.sites["fc.weight"].delta_f == pytest.approx(exact.log_evidence_gain.item(), abs=1e-9) and result.sites["fc.bias"].delta_f == 0
    assert torch.equal(result.masks["fc.bias"], exact.probability >= 0.5) and torch.equal(result.masks["fc.weight"][:, 0], exact.probability >= 0.5)
    known = bmr.reduce(post, to=bmr.SpikeAndSlab(inclusion=0.2), per="unit").sites["fc.weight"]
    torch.testing.assert_close(known.drop[:, 0], gains - math.log(0.2 / 0.8))
    assert known.delta_f == pytest.approx(float((0.2 + 0.8 * gains.exp()).log().sum()), abs=1e-9)
    narrow = bmr.reduce(post, to={"fc.*": bmr.SpikeAndSlab(spike_scale=0.07)}, per="unit")
    parts = [bmr.delta_f(post[f"fc.{part}"], PRIOR, bmr.Gaussian(0.07)) for part in ("weight", "bias")]
    assert narrow.delta_f == pytest.approx(exact_inclusion(parts[0].sum(1) + parts[1], 1, 1).log_evidence_gain.item(), abs=1e-9)


def test_a_horseshoe_group_goes_by_the_sum_of_its_logits():
    post = posterior({"w": (5, 4)})
    centred = bmr.Diagonal(PRIOR.mean * 0, PRIOR.var)
    post = bmr.Posterior({"w": Site(post["w"].mean, post["w"].var, centred)})
    single, grouped = (bmr.reduce(post, to=bmr.Horseshoe(), per=per) for per in ("weight", "unit"))
    goes = single.sites["w"].drop.sum(1) > 0
    assert torch.equal(grouped.masks["w"], ~goes[:, None].expand(5, 4))


def test_two_of_four():
    post = posterior({"fc.weight": (3, 8), "fc.bias": (3,)}, mask=0.9)
    result = bmr.reduce(post, to=bmr.Gaussian(0), per=NofM(2, 4))
    gain, mask = spike(post, "fc.weight").view(3, 2, 4), result.masks["fc.weight"].view(3, 2, 4)
    alive = post["fc.weight"].alive.view(3, 2, 4)
    for i in range(3):
        for j in range(2):
            living = [k for k in range(4) if alive[i, j, k]]
            best = sorted(living, key=lambda k: float(gain[i, j, k]))[:2]
            assert mask[i, j].nonzero()[:, 0].tolist() == sorted(best)
    assert torch.equal(result.masks["fc.bias"], post["fc.bias"].alive)


def test_what_groups_refuse():
    post = posterior()
    for kwargs, message in (
        ({"per": "row"}, r"per='row': one of 'weight', 'unit'"),
        ({"per": "head"}, "no site is a projection"),
        ({"per": "unit", "heads": 2}, "only per='head'"),
        ({"per": NofM(2, 4), "kept": 0.5}, "fixes the fraction itself"),
        ({"per": NofM(2, 5)}, "site 'conv.weight': 8 inputs do not divide by m = 5"),
        ({"per": {"other": torch.zeros(2).long()}}, "no reduced site 'other'"),
        ({"per": {"gain": torch.zeros(3).long()}}, r"integers that broadcast to \(4,\)"),
        ({"kept": {"x.*": 0.5}}, "pattern 'x.\\*' matches no reduced site"),
        ({"kept": {"fc.*": 1.5}}, "a fraction between 0 and 1"),
    ):
        with pytest.raises(bmr.ReductionError, match=message):
            bmr.reduce(post, to=bmr.Gaussian(0), **kwargs)
    attention = posterior({"a.in_proj_weight": (18, 6), "a.out_proj.weight": (6, 6)})
    with pytest.raises(bmr.ReductionError, match="how many heads has 'a'"):
        bmr.reduce(attention, to=bmr.Gaussian(0), per="head")
    with pytest.raises(bmr.ReductionError, match="width 6 of site 'a.in_proj_weight' does not divide"):
        bmr.reduce(attention, to=bmr.Gaussian(0), per="head", heads=4)
    with pytest.raises(bmr.ReductionError, match="0 < n < m"):
        NofM(4, 4)
    with pytest.raises(bmr.ReductionError, match="at least one row"):
        Block(0, 2)


def test_every_prunes_units_during_a_fit():
    data = (torch.randn(64, 3), torch.randn(64))
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    every = bmr.Every(epochs=2, per="unit", kept=0.4, start=0.3, stop=0.8)
    fit = bmr.fit(bmr.BayesianNetwork(net, bmr.Gaussian(1.0), bmr.Normal()), data, epochs=8, batch_size=16, reduce=every, progress=False)
    rows, bias = fit.masks["0.weight"], fit.masks["0.bias"]
    assert torch.equal(rows, rows[:, :1].expand(6, 3)) and torch.equal(rows[:, 0], bias) and 0 < int(bias.sum()) < 6


@pytest.mark.parametrize("width", [1.7, "empirical"])
def test_groups_refuse_a_slab_of_its_own(width):
    with pytest.raises(bmr.ReductionError, match="site 'conv.weight'.*slab_scale"):
        bmr.reduce(posterior(), to=bmr.SpikeAndSlab(slab_scale=width), per="unit")
