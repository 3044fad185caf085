"""The training loop: what it accepts, repeats, stops at, and leaves alone."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_bmr as bmr


def regression(n=64, d=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=dtype)
    w = torch.tensor([2.0, 0, 0, -1.5, 0, 0], dtype=dtype)
    return x, x @ w + 0.3 * torch.randn(n, generator=generator, dtype=dtype)


def linear(x, y=None):
    w = bmr.Gaussian().sample("w", (6,), x.new_zeros(6))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)


def classifier(prior=None, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    return bmr.BayesianNetwork(net, prior or bmr.Gaussian(0.5), bmr.Categorical())


def blobs(n=90, dtype=torch.float32):
    y = torch.arange(n) % 3
    return (
        torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
        + 2.0 * nn.functional.one_hot(y, 4).to(dtype),
        y,
    )


quick = partial(bmr.fit, epochs=3, batch_size=32, progress=False)


def test_one_seed_fixes_everything_and_another_changes_it():
    x, y = blobs()
    torch.manual_seed(5)
    first = quick(classifier(), (x, y), seed=3)
    torch.rand(7)
    again = quick(classifier(), (x, y), seed=3)
    other = quick(classifier(), (x, y), seed=4)
    for name in first.posterior:
        assert torch.equal(first.posterior[name].mean, again.posterior[name].mean)
    assert not torch.equal(first.posterior["0.weight"].mean, other.posterior["0.weight"].mean)


def test_nothing_of_the_callers_changes():
    x, y = blobs()
    model = classifier({"0.*": bmr.Gaussian(0.5), "2.*": None})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    fit = quick(model, (x, y))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state()) and len(pyro.get_param_store()) == 0
    # a parameter that was not lifted is trained, in the copy
    assert not torch.equal(fit.program.net[2].weight, model.net[2].weight)
    assert torch.equal(fit.program.net[0].weight, model.net[0].weight)


def test_dtype_follows_the_model():
    fit = quick(classifier(dtype=torch.float64), blobs(dtype=torch.float64))
    assert all(site.mean.dtype == torch.float64 for site in fit.posterior.sites.values())


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.RMSprop, lr=1e-3),
        partial(torch.optim.AdamW, lr=0.01),
    ],
)
@pytest.mark.parametrize(
    "scheduler",
    [
        None,
        lambda o, steps: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.005, total_steps=steps),
    ],
)
def test_any_optimiser_and_schedule(optimizer, scheduler):
    fit = quick(classifier(), blobs(), optimizer=optimizer, scheduler=scheduler, epochs=20)
    assert fit.history["elbo"].iloc[-1] > fit.history["elbo"].iloc[0]


def test_history_and_validation():
    x, y = blobs()
    fit = quick(classifier(), (x, y), validation=0.2, epochs=6)
    history = fit.history
    assert history["epoch"].tolist() == [1, 2, 3, 4, 5, 6] and history["step"].iloc[
        -1
    ] == 6 * math.ceil(72 / 32)
    torch.testing.assert_close(
        torch.tensor((history["expected_log_likelihood"] - history["kl"]).to_numpy()),
        torch.tensor(history["elbo"].to_numpy()),
    )
    assert history["validation_nll"].iloc[-1] < history["validation_nll"].iloc[0] < 5
    direct = -bmr.predict(fit.program, fit.posterior, x, draws=0).log_prob(y).mean().item()
    outside = quick(classifier(), (x, y), validation=(x, y), epochs=6)
    assert outside.history["validation_nll"].iloc[-1] == pytest.approx(direct, rel=0.25)


@pytest.mark.slow
def test_the_defaults_learn_a_curve():
    """One-dimensional regression with the default guide, optimiser and prior: not a constant, and
    the noise is found.
    """
    x = torch.linspace(-2, 2, 200)[:, None]
    y = torch.sin(2 * x[:, 0]) + 0.1 * torch.randn(200, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
    fit = bmr.fit(
        bmr.BayesianNetwork(net, bmr.Gaussian(), bmr.Normal()),
        (x, y),
        epochs=1500,
        batch_size=200,
        optimizer=bmr.adam(1e-2),
        progress=False,
    )
    prediction = bmr.predict(fit.program, fit.posterior, x)
    assert bmr.metrics.rmse(prediction.mean, torch.sin(2 * x[:, 0])) < 0.35  # a constant has 0.70
    assert 0.07 < fit.posterior.point()["noise"].item() < 0.5


def test_the_defaults_learn_digits():
    data = bmr.load("digits")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
    fit = bmr.fit(
        bmr.BayesianNetwork(net, bmr.Gaussian(), data.likelihood()), data, epochs=30, progress=False
    )
    assert (
        bmr.metrics.accuracy(
            bmr.predict(fit.program, fit.posterior, data.x_test).probs, data.y_test
        )
        > 0.88
    )


@pytest.mark.parametrize(
    "prior",
    [
        bmr.Gaussian(0.5),
        bmr.Gaussian("layer"),
        bmr.Horseshoe(),
        bmr.Horseshoe(tiers=("layer", "unit")),
        bmr.SpikeAndSlab(),
    ],
)
@pytest.mark.parametrize(
    "guide",
    [
        bmr.MeanField,
        bmr.Point,
        pytest.param(AutoNormal, marks=pytest.mark.slow),
        pytest.param(partial(bmr.MeanField, init_scale=0.1), marks=pytest.mark.slow),
    ],
)
def test_every_prior_fits_with_every_guide(prior, guide):
    x, y = blobs()
    epochs, rate = (25, 0.02) if guide is AutoNormal else (15, 0.04)  # its KL is sampled
    fit = quick(
        classifier(prior),
        (x, y),
        guide=guide,
        epochs=epochs,
        optimizer=bmr.adam(rate),
        temperature=0.1,
    )
    assert bmr.metrics.accuracy(bmr.predict(fit.program, fit.posterior, x, draws=0).probs, y) > 0.8
    assert fit.history[["expected_log_likelihood", "kl"]].notna().all().all()


@pytest.mark.parametrize("guide", [bmr.MeanField, pytest.param(AutoNormal, marks=pytest.mark.slow)])
def test_reduction_during_the_fit_finds_the_zeros(guide):
    fit = bmr.fit(
        linear,
        regression(),
        guide=guide,
        epochs=90,
        batch_size=64,
        optimizer=bmr.adam(0.06),
        reduce=bmr.Every(epochs=6, start=0.4, stop=0.9),
        progress=False,
    )
    assert fit.masks["w"].tolist() == [True, False, False, True, False, False]
    site = fit.posterior["w"]
    assert not site.mean[~fit.masks["w"]].any() and not site.var[~fit.masks["w"]].any()
    assert site.mean[fit.masks["w"]].tolist() == pytest.approx([2.0, -1.5], abs=0.2)
    assert (
        fit.history["kept"].iloc[-1] == pytest.approx(1 / 3) and fit.history["delta_f"].iloc[-1] > 2
    )
    survivors = (site.mean.square() + site.var)[fit.masks["w"]].mean().sqrt()
    # the layer's scale counts survivors only
    assert fit.scales["w"].item() == pytest.approx(survivors.item(), rel=0.02)
    assert 0 < fit.reduction_seconds < fit.seconds


def test_pruned_weights_leave_the_kl():
    """At equal moments of the survivors the KL of the last epoch is that of two coefficients, not
    of six.
    """
    fit = bmr.fit(
        linear,
        regression(),
        epochs=120,
        batch_size=64,
        optimizer=bmr.adam(0.05),
        reduce=bmr.Every(epochs=8, start=0.4, stop=0.9),
        progress=False,
    )
    site, mask = fit.posterior["w"], fit.masks["w"]
    q = dist.Normal(site.mean[mask], site.var[mask].sqrt())
    by_hand = torch.distributions.kl_divergence(
        q, dist.Normal(torch.zeros(2), fit.scales["w"])
    ).sum()
    assert fit.history["kl"].iloc[-1] == pytest.approx(by_hand.item(), rel=0.02)


def test_target_sparsity_during_the_fit():
    fit = quick(classifier(), blobs(), epochs=10, reduce=bmr.Every(kept=0.2, stop=0.6))
    assert fit.history["kept"].iloc[-1] == pytest.approx(0.2, abs=0.02)
    assert fit.history["kept"].is_monotonic_decreasing


def test_a_plate_of_the_whole_data_is_not_scaled_twice():
    """The same model with the plate of the batch, of N subsampled, and without one: equal
    losses.
    """
    x, y = regression()

    def subsampled(x, y=None):
        w = bmr.Gaussian().sample("w", (6,), x.new_zeros(6))
        with pyro.plate("data", 64, subsample=torch.arange(len(x))):
            return pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    def bare(x, y=None):
        w = bmr.Gaussian().sample("w", (6,), x.new_zeros(6))
        return pyro.sample("y", dist.Normal(x @ w, 0.3).to_event(1), obs=y)

    histories = [
        quick(p, (x, y), batch_size=16).history["elbo"].tolist() for p in (linear, subsampled, bare)
    ]
    assert histories[1] == pytest.approx(histories[0], rel=1e-5) and histories[2] == pytest.approx(
        histories[0], rel=1e-5
    )


def test_wrong_plates_are_named():
    def wrong_size(x, y=None):
        w = bmr.Gaussian().sample("w", (6,), x.new_zeros(6))
        with pyro.plate("rows", 1000, subsample=torch.arange(len(x))):
            return pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    with pytest.raises(
        bmr.errors.ModelError,
        match="expected a plate of the 64 rows of the data, got plate 'rows' of 1000",
    ):
        quick(wrong_size, regression())


class Exploding(nn.Module):
    """Fine for a while, then not finite."""

    def __init__(self, good_calls):
        super().__init__()
        self.calls, self.good_calls = 0, good_calls

    def forward(self, x, y=None):
        w = bmr.Gaussian(1.0).sample("w", (6,), x.new_zeros(6))
        if self.training and y is not None and len(y) == 32:
            self.calls += 1
        w = w * (math.inf if self.calls > self.good_calls else 1.0)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)


def test_a_loss_that_is_not_finite_stops_with_step_and_site():
    with pytest.raises(bmr.errors.FitError, match=r"step 4: .*not finite at w .*learning rate"):
        quick(Exploding(3), regression())


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"batch_size": 0}, bmr.errors.FitError, "batch_size=0"),
        ({"epochs": 0}, bmr.errors.FitError, "epochs=0"),
        ({"temperature": 0.0}, bmr.errors.FitError, "temperature=0"),
        ({"validation": 1.0}, bmr.errors.FitError, "validation=1.0"),
    ],
)
def test_arguments_out_of_range(change, error, words):
    with pytest.raises(error, match=words):
        quick(classifier(), blobs(), **change)


def test_bad_rows_are_named_before_any_work():
    x, y = blobs()
    with pytest.raises(bmr.errors.DataError, match="x is NaN or infinite, first in row 7"):
        quick(classifier(), (x.index_fill(0, torch.tensor([7]), math.nan), y))
    with pytest.raises(
        bmr.errors.DataError, match=r"outside the support of observed site 'y'.*got 3 in row 5"
    ):
        quick(classifier(), (x, y.index_fill(0, torch.tensor([5]), 3)))
    with pytest.raises(bmr.errors.DataError, match=r"x of shape \(90, 4\) and y of shape \(80,\)"):
        quick(classifier(), (x, y[:80]))
    with pytest.raises(bmr.errors.DataError, match="at least one"):
        quick(classifier(), (x[:0], y[:0]))


def test_guides_that_cannot_be_read_are_refused_before_the_first_step():
    from pyro.infer.autoguide import AutoIAFNormal

    program = Exploding(0)  # a first step would end in a FitError
    with pytest.raises(bmr.errors.ModelError, match="site 'w'.*AutoIAFNormal cannot be read"):
        quick(program, regression(), guide=AutoIAFNormal)


def test_the_data_speak_before_anything_is_pruned_or_rescaled():
    fit = bmr.fit(
        linear,
        regression(),
        epochs=40,
        batch_size=64,
        reduce=bmr.Every(epochs=1, start=0.0, stop=1.0),
        progress=False,
    )
    first_change = fit.history.loc[fit.history["kept"] < 1, "step"].min()
    assert first_change >= 0.3 * 40
    assert quick(linear, regression(), batch_size=64, epochs=3).scales.keys() == {"w"}


def test_params_of_a_hand_written_program_are_refused():
    def with_param(x, y=None):
        scale = pyro.param("scale", torch.tensor(1.0))
        w = bmr.Gaussian().sample("w", (6,), x.new_zeros(6))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ w, scale), obs=y)

    with pytest.raises(
        bmr.errors.FitError, match=r"pyro.param 'scale' would not be trained.*from_param_store"
    ):
        quick(with_param, regression())
    assert len(pyro.get_param_store()) == 0


def test_prediction_needs_targets_with_a_default():
    def strict(x, y):
        return linear(x, y)

    with pytest.raises(bmr.errors.ModelError, match="y=None"):
        quick(strict, regression(), validation=0.2)


@pytest.mark.parametrize(
    "change",
    [
        {"reduce": bmr.Every(epochs=30)},
        {"reduce": bmr.Every(start=0, stop=0.1)},
        {"reduce": bmr.Every(), "guide": bmr.Point},
    ],
)
def test_schedules_that_never_act_are_refused(change):
    with pytest.raises(bmr.errors.FitError, match=r"Every\(.*no reduction can be made"):
        quick(linear, regression(), **change)


@pytest.mark.slow
def test_a_tempered_fit_with_a_given_noise_has_the_noise_of_the_tempered_model():
    """N(y; f, σ²)^{1/T} is N(y; f, Tσ²) up to a factor: the exact posterior of a linear model."""
    torch.manual_seed(0)
    x = torch.randn(40, 2)
    y = x @ torch.tensor([0.8, -0.4]) + 0.5 * torch.randn(40)
    model = bmr.BayesianNetwork(
        nn.Linear(2, 1, bias=False), bmr.Gaussian(0.7), bmr.Normal(noise=0.5)
    )
    step = bmr.natural_gradient()
    fit = bmr.fit(
        model, (x, y), epochs=1_500, optimizer=step, temperature=0.4, progress=False, seed=1
    )
    precision = x.T @ x / (0.4 * 0.5**2) + torch.eye(2) / 0.7**2
    mean = torch.linalg.solve(precision, x.T @ y / (0.4 * 0.5**2))
    site = fit.posterior["weight"]
    sd = precision.diagonal().rsqrt()  # of the best Gaussian of independent entries
    assert torch.allclose(site.mean[0], mean, atol=0.2 * float(sd.min()))
    assert torch.allclose(site.var[0].sqrt(), sd, rtol=0.05)


def test_a_single_row_left_over_joins_its_neighbours():
    x, y = blobs(33)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    fit = quick(
        bmr.BayesianNetwork(net, bmr.Gaussian(0.5), bmr.Categorical()), (x, y), batch_size=32
    )
    assert fit.history["step"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "whole", [False, True], ids=["a part in evaluation mode", "all in evaluation mode"]
)
def test_a_part_in_evaluation_mode_stays_there(whole):
    x, y = blobs(64)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).requires_grad_(False),
        nn.BatchNorm1d(8),
        nn.Linear(8, 3),
    )
    modes = []
    net[0][2].register_forward_pre_hook(lambda module, args: modes.append(module.training))
    (net if whole else net[0]).eval()
    fit = quick(bmr.BayesianNetwork(net, bmr.Gaussian(0.5), bmr.Categorical()), (x, y))
    again = bmr.refit(
        fit,
        bmr.reduce(fit.posterior, bmr.Gaussian(scale=0), kept=1.0),
        (x, y),
        epochs=1,
        draws=2,
        progress=False,
    )
    for program in (fit.program, again.fit.program):
        assert torch.equal(program.net[0][1].running_mean, net[0][1].running_mean) != whole
        assert (
            not torch.equal(program.net[1].running_mean, net[1].running_mean)
            and not program.training
        )
    assert any(modes) == whole and net[1].training != whole and not net[0].training


class InLowPrecision(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(x)


@pytest.mark.parametrize(
    "prior",
    [
        pytest.param(bmr.Gaussian(0.5), id="plain"),
        pytest.param(bmr.Horseshoe(), id="hierarchical", marks=pytest.mark.slow),
    ],
)
def test_a_fit_under_autocast_is_that_of_a_network_in_lower_precision(prior):
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    y = (x[:, 0] > 0).long()

    def net():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))

    def fitted(module):
        return bmr.fit(
            bmr.BayesianNetwork(module, prior, bmr.Categorical()),
            (x, y),
            epochs=40,
            batch_size=32,
            optimizer=bmr.adam(0.02),
            progress=False,
        )

    inside, full = fitted(InLowPrecision(net())), fitted(net())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = fitted(net())
    likelihood = [
        fit.history["expected_log_likelihood"].to_numpy() for fit in (inside, outside, full)
    ]
    assert outside.posterior["0.weight"].mean.dtype == torch.float32
    # weights cached at the first step would not learn
    assert likelihood[0] == pytest.approx(likelihood[1], rel=1e-4)
    assert likelihood[1][-1] > 0.6 * likelihood[1][0]
    assert (
        likelihood[1] == pytest.approx(likelihood[2], rel=0.05)
        and not (likelihood[1] == likelihood[2]).any()
    )
