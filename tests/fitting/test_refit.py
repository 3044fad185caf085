"""Refits: against the exact evidence of a linear-Gaussian model with orthogonal regressors, where
mean field is exact.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.data.row_sources import Stream
from pyro_bmr.fitting.refit import _bound, evidence_bound, predicted_delta_f
from tests.exact import LinearGaussian

N, D, NOISE, SCALE = 32, 4, 0.6, 1.3
RNG = np.random.default_rng(2)
X = np.linalg.qr(RNG.normal(size=(N, D)))[0] * np.array([4.0, 2.0, 3.0, 1.0])
Y = X @ np.array([0.7, 0.05, 0.0, -0.8]) + NOISE * RNG.normal(size=N)
MODEL = LinearGaussian(X, Y, NOISE)
DATA = (torch.tensor(X), torch.tensor(Y))
SETTINGS = {"epochs": 20, "batch_size": N, "optimizer": bmr.adam(0.003), "progress": False}
EXACT_MEAN, EXACT_COV = MODEL.posterior(np.zeros(D), SCALE**2 * np.eye(D))
EXACT = bmr.Posterior.from_moments(
    {"w": torch.tensor(EXACT_MEAN)},
    {"w": torch.tensor(np.diag(EXACT_COV))},
    bmr.formulas.Diagonal(torch.zeros(D).double(), torch.tensor(SCALE**2).double()),
)


def program(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(D, dtype=x.dtype), SCALE).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


@pytest.fixture(scope="module")
def fitted():
    return bmr.fit(
        program, DATA, **{**SETTINGS, "epochs": 1, "optimizer": bmr.adam(1e-12)}, start=EXACT
    )


def log_evidence(alive):
    return MODEL.log_evidence(np.zeros(D), SCALE**2 * np.diag(np.asarray(alive, float)))


def test_the_bound_is_the_log_evidence(fitted):
    bound = evidence_bound(fitted, *DATA, draws=200)
    assert float(bound.mean()) == pytest.approx(log_evidence(np.ones(D)), abs=0.25)


def test_the_bound_of_rows_that_are_read_is_that_of_tensors(fitted):
    reduction = bmr.reduce(fitted.posterior, to=bmr.Gaussian(0), kept=0.5)
    settings = {**SETTINGS, "epochs": 1}
    whole = bmr.refit(fitted, reduction, DATA, draws=4, **settings)
    settings.pop("batch_size")
    batches = [(DATA[0][:20], DATA[1][:20]), (DATA[0][20:], DATA[1][20:])]
    parts = bmr.refit(fitted, reduction, batches, draws=4, size=N, **settings)
    assert parts.predicted == whole.predicted
    assert parts.observed == pytest.approx(whole.observed, abs=0.05)
    bound = float(evidence_bound(fitted, *DATA, draws=4).mean())
    assert float(_bound(fitted, Stream(batches, N, 2, ""), 4, 0).mean()) == pytest.approx(bound)
    with pytest.raises(bmr.errors.FitError, match="can be read again, got list_iterator"):
        bmr.refit(fitted, reduction, iter(batches), size=N, **settings)


@pytest.mark.parametrize("kept", [0.5, 0.25])
def test_predicted_and_observed_are_the_exact_change(fitted, kept):
    reduction = bmr.reduce(fitted.posterior, to=bmr.Gaussian(0), kept=kept)
    alive = reduction.masks["w"].numpy()
    result = bmr.refit(fitted, reduction, DATA, draws=200, **SETTINGS)
    exact = log_evidence(alive) - log_evidence(np.ones(D))
    assert abs(exact) > 0.2 and result.predicted == pytest.approx(exact, abs=1e-6)
    assert result.observed == pytest.approx(exact, abs=0.1 + 4 * result.standard_error)
    assert (
        torch.equal(result.fit.masks["w"], reduction.masks["w"])
        and not result.fit.posterior["w"].mean[~reduction.masks["w"]].any()
    )


def test_a_fit_begins_where_it_is_told(fitted):
    held = bmr.fit(
        program,
        DATA,
        epochs=1,
        batch_size=N,
        optimizer=bmr.adam(1e-12),
        progress=False,
        start=fitted.posterior,
    )
    torch.testing.assert_close(held.posterior["w"].mean, fitted.posterior["w"].mean)
    torch.testing.assert_close(held.posterior["w"].var, fitted.posterior["w"].var)
    with pytest.raises(bmr.errors.FitError, match="start: its sites"):
        bmr.fit(
            program,
            DATA,
            epochs=1,
            progress=False,
            start=bmr.Posterior({"v": fitted.posterior["w"]}),
        )
    with pytest.raises(bmr.errors.FitError, match="only MeanField can begin"):
        bmr.fit(program, DATA, guide=bmr.Point, epochs=1, progress=False, start=fitted.posterior)


def test_a_refit_climbs_to_the_evidence(fitted):
    """From means that are off by 0.3 each."""
    off = bmr.Posterior.from_moments(
        {"w": EXACT["w"].mean + 0.3}, {"w": EXACT["w"].var}, EXACT["w"].prior
    )
    started = bmr.fit(
        program, DATA, **{**SETTINGS, "epochs": 1, "optimizer": bmr.adam(1e-12)}, start=off
    )
    nothing = bmr.reduce(started.posterior, to=bmr.Gaussian(0), kept=1.0)
    result = bmr.refit(
        started, nothing, DATA, epochs=60, batch_size=N, optimizer=bmr.adam(0.02), progress=False
    )
    assert result.predicted == 0 and result.observed == pytest.approx(
        float((evidence_bound(fitted, *DATA) - evidence_bound(started, *DATA)).mean()), rel=0.1
    )
    assert result.observed > 2


def test_scales_of_the_start_are_held():
    torch.manual_seed(0)
    model = bmr.BayesianNetwork(torch.nn.Linear(D, 1).double(), bmr.Gaussian(), bmr.Normal())
    first = bmr.fit(model, DATA, epochs=20, batch_size=N, optimizer=bmr.adam(0.05), progress=False)
    assert first.scales["weight"] != 1
    reduction = bmr.reduce(first.posterior, to=bmr.Gaussian(0), kept=0.6)
    result = bmr.refit(
        first,
        reduction,
        DATA,
        epochs=5,
        batch_size=N,
        optimizer=bmr.adam(0.02),
        progress=False,
        draws=2,
    )
    assert result.fit.scales == {name: pytest.approx(scale) for name, scale in first.scales.items()}
    assert result.fit.posterior["weight"].prior.var.item() == pytest.approx(
        first.scales["weight"].item() ** 2
    )


def test_what_a_refit_refuses(fitted):
    with pytest.raises(bmr.errors.FitError, match="reduced prior is not Gaussian"):
        predicted_delta_f(bmr.reduce(fitted.posterior, to=bmr.Horseshoe()))
    with pytest.raises(bmr.errors.FitError, match="declares a prior of its own"):
        predicted_delta_f(bmr.reduce(fitted.posterior, to=bmr.Gaussian(0.4)))
    slab = bmr.reduce(fitted.posterior, to=bmr.SpikeAndSlab())
    assert predicted_delta_f(slab) == pytest.approx(
        log_evidence(slab.masks["w"].numpy()) - log_evidence(np.ones(D)), abs=1e-6
    )


@pytest.mark.parametrize(
    "optimizer", [bmr.adam(0.01), bmr.natural_gradient()], ids=["adam", "natural gradient"]
)
def test_survivors_go_on_learning(fitted, optimizer):
    """A fit that begins with masks, and one of a program under `Masked`, train what is left."""
    alive = torch.tensor([True, False, True, True])
    begun = bmr.fit(
        program,
        DATA,
        epochs=40,
        batch_size=N,
        optimizer=optimizer,
        progress=False,
        start=fitted.posterior.masked({"w": alive}),
    )
    masked = bmr.fit(
        bmr.Masked({"w": alive})(program),
        DATA,
        epochs=40,
        batch_size=N,
        optimizer=optimizer,
        progress=False,
    )
    for result, before in ((begun, fitted.posterior["w"].mean), (masked, torch.zeros(D))):
        moved = (result.posterior["w"].mean - before).abs()
        assert (moved[alive] > 1e-4).all() and result.posterior["w"].mean[1] == 0


@pytest.mark.parametrize("guide", [bmr.MeanField, bmr.FullRank])
def test_the_bound_of_a_fit_takes_the_path_of_the_fit_to_the_kl(guide):
    """With data that say nothing of the weights the bound has no noise where the KL is in closed
    form.
    """

    def silent(x, y=None):
        pyro.sample("w", dist.Normal(torch.full((D,), 0.3, dtype=x.dtype), SCALE).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x.new_tensor(0.2), NOISE), obs=y)

    result = bmr.fit(
        silent, DATA, guide=guide, epochs=2, batch_size=N, optimizer=bmr.adam(1e-12), progress=False
    )
    bound = evidence_bound(result, *DATA, draws=8)
    assert bound.std() < 1e-9 and float(bound[0]) == pytest.approx(
        result.history["elbo"].iloc[-1], abs=1e-6
    )


@pytest.mark.parametrize("draws", [1, 0, True, 2.0])
def test_a_standard_error_needs_two_draws(fitted, draws):
    with pytest.raises(bmr.errors.FitError, match=r"refit\(draws=.*>= 2"):
        bmr.refit(
            fitted, bmr.reduce(fitted.posterior, bmr.Gaussian(scale=0), kept=1.0), DATA, draws=draws
        )
