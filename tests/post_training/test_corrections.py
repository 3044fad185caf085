"""The steps towards the dense network, against a loop of its own, and what they must not touch."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call

import pyro_bmr as bmr
from pyro_bmr.curvatures.scores import Loss
from pyro_bmr.post_training.calibration import Calibration
from pyro_bmr.post_training.corrections import corrected, rates
from pyro_bmr.post_training.layer import layers_of
from pyro_bmr.post_training.measure import Measure, curvature_at


def two_networks(dtype=torch.float64):
    """A dense network, a copy with some zeros and other weights, and how they are measured."""
    generator = torch.Generator().manual_seed(3)
    nets = []
    for _ in range(2):
        net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
        for p in net.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        nets.append(net.requires_grad_(False))
    dense, net = nets
    net[0].weight.data[torch.rand(5, 4, generator=generator) < 0.4] = 0
    net[0].weight.data[3] = 0
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64).to(dtype)
    bar = SimpleNamespace(update=lambda n: None)
    rows = Calibration(((x, None),), 9, 27)
    measure = Measure(dense, rows, Loss(bmr.Categorical(), {}), "gauss-newton", 1, bar)
    weights = ["0.weight", "3.weight"]
    wanted = {name: net.get_parameter(name) for name in (*weights, "0.bias", "3.bias")}
    found = curvature_at(measure, net, wanted)
    parameters = dict(net.named_parameters())
    layers = layers_of(found, parameters, dict.fromkeys(weights, 0.7), {}, 0.3)
    return measure, net, layers, x


def test_a_rate_is_the_median_of_the_norms_of_rows_over_their_counts():
    _, net, layers, _ = two_networks()
    found = rates(layers, dict(net.named_parameters()), 0.2)
    expected = {}
    for name in layers:
        rows = net.get_parameter(name).tolist()
        each = sorted(
            sum(w * w for w in row) ** 0.5 / sum(w != 0 for w in row) for row in rows if any(row)
        )
        expected[name] = 0.2 * each[(len(each) - 1) // 2]
    assert found["0.weight"] == found["0.bias"] == pytest.approx(expected["0.weight"])
    assert found["3.weight"] == found["3.bias"] == pytest.approx(expected["3.weight"])
    others = sum(expected.values()) / 2
    assert found["1.weight"] == found["1.bias"] == pytest.approx(others)


def test_a_layer_without_weights_has_no_rate():
    _, net, layers, _ = two_networks()
    net[0].weight.data.zero_()
    found = rates(layers, dict(net.named_parameters()), 0.2)
    assert found["0.weight"] == found["0.bias"] == 0 and found["3.weight"] > 0


def by_hand(measure, net, layers, x, steps, rate):
    """Adam's equations, with a warm-up over a tenth of the steps and a fall to zero."""
    each = rates(layers, dict(net.named_parameters()), rate)
    values = {name: p.clone() for name, p in net.named_parameters()}
    first = {name: torch.zeros_like(v) for name, v in values.items()}
    second = {name: torch.zeros_like(v) for name, v in values.items()}
    masks = {name: v != 0 if v.ndim > 1 else torch.ones_like(v) for name, v in values.items()}
    target = measure.dense(x).log_softmax(1)
    for t in range(1, steps + 1):
        leaves = {name: v.clone().requires_grad_() for name, v in values.items()}
        output = functional_call(net, leaves, (x,)).log_softmax(1)
        loss = nn.functional.kl_div(output, target, reduction="sum", log_target=True)
        share = min(t / (0.1 * steps), (steps + 1 - t) / (0.9 * steps), 1)
        slopes = torch.autograd.grad(loss, list(leaves.values()))
        for (name, value), slope in zip(values.items(), slopes, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * slope
            second[name] = 0.999 * second[name] + 0.001 * slope**2
            mean, square = first[name] / (1 - 0.9**t), second[name] / (1 - 0.999**t)
            moved = value - share * each[name] * mean / (square.sqrt() + 1e-8)
            values[name] = moved * masks[name]
    return values


def test_the_steps_are_those_of_adam_and_zeros_stay():
    measure, net, layers, x = two_networks()
    expected = by_hand(measure, net, layers, x, 20, 0.05)
    before, zeros = measure.divergence(net), net[0].weight == 0
    found = corrected(measure, net, layers, dict(net.named_parameters()), 20, 0.05, seed=0)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-9, atol=1e-9)
    assert torch.equal(net[0].weight == 0, zeros)
    assert found.rate == 0.05 and found.divergence < before
    assert found.divergence == pytest.approx(measure.divergence(net))
    assert not any(p.requires_grad for p in net.parameters())


def test_steps_that_lead_away_are_taken_back():
    measure, net, layers, _ = two_networks()
    before = {name: p.clone() for name, p in net.named_parameters()}
    apart = measure.divergence(net)
    found = corrected(measure, net, layers, dict(net.named_parameters()), 3, 1e6, seed=0)
    assert found.rate == pytest.approx(1e6 / 27) and found.divergence == apart
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])
    found = corrected(measure, net, layers, dict(net.named_parameters()), 20, 0.3, seed=0)
    assert found.divergence < apart and found.rate in (0.3, pytest.approx(0.1))


def test_what_is_not_to_be_moved_stays():
    measure, net, layers, _ = two_networks()
    before = {name: p.clone() for name, p in net.named_parameters()}
    moved = {name: net.get_parameter(name) for name in ("3.weight", "3.bias", "0.weight")}
    corrected(measure, net, layers, moved, 5, 0.05, seed=0)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) == (name not in moved)


def test_half_precision_moves_although_a_step_is_below_its_digits():
    ends = {}
    for dtype in (torch.bfloat16, torch.float32):
        measure, net, layers, _ = two_networks(torch.bfloat16)
        measure.dense.to(dtype)
        rows = Calibration(((measure.rows.batches[0][0].to(dtype), None),), 9, 27)
        measure = replace(measure, rows=rows)
        start = net[0].weight.float()
        net.to(dtype)
        corrected(measure, net, layers, dict(net.named_parameters()), 100, 0.002, seed=0)
        assert net[0].weight.dtype == dtype
        ends[dtype] = net[0].weight.float()
    apart = (ends[torch.bfloat16] - ends[torch.float32]).norm()
    assert apart < 0.3 * (ends[torch.float32] - start).norm()


def test_a_network_that_is_the_dense_one_is_not_moved():
    measure, net, layers, _ = two_networks()
    net.load_state_dict(measure.dense.state_dict())
    found = corrected(measure, net, layers, dict(net.named_parameters()), 5, 0.05, seed=0)
    assert found.rate == 0.05
    assert all(
        torch.equal(a, b) for a, b in zip(net.parameters(), measure.dense.parameters(), strict=True)
    )


@pytest.mark.slow
def test_the_noise_of_drawn_targets_is_not_fitted():
    """Of counts the divergence is that of drawn ones; by hand it is that of their means."""
    measure, net, layers, x = two_networks()
    measure = replace(measure, loss=Loss(bmr.Poisson(), {}))
    net.load_state_dict(measure.dense.state_dict())
    net[0].weight.data[1:4] = 0
    for one in (measure.dense, net):
        one[3].weight.data, one[3].bias.data = one[3].weight[:1] / 4, one[3].bias[:1]
    found = layers_of(
        curvature_at(measure, net, {name: net.get_parameter(name) for name in layers}),
        dict(net.named_parameters()), dict.fromkeys(layers, 0.7), {}, 0.3,
    )  # fmt: skip

    def apart():
        wanted, given = measure.dense(x).double(), net(x).double()
        return float((wanted.exp() * (wanted - given) - wanted.exp() + given.exp()).sum())

    for seed in range(3):
        corrected(measure, net, found, dict(net.named_parameters()), 700, 0.03, seed=seed)
    assert apart() < 0.1
