"""Comparisons and studies under every likelihood: each score against a computation by hand, the
base rates against closed forms and SciPy, baselines or the reason why there are none.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import pyro_bmr as bmr
from pyro_bmr.baselines.targets import plain_likelihood, plain_loss
from pyro_bmr.cli.commands import main
from pyro_bmr.experiments import measures, report
from pyro_bmr.experiments.base_rates import base_rates, constant_fit
from pyro_bmr.experiments.compare import compare, comparison
from pyro_bmr.experiments.scores import scores
from pyro_bmr.experiments.settings import Settings
from pyro_bmr.likelihoods import StudentT, Weighted
from pyro_bmr.prediction.of_outputs import prediction_of_outputs

pytestmark = pytest.mark.filterwarnings("ignore:.*the reduction after the fit")
QUICK = {"epochs": 2, "batch_size": 40, "draws": 4}
GENERATOR = torch.Generator().manual_seed(8)
NAN = math.nan


def uniform(*shape):
    return torch.rand(shape, generator=GENERATOR, dtype=torch.float64)


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def data_of(likelihood, y, classes=None, x=None, test=30, **units):
    x = normal(len(y), 3) if x is None else x
    return bmr.Data(
        "made", x[test:], y[test:], x[:test], y[:test], classes, family=likelihood, **units
    )


def with_gaps(y):
    y = y.clone()
    y.view(-1)[::7] = NAN
    return y


BITS = with_gaps((uniform(90, 2) < torch.tensor([0.3, 0.8])).double())
COUNTS, TIME = torch.poisson(4 * uniform(90), generator=GENERATOR), 0.3 + uniform(90)
REALS = with_gaps(1.7 * normal(90, 2) + torch.tensor([0.4, -2.0]))
GRADES = (4 * uniform(90) ** 2).long()
TOKENS = (3 * uniform(90, 5) ** 2).long().masked_fill(uniform(90, 5) < 0.2, -100)
READ = torch.cat([normal(90, 2), TIME[:, None]], 1)
DATA = {
    "bits": data_of(bmr.Bernoulli(missing="ignore"), BITS),
    "counts": data_of(bmr.Poisson(exposure=2), COUNTS, x=READ),
    "weighted counts": data_of(Weighted(bmr.Poisson(), weights=2), COUNTS, x=READ),
    "spread counts": data_of(bmr.NegativeBinomial(), COUNTS + torch.poisson(9 * TIME**4)),
    "two reals": data_of(
        bmr.Normal(noise="per output", missing="ignore"),
        REALS,
        target_scale=torch.tensor([3.0, 0.2]),
        target_mean=torch.tensor([1.0, -1.0]),
    ),
    "noise of the network": data_of(bmr.Normal(noise="network"), 1.3 * normal(90) - 0.7),
    "outliers": data_of(StudentT(4), normal(90) / uniform(90).sqrt() + 0.6, target_scale=2.5),
    "grades": data_of(bmr.Ordinal(4), GRADES, 4),
    "tokens": data_of(bmr.Categorical(ignore_index=-100, class_axis=1), TOKENS, 3),
}


def test_the_constant_of_most_likelihood_is_that_of_the_closed_form():
    """Frequencies, weighted means, SciPy's fit."""

    def rate(name):
        data = DATA[name]
        return constant_fit(data.likelihood(), data)

    output, _ = rate("bits")
    train = DATA["bits"].y_train
    torch.testing.assert_close(output.sigmoid(), train.nanmean(0), rtol=1e-5, atol=0)
    y, x = DATA["counts"].y_train, DATA["counts"].x_train
    output, _ = rate("counts")
    torch.testing.assert_close(output.exp(), (y.sum() / x[:, 2].sum())[None], rtol=1e-5, atol=0)
    output, _ = rate("weighted counts")
    mean = (y * x[:, 2]).sum() / x[:, 2].sum()
    torch.testing.assert_close(output.exp(), mean[None], rtol=1e-5, atol=0)
    output, values = rate("two reals")
    known = DATA["two reals"].y_train
    spread = (known - known.nanmean(0)).square().nanmean(0).sqrt()
    torch.testing.assert_close(output, known.nanmean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values["noise"], spread, rtol=1e-4, atol=0)
    output, _ = rate("noise of the network")
    y = DATA["noise of the network"].y_train
    expected = torch.stack([y.mean(), y.std(correction=0).log()])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output, values = rate("outliers")
    _, loc, scale = stats.t.fit(DATA["outliers"].y_train.numpy(), fdf=4)
    assert [float(output), float(values["noise"])] == pytest.approx([loc, scale], rel=1e-3)
    output, values = rate("spread counts")
    y = DATA["spread counts"].y_train
    assert float(output.exp()) == pytest.approx(float(y.mean()), rel=1e-5)
    c = float(values["concentration"])
    nll = [-stats.nbinom.logpmf(y, k, k / (k + y.mean())).sum() for k in (c, 0.97 * c, 1.03 * c)]
    assert nll[0] < min(nll[1:])


def test_the_base_rates_of_labels_are_those_of_their_frequencies():
    data = DATA["grades"]
    rates = torch.bincount(data.y_train, minlength=4).double() / 60
    assert base_rates(data) == {
        "base_accuracy": pytest.approx(float((data.y_test == rates.argmax()).double().mean())),
        "base_nll": pytest.approx(-float(rates[data.y_test].log().mean()), rel=1e-5),
    }
    data = DATA["tokens"]
    known = data.y_train[data.y_train >= 0]
    rates = torch.bincount(known, minlength=3).double() / len(known)
    nll = -rates[data.y_test.clamp_min(0)].log()[data.y_test >= 0].sum() / len(data.y_test)
    assert base_rates(data)["base_nll"] == pytest.approx(float(nll), rel=1e-5)
    assert base_rates(replace(data, family=Own())) == {}


class Own:
    """A likelihood of somebody's own."""

    def observe(self, output, y):
        raise AssertionError


def test_scores_are_in_the_units_of_the_targets_and_leave_missing_ones_out():
    data = DATA["two reals"]
    locs, noise = 0.3 * normal(30, 2), torch.tensor([0.5, 1.2], dtype=torch.float64)
    prediction = prediction_of_outputs(data.likelihood(), locs, values={"noise": noise})
    found = scores(prediction, data)
    y, known = data.y_test, ~data.y_test.isnan()
    scale, mean = data.target_scale.double(), data.target_mean.double()
    density = stats.norm.logpdf(y * scale + mean, locs * scale + mean, noise * scale)
    assert found["nll"] == pytest.approx(-np.nansum(density) / 30)
    assert found["rmse"] == pytest.approx(float((locs - y)[known].square().mean().sqrt()))
    z = ((y - locs) / noise).numpy()
    crps = noise.numpy() * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - math.pi**-0.5)
    assert found["crps"] == pytest.approx(np.nanmean(crps), rel=1e-6)
    assert found["coverage"] == pytest.approx((abs(z) < 1.6448536)[known].mean())

    data = DATA["outliers"]
    prediction = prediction_of_outputs(data.likelihood(), locs[:, 0], values={"noise": noise[0]})
    found = scores(prediction, data)
    expected = stats.t.logpdf(data.y_test * 2.5, 4, locs[:, 0] * 2.5, 0.5 * 2.5)
    assert found["nll"] == pytest.approx(-expected.mean())
    assert found["rmse"] == pytest.approx(
        2.5 * float((locs[:, 0] - data.y_test).square().mean().sqrt())
    )
    heavy = StudentT(1.0, noise=0.5)  # it has no mean
    assert math.isnan(scores(prediction_of_outputs(heavy, locs[:, 0]), data)["rmse"])


def test_scores_of_labels():
    data = DATA["bits"]
    logits = normal(30, 2)
    found = scores(prediction_of_outputs(data.likelihood(), logits), data)
    p, y = logits.sigmoid(), data.y_test
    log_p = torch.where(y > 0, p, 1 - p).log().where(~y.isnan(), 0)
    assert found["nll"] == pytest.approx(-float(log_p.sum() / 30))
    assert found["brier"] == pytest.approx(2 * float((p - y).square().nanmean()))
    right = ((p > 0.5) == (y > 0.5))[~y.isnan()]
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))

    data = DATA["tokens"]
    logits = normal(30, 3, 5)
    found = scores(prediction_of_outputs(data.likelihood(), logits), data)
    loss = torch.nn.functional.cross_entropy(logits, data.y_test, reduction="sum")
    assert found["nll"] == pytest.approx(float(loss) / 30)
    known = data.y_test >= 0
    assert found["accuracy"] == pytest.approx(
        float((logits.argmax(1) == data.y_test)[known].double().mean())
    )

    data = DATA["grades"]
    values = {"lowest_class": torch.tensor(0.2).double(), "gaps": torch.tensor([0.7, 1.1]).double()}
    prediction = prediction_of_outputs(data.likelihood(), normal(30, 1), values=values)
    below = prediction.probs.cumsum(1)[:, :-1]
    step = (data.y_test[:, None] <= torch.arange(3)).double()
    assert scores(prediction, data)["crps"] == pytest.approx(
        float((below - step).square().sum(1).mean())
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("counts", "of the outputs alone, got Poisson with exposure"),
        ("weighted counts", "of the outputs alone, got Poisson with weights"),
        ("spread counts", "without parameters, got NegativeBinomial with concentration"),
        ("two reals", "without parameters, got Normal with noise"),
        ("grades", "without parameters, got Ordinal with lowest_class, gaps"),
    ],
)
def test_why_there_is_no_plain_network(name, reason):
    with pytest.raises(bmr.errors.ModelError, match=reason):
        plain_likelihood(DATA[name])


def test_the_loss_of_a_plain_network_is_that_of_the_likelihood():
    data = DATA["noise of the network"]
    outputs, y = normal(60, 2), data.y_train
    expected = -stats.norm.logpdf(y, outputs[:, 0], outputs[:, 1].exp()).mean()
    assert float(plain_loss(outputs, y, plain_likelihood(data))) == pytest.approx(expected)
    shared = replace(data, family=bmr.Normal(noise="per output"))
    assert plain_likelihood(shared) is None  # by the squared error


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    rng = np.random.default_rng(2)
    a, hours = rng.normal(size=(120, 2)).T
    made = pd.DataFrame({"a": a, "b": rng.choice(list("xy"), 120), "hours": np.exp(hours / 3)})
    made["visits"] = rng.poisson(np.exp(0.5 * a) * made["hours"])
    made["up"], made["sick"] = a + rng.normal(size=120) > 0, rng.integers(0, 2, 120)
    made["size"], made["grade"] = 50 * a + rng.normal(size=120), (a > 0) + 2 * (a > 1) + 1
    made.loc[::9, "size"] = None
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    made.to_csv(path, index=False)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No plain training is timed, nothing is drawn."""
    monkeypatch.setattr(measures, "step_ratio", lambda *_: 1.5)
    monkeypatch.setattr(report, "draw", lambda *args: [])


@pytest.mark.parametrize(
    ("target", "likelihood", "columns", "routes"),
    [
        ("visits", "poisson:exposure=hours", "rmse crps coverage", "fitted"),
        ("visits", "poisson", "rmse crps coverage", "fitted plain"),
        ("up,sick", "bernoulli", "accuracy brier ece", "fitted plain"),
        ("grade", "ordinal", "accuracy brier ece crps", "fitted"),
        ("size", "student-t:missing=ignore", "rmse crps coverage", "fitted"),
        ("a", "normal:noise=network", "rmse crps coverage", "fitted plain"),
        ("a,size", "normal:missing=ignore,noise=per output", "rmse crps coverage", "fitted"),
    ],
)
def test_every_likelihood_is_compared(csv, target, likelihood, columns, routes):
    """From a file to a table, whose NLL is that of the rows."""
    data = bmr.load(csv, target, likelihood)
    settings = Settings(**QUICK)
    priors = {"gaussian": bmr.Gaussian(0.5)}
    asked = {"priors": priors, "routes": ["fitted"], "seeds": 1, "settings": settings}
    build = "mlp:4"
    if data.input_shape != tuple(data.x_train.shape[1:]):
        build = of_seen
    table = compare(build, data, **asked, progress=False)
    assert table["route"].tolist() == routes.split()
    assert table[columns.split()].notna().all(axis=None)
    assert table[["nll", "nll_error", "base_nll"]].notna().all(axis=None)


def of_seen(data, prior):
    net = torch.nn.Sequential(torch.nn.Linear(*data.input_shape, 4), torch.nn.Tanh())
    net.append(torch.nn.Linear(4, data.outputs))
    return bmr.BayesianNetwork(net, prior, data.likelihood())


def test_a_comparison_says_why_it_has_no_baselines(csv):
    data = bmr.load(csv, "grade", "ordinal")
    made = comparison("mlp:4", data, None, ["fitted"], 1, Settings(**QUICK))
    said = "No baselines: expected a likelihood without parameters, got Ordinal with lowest_class"
    assert made.remarks[0].startswith(said)
    assert made.cells[0].definition["likelihood"] == repr(bmr.Ordinal(3))


@pytest.mark.slow
def test_the_commands_take_a_likelihood(csv, tmp_path, capsys):
    """fit → reduce → export, and a study whose cells know under what they were fitted."""
    options = ["--target", "up", "--likelihood", "bernoulli", "--model", "mlp:4", "--quiet"]
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    fitted = ["fit", "--data", str(csv), *options, "--epochs", "2", "--out", run]
    assert main(fitted) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["reduce", run]) == 0
    assert main(["export", run, "--out", out, "--seconds", "0.01"]) == 0
    report_ = json.loads((tmp_path / "out" / "report.json").read_text())
    data = bmr.load(csv, "up", "bernoulli")
    net = bmr.load_network(out) if (tmp_path / "out" / "program.pt2").exists() else None
    assert net is None or net(data.x_test).shape == (24, 1)
    assert 0 < report_["brier"] < 2
    declared = {
        "name": "s",
        "data": [f"{csv}:up", f"{csv}:visits"],
        "likelihood": {f"{csv}:visits": "poisson", f"{csv}:up": "bernoulli"},
        "models": ["mlp:4"],
        "settings": {"epochs": 2},
        "method": [{"name": "fitted", "method": "fitted"}],
    }
    found = bmr.study(declared, tmp_path / "study", progress=False)
    assert not found.failures and found.table["nll"].notna().all()
    assert found.table["rmse"].notna().tolist() == [False, True]
    cell = str(tmp_path / "study" / "cells" / found.table["cell"][1])
    assert main(["reduce", cell]) == 0  # under the likelihood of its settings
    with pytest.raises(bmr.PyroBMRError, match="study: likelihood.digits: no such key"):
        bmr.study({**declared, "likelihood": {"digits": "poisson"}}, tmp_path / "other")
