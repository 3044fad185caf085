"""`pyro-bmr prune`: what it writes, and its errors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyro_bmr as bmr
from pyro_bmr.cli.commands import main
from pyro_bmr.models import mlp


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A trained network on the digits, as a file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = bmr.load("digits")
        net = mlp.build(data, bmr.Gaussian(), "30").net
        adam = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(100):
            adam.zero_grad()
            torch.nn.functional.cross_entropy(net(data.x_train), data.y_train).backward()
            adam.step()
    path = tmp_path_factory.mktemp("trained") / "net.safetensors"
    save_file(net.state_dict(), path)
    return path


def run(weights, out, *more):
    common = ["prune", "--model", "mlp:30", "--weights", str(weights), "--out", str(out)]
    return main([*common, "--rows", "500", "--seconds", "0.01", "--quiet", *more])


def test_it_writes_a_network_with_zeros(weights, tmp_path, capsys):
    assert run(weights, tmp_path, "--kept", "0.2") == 0
    printed = capsys.readouterr().out
    state, report = (
        load_file(tmp_path / "model.safetensors"),
        json.loads((tmp_path / "report.json").read_text()),
    )
    zeros = sum(int((state[name] == 0).sum()) for name in ("1.weight", "3.weight"))
    assert zeros == pytest.approx(0.8 * (64 * 30 + 300), abs=2)
    net = mlp.build(data := bmr.load("digits"), bmr.Gaussian(), "30").net
    net.load_state_dict(state)
    accuracy = float((net(data.x_test).argmax(1) == data.y_test).double().mean())
    assert report["accuracy"] == pytest.approx(accuracy) and accuracy > 0.8
    assert f"{report['before']['accuracy']:.4g} before, {accuracy:.4g} after" in printed
    assert "1.weight" in printed and report["kept"] == pytest.approx(0.2, abs=1e-3)
    saved = bmr.Reduction.load(tmp_path / "reduction")
    assert torch.equal(saved.posterior["1.weight"].mean, state["1.weight"])


@pytest.mark.slow
def test_units_and_patterns(weights, tmp_path):
    assert run(weights, tmp_path / "a", "--kept", "0.6", "--per", "unit", "--shrink") == 0
    assert load_file(tmp_path / "a" / "model.safetensors")["1.weight"].shape[0] < 30
    assert run(weights, tmp_path / "c", "--kept", "0.6", "--per", "reader", "--shrink") == 0
    assert load_file(tmp_path / "c" / "model.safetensors")["3.weight"].shape == (10, 18)
    assert run(weights, tmp_path / "b", "--kept", "2:4", "--corrections", "0") == 0
    kept = load_file(tmp_path / "b" / "model.safetensors")["1.weight"] != 0
    assert bool((kept.unflatten(1, (-1, 4)).sum(-1) == 2).all())


@pytest.mark.slow
def test_a_regression_takes_its_noise_from_the_training_rows(tmp_path):
    torch.manual_seed(0)
    data = bmr.load("diabetes")
    net = mlp.build(data, bmr.Gaussian(), "8").net
    adam = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(100):
        adam.zero_grad()
        (net(data.x_train)[:, 0] - data.y_train).square().mean().backward()
        adam.step()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    common = ["prune", "--model", "mlp:8", "--data", "diabetes", "--kept", "0.5", "--quiet"]
    files = ["--weights", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "out")]
    assert main([*common, *files]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rmse"] < 1.05 * report["before"]["rmse"]
    assert report["kept"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kept", "much"], "--kept much: expected a fraction"),
        (["--kept", "2"], "kept=2.0: expected a fraction"),
        (["--kept", "0.5", "--model", "mlp:20"], "does not fit the model"),
    ],
)
def test_errors_are_one_line(weights, tmp_path, capsys, more, message):
    assert run(weights, tmp_path, *more) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
