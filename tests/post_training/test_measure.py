"""The divergence from the dense network, and the curvature, by plain torch."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.curvatures.ranks import Ranks
from pyro_bmr.curvatures.scores import Loss
from pyro_bmr.post_training.calibration import Calibration, calibration_rows
from pyro_bmr.post_training.divergence import Divergence
from pyro_bmr.post_training.measure import Measure, curvature_at


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_divergence_of_classes_is_the_kullback_leibler_divergence():
    one, other = double(6, 4), double(6, 4, seed=1)
    found = Divergence(Loss(bmr.Categorical(), {})).of(one, other, None, {})
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=other), torch.distributions.Categorical(logits=one)
    )
    torch.testing.assert_close(found, kl.sum())
    positions, y = double(2, 3, 4), torch.tensor([[0, 1, -100], [2, -100, -100]])
    loss = Loss(bmr.Categorical(ignore_index=-100, class_axis=-1), {})
    part = Divergence(loss).of(positions, double(2, 3, 4, seed=1), y, {})
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=double(2, 3, 4, seed=1)),
        torch.distributions.Categorical(logits=positions),
    )
    torch.testing.assert_close(part, kl[y != -100].sum())


def test_divergence_of_real_targets_and_of_drawn_ones():
    one, other = double(6), double(6, seed=1)
    found = Divergence(Loss(bmr.Normal(noise=0.3), {})).of(one, other, None, {})
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(other, 0.3), normal(one, 0.3)).sum()
    torch.testing.assert_close(found, expected)
    many = torch.ones(4000).double()
    drawn = Divergence(Loss(bmr.Poisson(), {})).of(0.8 * many, -0.4 * many, None, {}) / 4000
    two = [torch.distributions.Poisson(torch.tensor(v).double().exp()) for v in (-0.4, 0.8)]
    assert float(drawn) == pytest.approx(float(torch.distributions.kl_divergence(*two)), rel=0.03)


def test_divergence_of_yes_and_no_is_the_kullback_leibler_divergence():
    one, other = 3 * double(5, 4), 3 * double(5, 4, seed=1)
    bernoulli = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(bernoulli(logits=other), bernoulli(logits=one))
    found = Divergence(Loss(bmr.Bernoulli(), {})).of(one, other, None, {})
    torch.testing.assert_close(found, expected.sum())
    y = torch.ones(5, 4).double()
    y[1, 2] = y[3] = torch.nan
    observed = Divergence(Loss(bmr.Bernoulli(missing="ignore"), {}))
    torch.testing.assert_close(observed.of(one, other, y, {}), expected[~y.isnan()].sum())
    flat = observed.of(one[:, :1], other[:, :1], y[:, 0], {})
    torch.testing.assert_close(flat, expected[[0, 1, 2, 4], 0].sum())


def tiny():
    torch.manual_seed(6)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double() for _ in range(2)]
    x = double(8, 3)
    rows = Calibration(((x[:5], None), (x[5:], None)), 8, 24)
    bar = SimpleNamespace(update=lambda n: None)
    measure = Measure(nets[0], rows, Loss(bmr.Categorical(), {}), "gauss-newton", 1, bar)
    return measure, nets[1], x


def test_the_divergence_is_over_all_rows_and_the_curvature_that_of_the_network():
    measure, net, x = tiny()
    wanted = dict(net.named_parameters())
    kl = nn.functional.kl_div(
        net(x).log_softmax(1), measure.dense(x).log_softmax(1), reduction="sum", log_target=True
    )
    assert measure.divergence(net) == pytest.approx(3 * kl.item())
    first = measure.apart(net, None, 0)
    assert (first + measure.apart(net, None, 1)).item() == pytest.approx(kl.item())
    plain = bmr.curvature(net, x, bmr.Categorical(), fisher="gauss-newton", size=24, progress=False)
    curved = curvature_at(measure, net, wanted)
    for name, layer in plain.layers.items():
        torch.testing.assert_close(curved.layers[name].outputs, layer.outputs)
        torch.testing.assert_close(curved.layers[name].inputs, layer.inputs)


def test_calibration_rows_are_a_random_part_of_tensors_and_the_first_of_a_stream():
    net, x, y = nn.Linear(2, 2), torch.arange(40.0).view(20, 2), torch.arange(20)
    found = calibration_rows(net, (x, y), 8, True, 3, seed=0, size=None, ranks=Ranks())
    other = calibration_rows(net, (x, y), 8, True, 3, seed=1, size=None, ranks=Ranks())
    rows = [torch.cat([y for _, y in one.batches]) for one in (found, other)]
    assert found.rows == 8 and found.size == 20 and not torch.equal(*rows)
    assert all(torch.equal(a[:, 0], 2.0 * b) for a, b in found.batches)
    batches = [(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])]
    stream = calibration_rows(net, batches, 8, True, 5, seed=0, size=20, ranks=Ranks())
    assert torch.equal(torch.cat([y for _, y in stream.batches]), y[:10]) and stream.size == 20
    assert calibration_rows(net, x, 30, False, 4, seed=0, size=100, ranks=Ranks()).size == 100
