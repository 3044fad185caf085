"""The temperatures that trials choose, of the fit and of its class probabilities: the same fits and
scores by hand, where they are written, and when there is no trial.
"""

import json
from dataclasses import replace

import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.data.data_set import Data, validation_data
from pyro_bmr.experiments import held_out as held_out_file
from pyro_bmr.experiments import recipe
from pyro_bmr.experiments import temperature_trials as temperature_trials_file
from pyro_bmr.experiments.compare import compare
from pyro_bmr.experiments.held_out import Trials, folds_of
from pyro_bmr.experiments.methods import method_named
from pyro_bmr.experiments.models import load_model
from pyro_bmr.experiments.settings import Settings, epochs_between_reductions, length_of
from pyro_bmr.experiments.temperature_trials import TEMPERATURES, temperature_trials
from tests.parameters import others_slow

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*the reduction after the fit", "ignore:.* is a sum over"
)
BUILD = load_model("mlp:20")
SETTINGS = Settings(epochs=60, batch_size=20, draws=8)


def labelled(wrong: float) -> Data:
    """Two classes, divided by a line, of 120 rows, a part of the labels drawn at random."""
    draws = torch.Generator().manual_seed(5)
    x = torch.randn(240, 6, generator=draws)
    y = (x[:, 0] - x[:, 1] > 0).long()
    other = torch.rand(240, generator=draws) < wrong
    y = torch.where(other, torch.randint(2, (240,), generator=draws), y)
    return Data("line", x[:120], y[:120], x[120:], y[120:], 2)


def by_route(data, settings, route="fitted", prior=None):
    prior = prior or bmr.Gaussian("layer")
    return recipe.fit_by_route(BUILD, data, prior, route, 3, settings, False)


def held_out(data, temperature, every, fold, batch_size=20):
    """The probabilities of the held-out rows after the trial of a fit of 60 epochs, by hand, and
    their labels.
    """
    rows = validation_data(data, 1 / 6, fold)
    assert len(rows.x_train) == 100 and len(rows.x_test) == 20
    with torch.random.fork_rng():
        torch.manual_seed(3)
        program = BUILD(rows, bmr.Gaussian("layer"))
    fit = bmr.fit(
        program,
        (rows.x_train, rows.y_train),
        epochs=20,
        batch_size=batch_size,
        optimizer=bmr.natural_gradient(),
        temperature=temperature,
        seed=3,
        reduce=every,
        progress=False,
    )
    posterior = bmr.reduce(fit.posterior, to=bmr.Gaussian(scale=0)).posterior if every else None
    drawn = bmr.predict(fit.program, posterior or fit.posterior, rows.x_test, draws=8, seed=3)
    return drawn.probs.double(), rows.y_test


def nll(probs, y, scale=1.0):
    powers = probs ** (1 / scale)
    return -float((powers[torch.arange(len(y)), y] / powers.sum(1)).log().mean())


@pytest.mark.filterwarnings("ignore:the fit has not converged")
@pytest.mark.parametrize(
    ("route", "batch_size"),
    others_slow([("fitted", 20), ("reduced", 20), ("reduced", 100)], ("reduced", 100)),
)
def test_a_trial_is_a_third_of_the_fit_on_five_sixths_of_the_rows(route, batch_size, monkeypatch):
    monkeypatch.setattr(held_out_file, "_ENOUGH", 40)  # two folds of 20 rows
    data = labelled(0.1)
    settings = replace(SETTINGS, reduce_every=6.0, batch_size=batch_size)
    found = by_route(data, settings, route)
    every = bmr.Every(2.0, bmr.Gaussian(scale=0)) if route == "reduced" else None
    held = {
        t: tuple(
            map(
                torch.cat,
                zip(*(held_out(data, t, every, k, batch_size) for k in (0, 1)), strict=True),
            )
        )
        for t in TEMPERATURES
    }
    expected = {t: nll(*held[t]) for t in TEMPERATURES}
    assert found.trials.nll == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0.3] - expected[0.1]) > 0.01
    best = min(expected, key=expected.get)
    assert found.trials.temperature == found.fit.temperature == best
    scales = torch.logspace(-1, 1, 1001).tolist()
    scale = min(scales, key=lambda s: nll(*held[best], s))
    assert route == "fitted" or scale > 1.2
    assert found.scale == pytest.approx(max(scale, 1.0), rel=0.01)
    given = by_route(data, replace(settings, temperature=best), route)
    assert given.trials is None and given.scale == 1 and len(given.fit.history) == 60
    for name, site in given.posterior.sites.items():
        assert torch.equal(site.mean, found.posterior.sites[name].mean)


@pytest.mark.filterwarnings("ignore:the fit has not converged")
@pytest.mark.parametrize(
    "batch_size, trial, every",
    [
        (128, 1000, None),  # 3,000 steps, of which 20 passes are 20
        (2, 2667, 9.0),  # of 8,000 steps, 20 passes over 800 rows
        (1, 5333, None),  # the budget, which 20 passes would overrun
    ],
)
def test_a_trial_is_a_third_of_a_fit_whose_length_follows_the_rows(batch_size, trial, every):
    data = labelled(0.0)
    x, y = data.x_train.repeat(8, 1), data.y_train.repeat(8)
    data = replace(data, x_train=x, y_train=y)  # 960 rows, of which each of two folds has 800
    seen = []

    def attempt(rows, settings, length, fold):
        seen.append((settings.epochs, length.steps, length.first, settings.reduce_every))
        program = BUILD(rows, bmr.Gaussian())
        fit = bmr.fit(program, (rows.x_train[:20], rows.y_train[:20]), epochs=1, progress=False)
        return fit.program, fit.posterior

    settings = Settings(draws=2, batch_size=batch_size, reduce_every=every)
    temperature_trials(attempt, data, settings, 0, False)
    assert seen == [(None, trial, trial, every and every / 3)] * (2 * len(TEMPERATURES))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit has not converged")
def test_a_fit_is_as_short_as_its_trials_if_rows_are_few(monkeypatch):
    """A third of the usual length; with one fold it has all of it. A given interval stays."""
    lengths = []
    monkeypatch.setattr(held_out_file, "_ENOUGH", 20)

    def fit(program, rows, epochs, reduce=None, **given):
        lengths.append((len(rows.x_train), epochs.steps, epochs.first))
        every.append(None if reduce is None else reduce.epochs)
        return bmr.fit(program, (rows.x_train[:10], rows.y_train[:10]), epochs=1, **given)

    every = []
    monkeypatch.setattr(recipe, "fit", fit)
    by_route(labelled(0.0), Settings(draws=2, batch_size=128))
    assert lengths == [(100, 1000, 1000), (100, 1000, 1000), (120, 3000, 3000)]
    lengths.clear()
    by_route(labelled(0.0), Settings(draws=2, batch_size=1, temperature=0.3))
    assert lengths == [(120, 3000, 3000)]
    lengths.clear(), every.clear()
    settings = Settings(draws=2, batch_size=1, kept=0.5, reduce_every=9.0)
    by_route(labelled(0.0), settings, "reduced")  # to a target size
    assert lengths == [(100, 3000, 3000)] * 2 + [(120, 3000, 3000)] and every == [9.0] * 3
    lengths.clear()
    by_route(labelled(0.0), replace(settings, batch_size=128))  # not pruned in time
    assert lengths == [(100, 1000, 1000), (100, 1000, 1000), (120, 3000, 3000)]
    monkeypatch.setattr(held_out_file, "_ENOUGH", 40)
    lengths.clear(), every.clear()
    settings = Settings(draws=2, batch_size=1, reduce_every=9.0)
    by_route(labelled(0.0), settings, "reduced")
    assert lengths == [(100, 1000, 1000)] * 4 + [(120, 1000, 1000)] and every == [3.0] * 4 + [9.0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit has not converged")
def test_trials_as_long_as_the_fit_are_compared_at_their_scales(monkeypatch):
    """The colder trial is better at its own scale, and worse without one."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.5, 0.0], [0.3, 0.0]]).log_softmax(1).double()
    y, sure = torch.tensor([0, 1, 0, 1]), {0.3: 0.2, 0.1: 6.0}

    def held(attempt, data, settings, seed, part):
        better = logits * torch.tensor([[1.5], [1.5], [1.5], [0.2]])
        used = better if settings.temperature == 0.1 else logits
        return (used * sure[settings.temperature] * 4).log_softmax(1), y

    monkeypatch.setattr(temperature_trials_file, "_held_out", held)
    settings = (20, {}), (40, {}), (40, {"epochs": 9}), (20, {"kept": 0.1}), (40, {"kept": 0.1})
    for folds, given in settings:
        monkeypatch.setattr(held_out_file, "_ENOUGH", folds)
        in_time = "kept" in given
        found = temperature_trials(None, labelled(0.0), Settings(**given), 0, False, in_time)
        probs = {t: held(None, None, Settings(temperature=t), 0, 1)[0].exp() for t in TEMPERATURES}
        scales = [1.0, *torch.logspace(0, 1.3, 2001).tolist()]
        own = {t: min(nll(probs[t], y, s) for s in scales) for t in TEMPERATURES}
        plain = {t: nll(probs[t], y) for t in TEMPERATURES}
        assert own[0.1] < own[0.3] < plain[0.3] + 1e-9 < plain[0.1]
        few = folds == 40 and "epochs" not in given
        as_long = few or "kept" in given
        assert found.nll == pytest.approx(own if as_long else plain, rel=1e-4)
        assert found.temperature == (0.1 if as_long else 0.3)
        assert found.part == (1 / 3 if few else 1)


def test_reductions_by_evidence_are_a_thousand_steps_apart():
    """The steps after which they are due, by the length of the fit and the options."""
    classes = labelled(0.0)
    x = classes.x_train
    real = Data("real", x, x[:, 0], x, x[:, 0], None)

    def due(steps, rows=1280, data=classes, **given):
        data = replace(data, x_train=data.x_train[:1].expand(rows, -1))
        settings = Settings(**({"temperature": 0.3} | given))
        length = length_of(settings.epochs, rows, settings.batch_size)
        if settings.epochs is None:
            length = bmr.UntilConverged(steps=steps, first=steps)
        apart = epochs_between_reductions(settings, length, data)
        every = bmr.Every(apart, start=settings.start, kept=settings.kept, stop=settings.stop)
        per_epoch = -(-rows // settings.batch_size)
        return [k for k in range(1, steps + 1) if every.is_due(k, steps, per_epoch)]

    assert due(1000) == [750] and due(3000) == [1125, 2250]
    assert due(3000, stop=0.5) == [750, 1500] and due(3000, start=0.5) == [2250]
    assert due(9400) == [round(k * 7050 / 7) for k in range(1, 8)]
    assert due(16_000, stop=1.0) == [round(k * 1600) for k in range(1, 11)]
    assert due(600, epochs=60) == [450] and due(2990, rows=130, batch_size=1) == [1121, 2242]
    tenths = [100, 200, 300, 400, 500, 600, 700]
    assert due(1000, kept=0.2) == [*tenths, 750]
    assert due(1000, optimizer="adam") == due(1000, temperature=1.0) == tenths
    assert due(1000, data=real) == tenths
    assert due(1000, reduce_every=20.0) == [200, 400, 600]
    assert due(1000, start=0, stop=0) == []


def test_the_length_of_a_fit():
    # 60,000 rows in batches of 128 are 469 steps a pass; the budget is that of UntilConverged
    for rows, batch_size, steps in [
        (60_000, 128, 9_380),
        (19_000, 128, 3_000),
        (19_201, 128, 3_020),
        (10_000_000, 128, 16_000),
    ]:
        assert length_of(None, rows, batch_size) == bmr.UntilConverged(steps=steps, first=steps)
    assert length_of(7, 60_000, 128) == 7 and length_of(7, 60_000, 128, 1 / 3) == 2
    assert length_of(1, 60_000, 128, 1 / 3) == 1


def test_the_folds():
    """Until 200 rows or all were held out, each once; and with validation rows one."""
    for rows, folds in [(1_438, 1), (1_200, 1), (1_194, 2), (600, 2), (594, 3), (120, 6), (10, 5)]:
        data = Data("rows", torch.randn(rows, 2), torch.arange(rows) % 2, *(torch.ones(2),) * 2, 2)
        assert folds_of(data) == folds
        held = [validation_data(data, 1 / 6, fold) for fold in range(folds)]
        seen = torch.cat([part.x_test for part in held])
        assert len(seen.unique(dim=0)) == len(seen) >= min(200, rows)
        for part in held:
            both = torch.cat([part.x_train, part.x_test])
            assert torch.equal(both.unique(dim=0), data.x_train.unique(dim=0))
    assert folds_of(replace(data, x_val=data.x_test, y_val=data.y_test)) == 1


@pytest.mark.parametrize("route", ["map", "fitted", "reduced"])
def test_no_trial_for_a_program_by_hand_nor_for_map(route):
    data = bmr.load("diabetes") if route != "map" else labelled(0.0)
    build = load_model("linear_regression") if route != "map" else BUILD
    settings = replace(SETTINGS, epochs=2)
    found = recipe.fit_by_route(build, data, bmr.Gaussian("layer"), route, 0, settings, False)
    assert found.trials == Trials(1.0, {}, 1.0)
    assert found.fit.temperature == 1


@pytest.mark.slow
def test_predictions_have_the_scale_of_the_trials(monkeypatch):
    """Also where it is 1: it would make them more certain, or the variances are widened."""
    monkeypatch.setattr(held_out_file, "_ENOUGH", 40)  # two folds of 20 rows
    monkeypatch.setattr(temperature_trials_file, "held_out_scale", lambda *_: 1.7)
    data, options = labelled(0.3), {"epochs": 6, "batch_size": 20, "draws": 8}

    def trained(**more):
        return method_named("fitted")(BUILD, data, 3, {**options, **more}, False)

    auto = trained()
    temperature = auto.fit.temperature
    plain, wide = trained(temperature=temperature), trained(widen=2.0)
    assert auto.extra["scale"] == 1.7 and "scale" not in plain.extra and wide.extra["scale"] == 1
    powers = plain.predict(data.x_test).probs ** (1 / 1.7)
    expected = powers / powers.sum(1, keepdim=True)
    torch.testing.assert_close(auto.predict(data.x_test).probs, expected)
    monkeypatch.setattr(temperature_trials_file, "held_out_scale", lambda *_: 0.6)
    assert trained().extra["scale"] == 1


@pytest.mark.slow
def test_the_choice_is_in_the_table_and_in_the_folder(tmp_path):
    table = compare(
        "mlp:4",
        labelled(0.2),
        priors={"gaussian": bmr.Gaussian()},
        routes=["map", "reduced"],
        baselines=(),
        seeds=1,
        settings=replace(SETTINGS, epochs=3),
        out=tmp_path,
        progress=False,
    ).set_index("route")
    folder = tmp_path / "cells" / table.loc["reduced", "cell"]
    settings = json.loads((folder / "settings.json").read_text())
    trials = json.loads((folder / "report.json").read_text())["trials"]
    assert set(trials) == {f"{t:g}" for t in TEMPERATURES} and min(trials.values()) > 0
    chosen = float(min(trials, key=trials.get))
    assert table.loc["reduced", "temperature"] == settings["temperature"] == chosen
    assert table.loc["reduced", "scale"] == settings["scale"] != 1
    assert settings["options"]["temperature"] == "auto" and table.loc["map", "temperature"] == 1
    assert "temperature 0.3: " in (folder / "log.txt").read_text()
