"""The baselines of a study: what defines each of them, in numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.baselines.magnitude import Pruning
from pyro_bmr.baselines.targets import fitted_nll, held_out_scale, plain_loss
from pyro_bmr.baselines.variational_dropout import log_uniform_kl
from pyro_bmr.data.data_set import validation_data
from pyro_bmr.experiments.methods import METHODS, method_named
from pyro_bmr.experiments.models import load_model
from tests.parameters import others_slow

DATA = bmr.load("digits")
BUILD = load_model("mlp:12")
TOTAL = 65 * 12 + 13 * 10


def trained(name, **options):
    return method_named(name)(
        BUILD, DATA, 3, {"epochs": 5, "learning_rate": 2e-2, **options}, False
    )


@pytest.mark.parametrize(
    "name",
    others_slow(["magnitude", "rewinding", "snr", "sparse-variational-dropout"], "magnitude"),
)
def test_the_fraction_kept_is_that_of_all_parameters(name):
    result = trained(name, kept=0.23)
    assert sum(int(w.count_nonzero()) for w in result.weights.values()) == pytest.approx(
        0.23 * TOTAL, abs=1
    )
    assert sum(p.numel() for p in result.network.parameters()) == TOTAL
    with torch.no_grad():
        assert (
            result.network(DATA.x_test).shape == (len(DATA.x_test), 10)
            and bmr.metrics.accuracy(result.predict(DATA.x_test).probs, DATA.y_test) > 0.3
        )


def test_pruning_takes_the_smallest_and_never_gives_back():
    weights = [
        torch.nn.Parameter(torch.tensor([0.5, -3.0, 0.1])),
        torch.nn.Parameter(torch.tensor([[2.0, -0.2]])),
    ]
    pruning = Pruning(weights)
    pruning.prune(0.6)
    assert [w.tolist() for w in weights] == [[0.5, -3.0, 0.0], [[2.0, 0.0]]]
    weights[1].data[0, 1] = 9.0  # as a step of Adam would
    pruning.prune(0.4)
    assert [w.tolist() for w in weights] == [[0.0, -3.0, 0.0], [[2.0, 0.0]]]


def test_pruning_meets_its_size_among_equal_weights():
    weights = [
        torch.nn.Parameter(torch.tensor([1.0, 2.0, 1.0, 1.0])),
        torch.nn.Parameter(torch.tensor([[1.0, -1.0]])),
    ]
    Pruning(weights).prune(0.5)
    assert [w.tolist() for w in weights] == [[0.0, 2.0, 0.0, 0.0], [[1.0, -1.0]]]


def test_an_ensemble_is_the_mean_of_its_members():
    result = trained("ensemble", members=2)
    with torch.no_grad():
        members = torch.stack([net(DATA.x_test).softmax(1) for net in result.network.members])
    torch.testing.assert_close(result.predict(DATA.x_test).probs, members.mean(0))
    assert (members[0] - members[1]).abs().max() > 0.1


def test_dropout_averages_over_masks_and_leaves_a_plain_network():
    result = trained("dropout", dropout=0.4, draws=300)
    with torch.no_grad():
        plain = result.network(DATA.x_test).softmax(1)
    probs = result.predict(DATA.x_test).probs
    assert (probs - plain).abs().max() > 0.02 and (probs - plain).abs().mean() < 0.1
    assert not any("ropout" in type(m).__name__ for m in result.network.modules())


def test_the_divergence_from_the_log_uniform_prior():
    """KL = E log|1 + √α z| − ½ log α + (γ + log 2)/2, which vanishes as α grows, by quadrature; the
    fit of Molchanov et al. 2017 is within 0.05 nats.
    """
    z = np.linspace(-9, 9, 2_000_001)
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    for log_alpha in (-4.0, -1.3, 0.2, 1.7, 4.0):
        mean = (density * np.log(np.abs(1 + np.exp(0.5 * log_alpha) * z) + 1e-300)).sum()
        exact = mean - 0.5 * log_alpha + (np.euler_gamma + np.log(2)) / 2
        assert float(
            log_uniform_kl(torch.tensor([log_alpha], dtype=torch.float64)).sum()
        ) == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("name", ["plain", "magnitude", "rewinding"])
def test_real_targets_have_one_noise(name):
    """The noise is the residual of the training rows times the scale, which for held-out rows is
    that of the least NLL: the residual there.
    """
    data, sizes = bmr.load("diabetes"), {} if name == "plain" else {"kept": 0.4}
    options = {"epochs": 10, "learning_rate": 2e-2, "weight_decay": 0.01, **sizes}
    for more in ({"calibrate": True}, {"scale": 1.7}):
        result = method_named(name)(load_model("mlp:5"), data, 3, {**options, **more}, False)
        rows = validation_data(data, 1 / 6) if "calibrate" in more else data
        with torch.no_grad():
            found = [result.network(x)[:, 0] for x in (rows.x_train, rows.x_test, data.x_test)]
        noise, held = (
            float((f - y).double().square().mean().sqrt())
            for f, y in zip(found[:2], (rows.y_train, rows.y_test), strict=True)
        )
        expected = held if "calibrate" in more else 1.7 * noise
        prediction = result.predict(data.x_test)
        torch.testing.assert_close(prediction.mean, found[2])
        assert prediction.scales.unique().tolist() == pytest.approx([expected], rel=1e-5)
        assert result.extra["scale"] == pytest.approx(expected / noise, rel=1e-5)
        assert bmr.metrics.rmse(prediction.mean, data.y_test) < 0.95
        if sizes:
            total = 11 * 5 + 6
            kept = sum(int(w.count_nonzero()) for w in result.weights.values())
            assert kept == round(0.4 * total)


def test_a_temperature_that_no_row_determines_is_one():
    logits = torch.tensor([[0.2, 0.0], [0.0, 0.3], [0.4, 0.0]])
    right, wrong = torch.tensor([0, 1, 0]), torch.tensor([0, 0, 0])
    assert held_out_scale(logits, right, 1.0) == 1.0
    tied = torch.tensor([[0.2, 0.2], [0.0, 0.3], [0.4, 0.0]])
    for first in (0, 1):
        assert held_out_scale(tied, torch.tensor([first, 1, 0]), 1.0) == 1.0
    assert held_out_scale(logits, wrong, 1.0) == bmr.prediction.best_temperature(logits, wrong) != 1


@pytest.mark.slow
def test_the_loss_of_real_targets_at_the_best_noise():
    """Against the least mean of −log N over a grid of noises, two numbers a row."""
    generator = torch.Generator().manual_seed(5)
    y, outputs = (scale * torch.randn(30, 2, generator=generator) for scale in (3, 1))
    noises = torch.linspace(0.5, 8, 4000)
    nll = [
        -torch.distributions.Normal(outputs, noise).log_prob(y).sum(1).mean() for noise in noises
    ]
    assert fitted_nll(float(plain_loss(outputs, y)), y) == pytest.approx(float(min(nll)), rel=1e-6)
    unit = -torch.distributions.Normal(outputs, 1.0).log_prob(y).sum(1).mean()
    assert float(plain_loss(outputs, y)) == pytest.approx(float(unit) - math.log(2 * math.pi))


def test_early_stopping_keeps_the_epoch_of_the_least_held_out_nll():
    data = replace(bmr.load("diabetes"), x_train=bmr.load("diabetes").x_train[:60])
    data = replace(data, y_train=data.y_train[:60])
    options = {"epochs": 60, "learning_rate": 5e-2, "early_stopping": True}
    result = method_named("plain")(load_model("mlp:40"), data, 0, options, False)
    held = validation_data(data, 1 / 6)
    with torch.no_grad():
        errors = (result.network(held.x_test)[:, 0] - held.y_test).double().square().mean()
    nll = result.history["validation_nll"]
    assert result.extra["best_epoch"] == nll.argmin() + 1 < 60 and nll.min() < nll.iloc[-1] - 0.05
    assert nll.min() == pytest.approx(
        0.5 * math.log(2 * math.pi * math.e * float(errors)), rel=1e-5
    )


def test_baselines_of_classes_alone_and_programs_without_a_network_are_refused():
    data = bmr.load("diabetes")
    with pytest.raises(bmr.errors.ModelError, match="dropout: expected data with classes.*plain, "):
        method_named("dropout")(load_model("mlp:5"), data, 0, {}, False)

    def build(data, prior):
        return lambda x, y=None: None

    def counts(data, prior):
        return bmr.BayesianNetwork(torch.nn.Linear(10, 1), prior, Counts())

    class Counts(bmr.Normal):
        pass

    with pytest.raises(bmr.errors.ModelError, match="plain: .*BayesianNetwork, got function"):
        method_named("plain")(build, data, 0, {}, False)
    with pytest.raises(
        bmr.errors.ModelError, match="plain: .*likelihood Normal of the data, got Counts"
    ):
        method_named("plain")(counts, data, 0, {}, False)


def test_unknown_options_and_methods_are_named():
    for name in METHODS:
        with pytest.raises(
            bmr.errors.ModelError, match=f"^{name}: no option epocs; the options are: .*epochs"
        ):
            method_named(name)(BUILD, DATA, 0, {"epocs": 3}, False)
    with pytest.raises(
        bmr.errors.ModelError, match="no method 'pruning'; the methods are: plain, "
    ):
        method_named("pruning")
