"""Networks pruned after their training: against a linear model with a known answer, and in what
the call promises.
"""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import pyro_bmr as bmr
from pyro_bmr.errors import DataError, ModelError, ReductionError
from pyro_bmr.formulas import LaplaceEvidence
from pyro_bmr.post_training import rounds as rounds_file
from pyro_bmr.post_training.masks import pruned_at
from pyro_bmr.reduction import NofM

QUIET = {"progress": False, "batch_size": 512}  # of 1,438 rows
FEW = {**QUIET, "corrections": 1, "last_corrections": 3}  # steps


def linear_model(rows=200, noise=0.5):
    """A linear regression, its least-squares weights in a network, and its data."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64) @ mix
    truth = torch.tensor([1.5, 0, 0, -2.0, 0, 0.7]).double()
    y = x @ truth + noise * torch.randn(rows, generator=generator, dtype=torch.float64)
    net = nn.Linear(6, 1, bias=False).double()
    net.weight.data = torch.linalg.lstsq(x, y[:, None]).solution.mT
    return net, x, y


def digits(seed=0, hidden=40, steps=150):
    torch.manual_seed(seed)
    data = bmr.load("digits")
    x, y = data.x_train.flatten(1), data.y_train
    net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    adam = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(steps):
        adam.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        adam.step()
    return net, x, y, data


@pytest.fixture(scope="module")
def trained():
    with torch.random.fork_rng():
        return digits()


def test_a_linear_model_has_the_least_squares_of_its_subset():
    net, x, _ = linear_model()
    pruned = bmr.prune(
        net, x, bmr.Normal(noise=0.5), 0.5, path=[], scale=1e4, temperature=1.0,
        fisher="gauss-newton", corrections=0, last_corrections=0, **QUIET,
    )  # fmt: skip
    mask = pruned.masks["weight"][0]
    assert int(mask.sum()) == 3 and pruned.net.weight[0][~mask].eq(0).all()
    # the labels of the dense network, fitted by the kept columns alone
    fitted = x @ net.weight[0].detach()
    subset = torch.linalg.lstsq(x[:, mask], fitted[:, None]).solution[:, 0]
    torch.testing.assert_close(pruned.net.weight[0][mask].detach(), subset, rtol=1e-4, atol=1e-4)
    left = fitted - x[:, mask] @ subset
    expected = 0.5 * left.square().mean() / 0.5**2
    row = pruned.rounds[-1]
    assert row["predicted_rise"] == pytest.approx(float(expected), rel=1e-4)
    assert row["divergence"] == pytest.approx(float(expected), rel=1e-4)


def test_steps_find_the_least_squares_from_elsewhere():
    """One step solves a linear model, whatever the posterior's curvature was scaled by."""
    net, x, _ = linear_model()
    pruned = bmr.prune(
        net, x, bmr.Normal(noise=0.5), 0.5, path=[], scale=0.05, temperature=1e-3,
        corrections=0, last_corrections=3, **QUIET,
    )  # fmt: skip
    mask = pruned.masks["weight"][0]
    fitted = x @ net.weight[0].detach()
    subset = torch.linalg.lstsq(x[:, mask], fitted[:, None]).solution[:, 0]
    torch.testing.assert_close(pruned.net.weight[0][mask].detach(), subset, rtol=1e-2, atol=1e-2)


def test_a_pruned_classifier_is_better_than_by_magnitude(trained):
    net, x, y, data = trained
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    seen = []

    def note(kept, one):
        zeros = sum(int((m.weight == 0).sum()) for m in (one[0], one[2]))
        seen.append((kept, 1 - zeros / 2960))

    steps = {"corrections": 20, "last_corrections": 50}
    pruned = bmr.prune(net, (x, y), bmr.Categorical(), 0.1, after_round=note, **QUIET, **steps)
    assert [kept for kept, _ in seen] == [0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1]
    assert all(found == pytest.approx(kept, abs=1e-3) for kept, found in seen)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    weights = torch.cat([net[0].weight.flatten(), net[2].weight.flatten()]).abs()
    limit = weights.kthvalue(len(weights) - round(0.1 * len(weights))).values
    by_size = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    by_size.load_state_dict(net.state_dict())
    for layer in (by_size[0], by_size[2]):
        layer.weight.data *= layer.weight.abs() > limit
    accuracy = [
        float((one(data.x_test.flatten(1)).argmax(1) == data.y_test).double().mean())
        for one in (net, pruned.net, by_size)
    ]
    assert accuracy[1] > accuracy[0] - 0.05 and accuracy[1] > accuracy[2] + 0.1
    assert pruned.kept == pytest.approx(0.1, abs=1e-3)
    for name, mask in pruned.masks.items():
        value = pruned.net.get_parameter(name)
        assert bool((value[~mask] == 0).all()) and bool((value[mask] != 0).all())
    exported = bmr.export(net, pruned.reduction.posterior)
    for one, other in zip(exported.parameters(), pruned.net.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert list(pruned.table()["layer"]) == ["0.weight", "2.weight"]
    assert pruned.table()["kept"].min() >= 0.1 * 0.1
    kept = pruned.history()["kept"]
    assert kept.is_monotonic_decreasing and len(kept) == 8


def test_an_empirical_scale_is_that_of_the_most_evidence_of_each_layer(trained):
    net, x, _, _ = trained
    pruned = bmr.prune(
        net, x, bmr.Categorical(), 0.6, path=[], corrections=0, last_corrections=0,
        scale="empirical", temperature=0.3, rows=len(x), fisher="gauss-newton", **QUIET,
    )  # fmt: skip
    before = bmr.curvature(net, x, bmr.Categorical(), fisher="gauss-newton", **QUIET).layers
    for name, layer in pruned.layers.items():
        linear = net[int(name[0])]
        values = torch.cat([linear.weight, linear.bias[:, None]], 1).detach()
        curved = before[name]
        evidence = LaplaceEvidence.of(values, curved.outputs, curved.inputs, 0.3, False)
        assert layer.scale == pytest.approx(evidence.best_scale(), rel=1e-3)
        assert evidence.at(layer.scale) > evidence.at(float(linear.weight.detach().std())) + 1
        assert pruned.reduction.sites[name].site.declared.scale == layer.scale


@pytest.mark.slow
def test_corrections_bring_the_outputs_nearer_to_the_dense_network(trained):
    net, x, y, _ = trained
    divergence = [
        bmr.prune(
            net,
            (x, y),
            bmr.Categorical(),
            0.15,
            path=[0.5, 0.3],
            corrections=few,
            last_corrections=many,
            **QUIET,
        ).rounds[-1]["divergence"]
        for few, many in ((0, 0), (20, 50))
    ]
    assert divergence[1] < 0.5 * divergence[0]


def test_without_labels_and_from_a_loader(trained):
    net, x, y, _ = trained
    options = {**QUIET, "path": [0.7], "corrections": 0, "last_corrections": 1, "seed": 3}
    plain = bmr.prune(net, x, bmr.Categorical(), 0.4, **options)
    labelled = bmr.prune(net, (x, y), bmr.Categorical(), 0.4, **options)
    loader = DataLoader(TensorDataset(x, y), 64)
    loaded = bmr.prune(net, loader, bmr.Categorical(), 0.4, **options)
    for name, mask in plain.masks.items():
        assert torch.equal(mask, labelled.masks[name]) and torch.equal(mask, loaded.masks[name])


def test_units_are_pruned_whole_and_shrink(trained):
    net, x, _, _ = trained
    pruned = bmr.prune(net, x, bmr.Categorical(), 0.6, path=[0.8], per="unit", **FEW)
    mask = pruned.masks["0.weight"]
    assert bool((mask.all(1) | ~mask.any(1)).all()) and bool(pruned.masks["2.weight"].all())
    small = bmr.shrink(pruned.net, pruned.masks, x[:4])
    assert small(x[:4]).shape == (4, 10)
    torch.testing.assert_close(small(x[:4]), pruned.net(x[:4]), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(
        p.numel() for p in net.parameters()
    )


@pytest.mark.slow
def test_patterns_are_kept(trained):
    net, x, _, _ = trained
    pruned = bmr.prune(net, x, bmr.Categorical(), NofM(2, 4), corrections=0, **QUIET)
    for mask in pruned.masks.values():
        assert bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all())
    assert pruned.kept == 0.5


@pytest.mark.slow
def test_it_stops_where_the_loss_rises_too_much(trained):
    net, x, _, data = trained
    held_out = (data.x_test.flatten(1), data.y_test)
    options = {**QUIET, "corrections": 0, "last_corrections": 0}
    free = bmr.prune(net, x, bmr.Categorical(), 0.05, validation=held_out, **options)
    rises = [row["held_out_rise"] for row in free.rounds]
    limit = 0.5 * (rises[-1] + max(rises[:-1]))
    pruned = bmr.prune(
        net, x, bmr.Categorical(), 0.05, validation=held_out, most_rise=limit, **options
    )
    assert "held out rise" in pruned.stopped and len(pruned.rounds) == len(free.rounds) - 1
    assert pruned.kept == pytest.approx(free.rounds[-2]["kept"])
    loss = nn.functional.cross_entropy
    with torch.no_grad():
        rise = float(
            loss(pruned.net(held_out[0]), held_out[1]) - loss(net(held_out[0]), held_out[1])
        )
    assert rise == pytest.approx(rises[-2], rel=1e-3)


def test_a_stopped_call_continues_to_the_same_network(trained, tmp_path, monkeypatch):
    net, x, _, _ = trained
    options = {**QUIET, "path": [0.8, 0.6, 0.4, 0.3], "corrections": 1, "last_corrections": 1}
    whole = bmr.prune(net, x, bmr.Categorical(), 0.2, **options)
    from pyro_bmr.post_training import rounds

    calls = []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(*arguments)

    write = rounds.write_round
    monkeypatch.setattr(rounds, "write_round", broken)
    with pytest.raises(KeyboardInterrupt):
        bmr.prune(net, x, bmr.Categorical(), 0.2, checkpoint=tmp_path, **options)
    monkeypatch.setattr(rounds, "write_round", write)
    resumed = bmr.prune(net, x, bmr.Categorical(), 0.2, checkpoint=tmp_path, **options)
    assert resumed.rounds == whole.rounds
    for one, other in zip(resumed.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ModelError, match="other arguments"):
        bmr.prune(net, x, bmr.Categorical(), 0.1, checkpoint=tmp_path, **options)
    for data, likelihood, more in (
        (x.flip(1), bmr.Categorical(), {}),
        (x, bmr.Categorical(weight=torch.ones(10)), {}),
        (x, bmr.Categorical(), {"fisher": "gauss-newton"}),
        (x, bmr.Categorical(), {"rows": 900}),
        (x, bmr.Categorical(), {"batch_size": 300}),
    ):
        with pytest.raises(ModelError, match="other arguments"):
            bmr.prune(net, data, likelihood, 0.2, checkpoint=tmp_path, **options | more)
    save_file({"a": torch.zeros(1)}, tmp_path / "round.safetensors")
    with pytest.raises(ModelError, match="damaged.*delete it"):
        bmr.prune(net, x, bmr.Categorical(), 0.2, checkpoint=tmp_path, **options)


@pytest.mark.slow
def test_draws_of_the_posterior_have_the_zeros(trained):
    net, x, _, _ = trained
    pruned = bmr.prune(net, x, bmr.Categorical(), 0.3, path=[0.6], **FEW)
    draw = pruned.reduction.posterior.draw(torch.Generator().manual_seed(0))
    for name, mask in pruned.masks.items():
        assert bool((draw[name][~mask] == 0).all()) and bool((draw[name][mask] != 0).all())
    assert pruned.reduction.before["0.weight"].mask is None
    assert pruned.reduction.delta_f == pytest.approx(pruned.rounds[-1]["delta_f"])


def test_the_floor_of_a_layer():
    class Fake:
        bias, columns = None, 10

        def __init__(self, scores):
            self.scores = scores
            self.held = torch.zeros_like(scores, dtype=torch.bool)

        def delta_f(self):
            return self.scores

        def as_parameter(self, matrix):
            return matrix

    low, high = torch.arange(100.0).view(10, 10), torch.arange(100.0).view(10, 10) + 1000
    masks = pruned_at({"a": Fake(low), "b": Fake(high)}, 0.2, 0.5)
    assert int((~masks["a"]).sum()) == 40 and int((~masks["b"]).sum()) == 10
    assert not masks["b"].flatten()[:10].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kept": 0}, "kept=0: expected a fraction"),
        ({"kept": 0.5, "temperature": 0}, "temperature"),
        ({"kept": 0.5, "only": ["conv.*"]}, "matches no parameter"),
        ({"kept": 0.5, "corrections": -1}, "corrections"),
        ({"kept": 0.5, "rate": 0.0}, "rate"),
        ({"kept": 0.5, "rate": None}, "rate=None"),
        ({"kept": 0.5, "rate": True}, "rate=True"),
        ({"kept": 0.5, "temperature": None}, "temperature=None"),
        ({"kept": NofM(2, 4), "per": "unit"}, "leave per out"),
        ({"kept": 0.5, "only": ["*.bias"]}, "expected layers with Kronecker factors"),
    ],
)
def test_what_is_refused(trained, arguments, message):
    net, x, _, _ = trained
    with pytest.raises(ModelError, match=message):
        bmr.prune(net, x, bmr.Categorical(), **arguments, progress=False)


@pytest.mark.parametrize(
    "labels", [{}, {"0.weight": "unit"}, {"0.weight": torch.tensor(-1)}, {"x": torch.tensor(0)}]
)
def test_labels_that_are_refused(trained, labels):
    net, x, _, _ = trained
    with pytest.raises(ReductionError, match="^per[:=]"):
        bmr.prune(net, x, bmr.Categorical(), 0.5, per=labels, progress=False)


def small(hidden=12):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                        nn.Linear(hidden, 2))  # fmt: skip
    x = torch.randn(60, 6)
    return net, x, (x[:, 0] > 0).long()


def test_zeros_stay_whatever_made_them():
    net, x, _ = small()
    prune.l1_unstructured(net[2], "weight", 0.5)
    with torch.no_grad():
        net[0].weight[3] = 0
    zeros = {"0.weight": net[0].weight == 0, "2.weight": net[2].weight == 0}
    with pytest.warns(bmr.PyroBMRWarning, match="zero already and stay so.*more than kept=0.9"):
        pruned = bmr.prune(net, x, bmr.Categorical(), 0.9, **FEW)
    for name, zero in zeros.items():
        assert torch.equal(pruned.masks[name], ~zero)
        assert torch.equal(pruned.net.get_parameter(name) == 0, zero)
    fewer = bmr.prune(net, x, bmr.Categorical(), 0.3, **FEW)
    for name, zero in zeros.items():
        assert not fewer.masks[name][zero].any()
        assert not fewer.net.get_parameter(name)[zero].any()
    assert fewer.kept == pytest.approx(0.3, abs=0.01)
    units = bmr.prune(net, x, bmr.Categorical(), 0.5, per="unit", **FEW)
    assert all(not units.masks[name][zero].any() for name, zero in zeros.items())


def test_what_is_frozen_stays_as_it_is():
    net, x, _ = small()
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    pruned = bmr.prune(net, x, bmr.Categorical(), 0.3, **FEW)
    assert set(pruned.masks) == {"2.weight", "4.weight"}
    for name in ("0.weight", "0.bias", "2.bias"):
        assert torch.equal(pruned.net.get_parameter(name), net.get_parameter(name))
    assert not torch.equal(pruned.net.get_parameter("4.bias"), net.get_parameter("4.bias"))
    named = bmr.prune(net, x, bmr.Categorical(), 0.3, only="0.*", **FEW)
    assert set(named.masks) == {"0.weight"}
    for name in ("2.weight", "4.weight", "0.bias"):
        assert not torch.equal(named.net.get_parameter(name), net.get_parameter(name))
    assert torch.equal(named.net[2].bias, net[2].bias)
    all_frozen = bmr.prune(net.requires_grad_(False), x, bmr.Categorical(), 0.3, **FEW)
    assert len(all_frozen.masks) == 3


def test_units_before_a_frozen_head_are_no_outputs():
    net, x, _ = small(20)
    net[4].requires_grad_(False)
    pruned = bmr.prune(net, x, bmr.Categorical(), 0.5, per="unit", **FEW)
    rows = {name: mask.any(1) for name, mask in pruned.masks.items()}
    assert set(rows) == {"0.weight", "2.weight"} and not rows["2.weight"].all()
    assert pruned.kept == pytest.approx(0.5, abs=0.06)
    net[4].requires_grad_(True)
    net[0].requires_grad_(False)
    pruned = bmr.prune(net, x, bmr.Categorical(), 0.5, per="unit", **FEW)
    assert pruned.masks["4.weight"].all() and not pruned.masks["2.weight"].all()


def test_the_network_can_be_trained_as_before():
    net, x, y = small()
    net[0].bias.requires_grad_(False)
    pruned = bmr.prune(net, x, bmr.Categorical(), 0.5, **FEW)
    trained = {name for name, p in pruned.net.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in net.named_parameters() if p.requires_grad}
    nn.functional.cross_entropy(pruned.net(x), y).backward()
    assert all(pruned.net.get_parameter(name).grad is not None for name in trained)


class Bilinear(nn.Module):
    """Most of its weights multiply pairs of inputs."""

    def __init__(self):
        super().__init__()
        self.pairs, self.head = nn.Bilinear(6, 6, 20), nn.Linear(20, 2)

    def forward(self, x):
        return self.head(self.pairs(x, x).tanh())


def test_weights_without_factors_are_named():
    torch.manual_seed(0)
    net, x = Bilinear(), torch.randn(40, 6)
    words = r"pairs.weight, 95% of the weights, have no Kronecker"
    with pytest.warns(bmr.PyroBMRWarning, match=words):
        pruned = bmr.prune(net, x, bmr.Categorical(), 0.5, **FEW)
    assert list(pruned.masks) == ["head.weight"] and pruned.net.pairs.weight.count_nonzero() == 720
    with (
        pytest.warns(bmr.PyroBMRWarning, match=words),
        pytest.raises(ReductionError, match="per='unit': no group.*head.weight"),
    ):
        bmr.prune(net, x, bmr.Categorical(), 0.5, per="unit", **FEW)


def test_data_that_do_not_go_with_the_network():
    net, x, y = small()
    wrong = y.clone()
    wrong[7] = 5
    for data, likelihood, message in (
        (x[:, :3], bmr.Categorical(), r"does not run on x of shape \(60, 3\)"),
        ((x, wrong), bmr.Categorical(), "got 5 in row 7"),
        ((x, wrong.masked_fill(wrong == 5, -100)), bmr.Categorical(), "ignore_index"),
        ((x, y.float()), bmr.Bernoulli(), r"shape \(60, 2\)"),
    ):
        with pytest.raises(DataError, match=message):
            bmr.prune(net, data, likelihood, 0.5, **FEW)
    with pytest.raises(DataError, match="got 5 in row 7"):
        bmr.prune(net, (x, y), bmr.Categorical(), 0.5, validation=(x, wrong), **FEW)
    one = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(DataError, match="at least two classes"):
        bmr.prune(one, x, bmr.Categorical(), 0.5, **FEW)


def test_a_result_is_described_in_a_line(trained):
    net, x, _, _ = trained
    pruned = bmr.prune(net, x, bmr.Categorical(), 0.5, path=[], **FEW)
    assert repr(pruned) == "Pruned(2 layers, 50.0% of 2,960 weights kept)"
    assert len(repr(pruned.layers["0.weight"])) < 200


def test_zeros_inside_groups_count_as_pruned():
    net, x, _ = small(20)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight[:, ::2] = 0
    pruned = bmr.prune(net, x, bmr.Categorical(), 0.4, per="unit", path=[], **FEW)
    grouped = [pruned.masks[name] for name in ("0.weight", "2.weight")]
    kept = sum(int(m.sum()) for m in grouped) / sum(m.numel() for m in grouped)
    assert 0.4 <= kept < 0.43  # of them 0.5 is there, and a unit has 0.02 of the entries


def test_a_round_that_needs_no_steps_does_not_slow_the_rounds_after_it(trained, monkeypatch):
    net, x, _, _ = trained
    rates, call = [], rounds_file.corrected

    def noted(*given):
        rates.append(given[5])
        found = call(*given)
        return found._replace(nearer=False, rate=given[5] / 27)

    monkeypatch.setattr(rounds_file, "corrected", noted)
    options = {**FEW, "rate": 0.03}
    with pytest.warns(bmr.PyroBMRWarning, match="no steps after the last round, at rate=0.03"):
        bmr.prune(net, x, bmr.Categorical(), 0.2, path=[0.8, 0.5], **options)
    assert rates == [0.03] * 3


def test_weights_of_classes_do_not_draw_the_network_away():
    """They are of the loss: the network is not to become another one."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 3)), torch.randn(300, 8)
    likelihood = bmr.Categorical(weight=torch.tensor([1.0, 1.0, 5.0]))
    options = {"path": [], "corrections": 0, "last_corrections": 100, "progress": False}
    pruned = bmr.prune(net, x, likelihood, 0.5, **options)
    dense, found = (one(x).softmax(1)[:, 2].detach().mean() for one in (net, pruned.net))
    assert abs(float(found - dense)) < 0.02
    assert 0 < pruned.rounds[-1]["divergence"] < 0.02


def test_classes_that_are_ruled_out():
    class Ruled(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x):
            out = self.two(self.one(x).tanh())
            return torch.cat([out, torch.full_like(out[:, :1], -torch.inf)], 1)

    torch.manual_seed(0)
    net, x = Ruled(), torch.randn(80, 6)
    options = {"path": [], "corrections": 0, "progress": False}
    far = bmr.prune(net, x, bmr.Categorical(), 0.3, last_corrections=0, **options)
    near = bmr.prune(net, x, bmr.Categorical(), 0.3, last_corrections=60, **options)
    assert 0 < near.rounds[-1]["divergence"] < 0.5 * far.rounds[-1]["divergence"]


def test_outputs_that_are_no_numbers_are_refused():
    net, x, _ = small()
    x[3] = torch.nan
    with pytest.raises((DataError, ModelError), match="NaN"):
        bmr.prune(net, x, bmr.Categorical(), 0.5, **FEW)


def test_zeros_of_other_parameters():
    """Those of a mask stay, and what begins at zero moves."""

    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.zeros(1, 6))
            self.one, self.two = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.two((self.one(x + self.place)).tanh())

    torch.manual_seed(0)
    net, x = Placed(), torch.randn(80, 6)
    zeros = torch.arange(12) % 3 == 0
    net.one.bias.data[zeros] = 0
    pruned = bmr.prune(net, x, bmr.Categorical(), 0.3, **{**FEW, "last_corrections": 30})
    assert not pruned.net.one.bias[zeros].any() and pruned.net.one.bias[~zeros].all()
    assert pruned.net.place.all()


def test_units_of_recurrent_layers_are_kept():
    class Cells(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.cells = nn.Linear(6, 12), nn.LSTM(12, 5, batch_first=True)

        def forward(self, x):
            return self.cells(self.first(x).tanh())[0][:, -1]

    torch.manual_seed(0)
    net, x = Cells(), torch.randn(80, 4, 6)
    pruned = bmr.prune(net, x, bmr.Categorical(), 0.5, per="unit", **FEW)
    masks = pruned.masks
    assert all(mask.all() for name, mask in masks.items() if name.startswith("cells"))
    rows = masks["first.weight"].any(1)
    assert int(rows.sum()) == 6
