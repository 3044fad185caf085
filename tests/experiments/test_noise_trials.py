"""The temperature and the noise of real targets that trials choose: the same fits and scores by
hand, what a fit sees of both, where they are written, and when there is no trial.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.cli.commands import main
from pyro_bmr.data.data_set import Data, validation_data
from pyro_bmr.experiments import held_out as held_out_file
from pyro_bmr.experiments import noise_trials as noise_trials_file
from pyro_bmr.experiments import recipe
from pyro_bmr.experiments.held_out import Trials, with_noise
from pyro_bmr.experiments.models import load_model
from pyro_bmr.experiments.noise_trials import (
    TEMPERATURES,
    best_noise,
    noise_is_free,
    noise_trials,
)
from pyro_bmr.experiments.recipe import for_route
from pyro_bmr.experiments.runs import load_run
from pyro_bmr.experiments.settings import Settings

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*the reduction after the fit", "ignore:.* is a sum over"
)
BUILD = load_model("mlp:20")
SETTINGS = Settings(epochs=24, batch_size=20, draws=8)


def waves(outputs: int = 0) -> Data:
    """120 training rows of a curve with a noise of 0.2, of standard deviation near 1."""
    draws = torch.Generator().manual_seed(11)
    x = torch.randn(200, 3, generator=draws)
    shape = (200, outputs) if outputs else (200,)
    y = 1.3 * (2 * x[:, 0]).sin() + 0.5 * x[:, 1]
    y = (y[:, None] if outputs else y) + 0.2 * torch.randn(shape, generator=draws)
    return Data("waves", x[:120], y[:120], x[120:], y[120:], None)


def by_route(data, settings, route="fitted", build=BUILD):
    return recipe.fit_by_route(build, data, bmr.Gaussian("layer"), route, 3, settings, False)


def fit_by_hand(rows, likelihood, temperature, epochs):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        program = BUILD(rows, bmr.Gaussian("layer"))
    program.likelihood = likelihood
    return bmr.fit(
        program,
        (rows.x_train, rows.y_train),
        epochs=epochs,
        batch_size=20,
        optimizer=bmr.natural_gradient(),
        temperature=temperature,
        seed=3,
        progress=False,
    )


def mixture_nll(locs, scales, y):
    """−log 1/S Σ N(y; f, σ²), nats per row, written out."""
    squares = ((y - locs.double()) / scales) ** 2
    log_p = -0.5 * squares - torch.as_tensor(scales).log() - 0.5 * math.log(2 * math.pi)
    return -float((log_p.logsumexp(0) - math.log(len(locs))).mean())


def by_hand(data, likelihood, temperature, folds):
    """Draws of the function, and of the noise, and the targets, of the held-out rows of the folds,
    after a third of a fit of 24 epochs.
    """
    locs, scales, targets = [], [], []
    for fold in range(folds):
        rows = validation_data(data, 1 / 6, fold)
        fit = fit_by_hand(rows, likelihood, temperature, 8)
        drawn = bmr.predict(fit.program, fit.posterior, rows.x_test, draws=8, seed=3)
        locs.append(drawn.locs.double())
        scales.append(drawn.scales.double())
        targets.append(rows.y_test.double())
    return torch.cat(locs, 1), torch.cat(scales, 1), torch.cat(targets)


def on_a_grid(locs, y):
    """(NLL, σ) of the best of 401 noises, 1.2 % apart."""
    grid = torch.logspace(-1.5, 0.5, 401, dtype=torch.float64).tolist()
    return min((mixture_nll(locs, sigma, y), sigma) for sigma in grid)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit has not converged")
def test_the_trials_are_those_written_by_hand(monkeypatch):
    monkeypatch.setattr(held_out_file, "_ENOUGH", 40)  # two folds of 20 rows
    monkeypatch.setattr(noise_trials_file, "TEMPERATURES", (0.2, 0.1))
    data = waves()
    found = by_route(data, SETTINGS)
    locs, scales, y = by_hand(data, bmr.Normal(), 1.0, 2)
    expected = {1.0: mixture_nll(locs, scales, y)}
    noise = {1.0: on_a_grid(locs, y)[1]}
    for temperature in (0.2, 0.1):
        locs, _, y = by_hand(data, bmr.Normal(noise=noise[1.0]), temperature, 2)
        expected[temperature], noise[temperature] = on_a_grid(locs, y)
    assert found.trials.nll == pytest.approx(expected, rel=2e-3)
    best = min(expected, key=expected.get)
    assert best < 1 and expected[1.0] > expected[best] + 0.1
    assert found.trials.noise == pytest.approx(noise[best], rel=0.01)
    assert found.trials.temperature == pytest.approx(
        best * (noise[1.0] / noise[best]) ** 2, rel=0.03
    )
    assert found.fit.temperature == found.trials.temperature
    assert found.fit.program.likelihood == bmr.Normal(noise=found.trials.noise)
    whole = fit_by_hand(data, found.fit.program.likelihood, found.trials.temperature, 24)
    for name, site in whole.posterior.sites.items():
        assert torch.equal(site.mean, found.posterior.sites[name].mean)
    assert "noise" not in found.posterior.sites


@pytest.mark.slow
@pytest.mark.parametrize("temperature, noise", [(0.2, 0.6), (0.2 * 0.6**2 / 0.3**2, 0.3)])
def test_a_fit_sees_the_product_of_temperature_and_squared_noise_alone(temperature, noise):
    """Of a linear network with a prior N(0, 1): mean (XᵀX/v + 1)⁻¹ Xᵀy/v, v = Tσ², and of mean
    field the inverse of the diagonal.
    """
    data, variance = waves(), 0.2 * 0.6**2
    program = bmr.BayesianNetwork(
        torch.nn.Linear(3, 1, bias=False), bmr.Gaussian(1.0), bmr.Normal(noise=noise)
    )
    rows = (data.x_train, data.y_train)
    fit = bmr.fit(
        program,
        rows,
        epochs=1000,
        batch_size=120,
        optimizer=bmr.natural_gradient(),
        temperature=temperature,
        progress=False,
    )
    x, y = (t.double() for t in rows)
    precision = x.T @ x / variance + torch.eye(3)
    mean = torch.linalg.solve(precision, x.T @ y / variance)
    site = fit.posterior["weight"]
    deviations = precision.diagonal() ** -0.5
    assert ((site.mean[0].double() - mean).abs() < 0.2 * deviations).all()
    torch.testing.assert_close(site.var[0].double(), deviations**2, rtol=0.1, atol=0)


@pytest.mark.parametrize("far", [1.0, 1e4, 1e-4])
def test_the_best_noise_has_no_better_neighbour(far):
    draws = torch.Generator().manual_seed(2)
    y = far * torch.randn(50, generator=draws)
    locs = y + far * 0.3 * torch.randn(6, 50, generator=draws)
    y[7] = torch.nan
    held = [
        (bmr.prediction.RealPrediction(part, torch.ones_like(part), missing=True), target)
        for part, target in ((locs[:, :20], y[:20]), (locs[:, 20:], y[20:]))
    ]
    found = best_noise(held)
    known = ~y.isnan()
    best = mixture_nll(locs[:, known], found, y[known])
    assert all(mixture_nll(locs[:, known], found * c, y[known]) > best for c in (0.99, 1.01))


@pytest.mark.slow
def test_a_temperature_of_1_with_the_best_score_is_chosen_and_has_no_noise(monkeypatch):
    monkeypatch.setattr(held_out_file, "_ENOUGH", 20)
    seen = []

    def attempt(rows, settings, length, fold):
        """Below 1 it is fitted to targets of the other sign."""
        seen.append((settings.temperature, rows.likelihood()))
        y = rows.y_train if settings.temperature == 1 else -5 * rows.y_train
        fit = fit_by_hand(replace(rows, y_train=y), rows.likelihood(), settings.temperature, 20)
        return fit.program, fit.posterior

    found = noise_trials(attempt, waves(), SETTINGS, 0, False)
    assert found == Trials(1.0, found.nll, 1.0, None)
    assert min(found.nll, key=found.nll.get) == 1
    assert [temperature for temperature, _ in seen] == [1.0, *TEMPERATURES]
    assert seen[0][1] == bmr.Normal()
    assert len({likelihood for _, likelihood in seen[1:]}) == 1 and seen[1][1].noise > 0


def own_noise(data, prior):
    """A model whose noise nobody can give."""
    program = BUILD(data, prior)
    program.likelihood = bmr.Normal()
    return program


@pytest.mark.parametrize(
    "build, likelihood, free",
    [
        (BUILD, None, True),
        (BUILD, bmr.Normal(0.5), True),
        (BUILD, bmr.Normal(missing="ignore"), True),
        (BUILD, bmr.Normal(noise=0.3), False),
        (BUILD, bmr.Normal(noise="per output"), False),
        (own_noise, None, False),
        (load_model("linear_regression"), None, False),
    ],
)
def test_which_noise_can_be_given(build, likelihood, free):
    data = replace(waves(), family=likelihood)
    assert noise_is_free(lambda rows: build(rows, bmr.Gaussian()), data) == free
    tried = {
        for_route(Settings(), route, data, build(data, bmr.Gaussian())).temperature
        for route in ("fitted", "reduced")
    }
    assert tried == {"auto"} if free or build is own_noise else tried == {1.0}
    assert for_route(Settings(), "map", data, build(data, bmr.Gaussian())).temperature == 1
    if not free:
        found = by_route(data, replace(SETTINGS, epochs=1), build=build)
        assert found.fit.temperature == 1 and found.trials == Trials(1.0, {}, 1.0)


def test_several_targets_and_missing_ones(monkeypatch):
    """They have one noise; rows are scored by the sum over their known targets."""
    monkeypatch.setattr(held_out_file, "_ENOUGH", 20)
    monkeypatch.setattr(noise_trials_file, "TEMPERATURES", (0.1,))
    data = waves(outputs=2)
    y = data.y_train.clone()
    y[::3, 0] = torch.nan
    data = replace(data, y_train=y, family=bmr.Normal(missing="ignore"))
    found = by_route(data, replace(SETTINGS, epochs=9))
    assert found.trials.noise is None or 0.05 < found.trials.noise < 3
    fixed = with_noise(data, 0.25).likelihood()
    assert fixed == bmr.Normal(noise=0.25, missing="ignore")


def test_real_predictions_alone_are_tried():
    def attempt(rows, settings, length, fold):
        labels = replace(rows, y_train=(rows.y_train > 0).long(), classes=2)
        fit = bmr.fit(
            BUILD(labels, bmr.Gaussian()),
            (labels.x_train, labels.y_train),
            epochs=1,
            progress=False,
        )
        return fit.program, fit.posterior

    with pytest.raises(bmr.errors.ModelError, match="expected real predictions, got ClassPred"):
        noise_trials(attempt, waves(), replace(SETTINGS, epochs=1), 0, False)


@pytest.mark.slow
def test_the_noise_is_in_the_table_and_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out_file, "_ENOUGH", 20)
    data = waves()
    parts = {n: getattr(data, n).numpy() for n in ("x_train", "y_train", "x_test", "y_test")}
    np.savez(tmp_path / "waves.npz", **parts)
    words = f"--data {tmp_path}/waves.npz --model mlp:8 --priors gaussian --routes reduced"
    words += f" --baselines --seeds 1 --epochs 9 --draws 8 --quiet --out {tmp_path}/out"
    assert main(["compare", *words.split()]) == 0
    row = pd.read_csv(tmp_path / "out" / "results.csv").iloc[0]
    run = load_run(tmp_path / "out" / "cells" / row["cell"])
    settings = json.loads((run.folder / "settings.json").read_text())
    assert settings["options"]["temperature"] == "auto"
    assert row["temperature"] == pytest.approx(settings["temperature"]) and row["temperature"] < 1
    assert row["noise"] == pytest.approx(settings["noise"]) and row["noise"] > 0
    trials = json.loads((run.folder / "report.json").read_text())["trials"]
    assert list(trials) == ["1", *(f"{t:g}" for t in TEMPERATURES)]
    loaded = run.data()
    program = run.program(loaded)
    assert program.likelihood == bmr.Normal(noise=settings["noise"])
    posterior = bmr.Posterior.load(run.folder / "reduced.safetensors")
    drawn = bmr.predict(program, posterior, loaded.x_test, draws=8, seed=0)
    unit = math.log(float(loaded.target_scale))
    assert row["nll"] == pytest.approx(unit - float(drawn.log_prob(loaded.y_test).mean()), abs=1e-4)


@pytest.mark.parametrize("rows, known", [(3, True), (40, False)])
def test_without_a_known_held_out_target_the_temperature_is_1(rows, known):
    data = waves()
    data = replace(data, x_train=data.x_train[:rows], y_train=data.y_train[:rows])
    if not known:
        validation = {"x_val": data.x_test[:5], "y_val": torch.full((5,), torch.nan)}
        data = replace(data, family=bmr.Normal(missing="ignore"), **validation)
    found = by_route(data, replace(SETTINGS, epochs=3))
    assert found.trials == Trials(1.0, {}, 1.0) and found.fit.temperature == 1
