"""Fit, reduce and export as three commands on a saved run, and what becomes of a run whose parts
have changed.
"""

import importlib.util
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import pyro_bmr as bmr
from pyro_bmr.cli.commands import main
from pyro_bmr.experiments import report as reports
from pyro_bmr.experiments import temperature_trials
from pyro_bmr.experiments.runs import load_run, save_run

MODEL = """
import torch
import pyro_bmr as bmr

def build(data, prior):
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(),
    torch.nn.Linear(8, data.outputs))
    return bmr.BayesianNetwork(net, prior, data.likelihood())
"""


def command(*parts):
    """The exit status of a command line, whose words may come in one text."""
    words = (part.split() if isinstance(part, str) else [str(part)] for part in parts)
    return main([word for part in words for word in part])


def own(folder):
    """The options of the model and the data in a folder."""
    return "--model", folder / "model.py", "--data", folder / "data.npz"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with data, a model, and a fitted run."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(5)
    x = rng.normal(size=(120, 3))
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0.5)
    np.savez(folder / "data.npz", x_train=x[:90], y_train=y[:90], x_test=x[90:], y_test=y[90:])
    (folder / "model.py").write_text(MODEL)
    options = ("--epochs 20 --batch-size 15 --draws 4 --quiet", *own(folder))
    assert command("fit", *options, "--seed 3 --prior gaussian:0.7 --out", folder / "run") == 0
    return folder


@pytest.fixture
def run(files, tmp_path):
    """A copy of the fitted run."""
    copy = tmp_path / "run"
    copy.mkdir()
    for path in (files / "run").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_reduction_with_a_window(run, files):
    fitted = bmr.Posterior.load(run / "posterior.safetensors")
    for option, window in (("", False), ("--window", True)):
        assert command("reduce", run, f"--draws 0 {option}") == 0
        saved = bmr.Posterior.load(run / "reduced.safetensors")
        expected = bmr.reduce(fitted, to=bmr.Gaussian(scale=0), window=window)
        assert all(torch.equal(saved.masks[name], mask) for name, mask in expected.masks.items())
        assert json.loads((run / "reduction.json").read_text())["window"] is window
    assert expected.kept < bmr.reduce(fitted, to=bmr.Gaussian(scale=0)).kept


def test_fit_reduce_export(run, files, capsys):
    settings = json.loads((run / "settings.json").read_text())
    assert (settings["seed"], settings["prior"], settings["epochs"], settings["format"]) == (
        3,
        "gaussian:0.7",
        20,
        "pyro_bmr run 1",
    )
    assert sorted(p.name for p in run.iterdir()) == [
        "network.safetensors",
        "posterior.safetensors",
        "settings.json",
    ]

    assert command("reduce", run, "--kept 0.4 --draws 4") == 0
    out = capsys.readouterr().out
    assert "0.weight" in out and re.search(r"kept 0\.\d+, delta_f -?\d+.*accuracy 0\.\d+", out)
    reduction = json.loads((run / "reduction.json").read_text())
    assert (reduction["to"], reduction["per"], reduction["target"]) == (
        "gaussian:0",
        "weight",
        0.4,
    ) and abs(reduction["kept"] - 0.4) < 0.02
    saved = bmr.Posterior.load(run / "reduced.safetensors")
    again = bmr.reduce(
        bmr.Posterior.load(run / "posterior.safetensors"), to=bmr.Gaussian(scale=0), kept=0.4
    )
    assert all(torch.equal(saved.masks[name], mask) for name, mask in again.masks.items())

    out_folder = run.parent / "out"
    assert (
        command(
            "export",
            run,
            "--shrink --format state_dict half --ensemble 3 --seconds 0 --out",
            out_folder,
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "parameters " in out and "ms at batch 128" in out
    report = json.loads((out_folder / "report.json").read_text())
    assert (
        report["settings"]["seed"] == 3
        and report["reduction"]["delta_f"] == reduction["delta_f"]
        and abs(report["kept"] - 0.4) < 0.02
    )
    assert len(load_file(out_folder / "ensemble.safetensors")["0.weight"]) == 3
    net = loaders(out_folder).load()
    data = bmr.load(files / "data.npz")
    dense = bmr.export(load_run(run, reduced=True).program(data), saved)
    with torch.no_grad():
        torch.testing.assert_close(net(data.x_test), dense(data.x_test), rtol=0, atol=1e-5)
    assert report["accuracy"] == pytest.approx(
        float((dense(data.x_test).argmax(1) == data.y_test).double().mean())
    )
    assert float(dense[1].running_mean.abs().max()) > 0.01, (
        "the running statistics of the fit are in the export"
    )

    assert command("export", run, "--unreduced --seconds 0 --out", run.parent / "whole") == 0
    assert json.loads((run.parent / "whole" / "report.json").read_text())["kept"] == 1.0


@pytest.mark.slow
def test_groups_and_natural_gradient_during_the_fit(files, tmp_path, capsys):
    options = ("--epochs 4 --batch-size 15 --draws 4 --quiet", *own(files))
    reductions = "--reduce-to gaussian:0 --per unit --kept 0.5 --stop 0.9"
    rate = "--optimizer natural-gradient --out"
    assert command("fit", *options, reductions, rate, tmp_path / "run") == 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (settings["per"], settings["optimizer"], settings["learning_rate"]) == (
        "unit",
        "natural-gradient",
        0.1,
    )
    masks = bmr.Posterior.load(tmp_path / "run" / "posterior.safetensors").masks
    assert (
        all(bool(row.all()) or not bool(row.any()) for row in masks["0.weight"])
        and 0 < int(masks["0.bias"].sum()) < 8
    )
    assert torch.equal(masks["0.weight"].any(1), masks["0.bias"]), "a unit goes with its bias"
    capsys.readouterr()
    for argv, message in [
        (["fit", *options, "--per", "unit"], "--per unit: .*--reduce-to"),
        (
            ["fit", *options, "--map", "--optimizer", "natural-gradient"],
            r"expected guide=MeanField .*, got Point; .*adam",
        ),
        (
            ["reduce", str(tmp_path / "run"), "--per", "row"],
            "'row': one of 'weight', 'unit', 'channel', 'input', 'head', 'layer'",
        ),
        (["reduce", str(tmp_path / "run"), "--heads", "2"], "heads=2.*per='head'"),
    ]:
        assert (
            command(*argv, *(["--out", str(tmp_path / "other")] if argv[0] == "fit" else [])) == 2
        )
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and re.search(message, err), err


def assert_scaled(folder, settings):
    """The scores of a run are those of the probabilities at its scale, by hand."""
    run = load_run(folder)
    data = run.data()
    probs = bmr.predict(run.program(data), run.posterior, data.x_test, draws=4).probs.double()
    powers = probs ** (1 / settings["scale"])
    right = powers[torch.arange(len(data.y_test)), data.y_test] / powers.sum(1)
    assert settings["nll"] == pytest.approx(-float(right.log().mean()), rel=1e-4)
    assert settings["scale"] == 1.7


def test_an_export_says_the_temperature_that_it_does_not_apply(run, capsys):
    settings = json.loads((run / "settings.json").read_text())
    said = "class probabilities at the temperature"
    for scale in (1.0, None, 1.75):
        (run / "settings.json").write_text(json.dumps({**settings, "scale": scale}))
        assert command("export", run, "--seconds 0 --out", run.parent / "out") == 0
        out = capsys.readouterr().out
        assert (f"{said} 1.75 (scale)" in out) if scale == 1.75 else (said not in out)


def test_a_reduction_is_scored_at_the_scale_of_its_run(run, capsys):
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**settings, "scale": 2.5}))
    assert command("reduce", run, "--threshold inf --draws 4") == 0
    found = load_run(run)
    data = found.data()
    probs = bmr.predict(found.program(data), found.posterior, data.x_test, draws=4, seed=3).probs
    powers = probs.double() ** (1 / 2.5)
    right = powers[torch.arange(len(data.y_test)), data.y_test] / powers.sum(1)
    printed = float(re.search(r"nll ([\d.]+)", capsys.readouterr().out).group(1))
    assert printed == pytest.approx(-float(right.log().mean()), rel=1e-3)


@pytest.mark.slow
def test_a_temperature_by_trials_which_resume(files, tmp_path, monkeypatch):
    monkeypatch.setattr(temperature_trials, "held_out_scale", lambda *_: 1.7)
    run = tmp_path / "run"
    words = ("--epochs 6 --batch-size 15 --draws 4 --resume --out", run, *own(files))
    assert command("fit", *words) == 0
    settings = json.loads((run / "settings.json").read_text())
    trials = settings["trials"]
    assert set(trials) == {"0.1", "0.3"}
    assert settings["temperature"] == float(min(trials, key=trials.get))
    assert_scaled(run, settings)
    for temperature in trials:
        assert list((run / "trials").glob(f"{temperature}*/step-*.safetensors"))
    before = {p: p.stat().st_mtime_ns for p in (run / "trials").rglob("*") if p.is_file()}
    assert command("fit", *words) == 0
    assert json.loads((run / "settings.json").read_text())["trials"] == trials
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert command("fit", *words, "--temperature 0.1 --out", tmp_path / "given") == 0
    given = json.loads((tmp_path / "given" / "settings.json").read_text())
    assert given["temperature"] == 0.1 and given["trials"] == {} and given["scale"] == 1
    assert not (tmp_path / "given" / "trials").exists()


@pytest.mark.slow
def test_a_guide_by_name(files, tmp_path, capsys):
    options = ("--epochs 4 --batch-size 15 --draws 4 --quiet", *own(files))
    assert (
        command(
            "fit",
            *options,
            "--guide low-rank --reduce-to gaussian:0 --kept 0.5 --out",
            tmp_path / "run",
        )
        == 0
    )
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["guide"] == "low-rank"
    site = bmr.Posterior.load(tmp_path / "run" / "posterior.safetensors")["0.weight"]
    assert isinstance(site.joint, bmr.formulas.LowRank) and float(site.joint.factor.abs().max()) > 0
    assert command("reduce", tmp_path / "run", "--kept 0.2 --draws 4") == 0
    capsys.readouterr()
    for words, message in [
        (["--guide", "lowrank"], "no guide 'lowrank'; the guides are: mean-field, "),
        (
            ["--guide", "low-rank", "--optimizer", "natural-gradient"],
            "optimizer 'natural-gradient': expected the guide mean-field, got 'low-rank'",
        ),
        (["--guide", "low-rank", "--map"], "--guide low-rank: --map has no guide"),
    ]:
        assert command("fit", *options, *words, "--out", tmp_path / "other") == 2
        err = capsys.readouterr().err
        assert (
            err.count("\n") == 1 and re.search(message, err) and not (tmp_path / "other").exists()
        ), err


def loaders(folder):
    spec = importlib.util.spec_from_file_location("network", folder / "network.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_new_fit_removes_the_old_reduction(run, files):
    assert command("reduce", run, "--draws 1") == 0
    old = load_run(run)
    data = bmr.load(files / "data.npz")
    fit = bmr.fit(old.program(data), data, epochs=1, progress=False)
    save_run(fit, run, {**old.settings})
    assert (
        not (run / "reduced.safetensors").exists() and load_run(run, reduced=True).reduction == {}
    )


def test_a_program_of_ones_own_exports_its_weights(tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert (
        command(
            "fit --model linear_regression --data diabetes --prior gaussian --epochs 4 --draws 2"
            " --quiet --out",
            folder,
        )
        == 0
    )
    assert command("reduce", folder, "--draws 2") == 0
    assert command("export", folder, "--out", tmp_path / "out") == 0
    weights, posterior = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_run(folder, reduced=True).posterior,
    )
    assert weights and all(
        torch.equal(value, posterior.point()[name])
        for name, value in weights.items()
        if name in posterior.masks
    )
    capsys.readouterr()
    assert command("export", folder, "--shrink --out", tmp_path / "no") == 2
    err = capsys.readouterr().err
    assert "no network" in err and err.count("\n") == 1 and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_one_fit_has_one_score_in_the_units_of_the_target(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reports, "draw", lambda *args: [])
    options = "--data diabetes --model mlp:3 --epochs 1 --draws 3 --quiet"
    assert command("fit", options, "--prior gaussian --seed 1 --out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    compared = "--priors gaussian --routes fitted --baselines --seeds 2 --jobs 1 --out"
    assert command("compare", options, compared, tmp_path / "compared") == 0
    row = pd.read_csv(tmp_path / "compared" / "results.csv").iloc[1]
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert row["seed"] == settings["seed"] == 1 and 20 < row["rmse"] < 300 and 4 < row["nll"] < 9
    assert settings["rmse"] == pytest.approx(row["rmse"], rel=1e-5) and settings[
        "nll"
    ] == pytest.approx(row["nll"], rel=1e-5)
    assert f"rmse {row['rmse']:.4g}, nll {row['nll']:.4g}, crps {row['crps']:.4g}, coverage" in said
    assert "(rmse and nll in the units of the target)" in said
    assert command("reduce", tmp_path / "run", "--threshold inf --draws 3") == 0
    assert f"rmse {row['rmse']:.4g}, nll {row['nll']:.4g}, crps" in capsys.readouterr().out
    assert command("export", tmp_path / "run", "--seconds 0 --out", tmp_path / "out") == 0
    report, data = json.loads((tmp_path / "out" / "report.json").read_text()), bmr.load("diabetes")
    with torch.no_grad():
        outputs = (
            loaders(tmp_path / "out").load()(data.x_test)[:, 0] * report["target"]["scale"]
            + report["target"]["mean"]
        )
    y = data.y_test * data.target_scale + data.target_mean
    assert float(y.min()) >= 25 and report["rmse"] == pytest.approx(
        float((outputs - y).square().mean().sqrt()), rel=1e-5
    )


def change(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new))


DAMAGE = {
    "no run": (
        lambda run: (run / "settings.json").unlink(),
        "is no run of pyro-bmr fit: settings.json",
    ),
    "another file": (
        lambda run: (run / "settings.json").write_text("[]"),
        "is no run of pyro-bmr fit",
    ),
    "truncated posterior": (
        lambda run: (run / "posterior.safetensors").write_bytes(
            (run / "posterior.safetensors").read_bytes()[:-8]
        ),
        "not a readable",
    ),
    "truncated network": (
        lambda run: (run / "network.safetensors").write_bytes(
            (run / "network.safetensors").read_bytes()[:50]
        ),
        "is damaged",
    ),
    "changed model": (
        lambda run: change(run / "settings.json", b'"model_sha256": "', b'"model_sha256": "0'),
        "has changed since the fit",
    ),
    "network of another size": (
        lambda run: change(run / "network.safetensors", b"[8,3]", b"[3,8]"),
        "network.safetensors': expected the SHA-256 in settings.json, got another",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_run_that_is_no_more_what_it_was(run, capsys, damage, message):
    damage(run)
    assert command("export", run, "--seconds 0 --out", run.parent / "out") == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (run.parent / "out").exists()


ERRORS = {
    "no such run": (["reduce", "nowhere"], "'nowhere' is no run"),
    "unknown per": (["reduce", "RUN", "--per", "galaxy"], "per='galaxy'"),
    "unknown format": (["export", "RUN", "--format", "zip"], "no format 'zip'; the formats are"),
    "kept without reductions": (
        ["fit", "--kept", "0.1", "--epochs", "1"],
        "--kept 0.1.*--reduce-to",
    ),
    "unknown prior": (["reduce", "RUN", "--to", "normal"], "no prior 'normal'"),
    "threads": (["export", "RUN", "--threads", "0"], "--threads: expected at least 1, got 0"),
}


@pytest.mark.parametrize(("argv", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(run, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(run) if part == "RUN" else part for part in argv]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1 and err.startswith("pyro-bmr: ")


def test_what_may_mislead_is_a_line_on_the_screen_and_in_the_files(run, tmp_path, capsys):
    """A twentieth of the weights: hidden layer empty, accuracy down on the test rows."""
    assert command("reduce", run, "--kept 0.05 --per unit --draws 4") == 0
    lines = capsys.readouterr().err.splitlines()
    assert (
        all(line.startswith("pyro-bmr: warning: ") for line in lines)
        and len(lines) == len(set(lines)) == 2
    )
    assert "layer collapse: no unit is kept in layer '0.weight' (0 of 8)" in lines[0]
    assert re.search(r"test data: the error rate rises from 0\.\d+ to 0\.\d+ on 30 rows", lines[1])
    assert json.loads((run / "reduction.json").read_text())["warnings"] == [
        lines[0].removeprefix("pyro-bmr: warning: ")
    ]

    assert command("export", run, "--seconds 0.001 --out", tmp_path / "out") == 0
    lines = capsys.readouterr().err.splitlines()
    said = json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]
    assert any("error rate rises" in line for line in lines) and any(
        "layer collapse" in line for line in lines
    )
    assert any("error rate rises" in line for line in said) and any(
        "'0.weight' (0 of 8)" in line for line in said
    )

    assert command("reduce", run, "--kept 1 --draws 4") == 0
    assert command("export", run, "--seconds 0.001 --out", tmp_path / "out") == 0
    assert (
        capsys.readouterr().err == ""
        and json.loads((tmp_path / "out" / "report.json").read_text())["warnings"] == []
    )
