"""Where a model computes: names that are refused, cells of their own, and the same numbers on a GPU
where there is one.
"""

import pandas as pd
import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.baselines.training import outputs_of
from pyro_bmr.cli.commands import main
from pyro_bmr.experiments.compare import comparison
from pyro_bmr.experiments.declaration import declare
from pyro_bmr.experiments.models import cell_device, load_model, on_device
from pyro_bmr.experiments.settings import Settings

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def elsewhere(monkeypatch):
    """Lets a device that is not here pass for one that is; modules stay where they are."""

    def pretend(name):
        device = torch.device(name)
        monkeypatch.setattr("pyro_bmr.experiments.models.device_named", lambda name: device)
        monkeypatch.setattr(nn.Module, "to", lambda self, *where: self)

    return pretend


@pytest.mark.parametrize(
    "name", ["meta", "gpu", "cpu:x", "", 3, *([] if torch.cuda.is_available() else ["cuda"])]
)
def test_a_device_without_values_is_refused_by_name(name):
    with pytest.raises(bmr.errors.ModelError, match=r"^device .*: expected cpu, or a device"):
        cell_device(name)


@pytest.mark.parametrize("command", ["compare", "fit", "study"])
def test_the_command_line_says_so_before_any_work(command, tmp_path, capsys):
    study = tmp_path / "study.toml"
    study.write_text(
        'name = "n"\ndata = ["digits"]\nmodels = ["mlp:4"]\n'
        '[[method]]\nname = "p"\nmethod = "plain"\n'
    )
    out = tmp_path / "out"
    words = [str(study)] if command == "study" else ["--data", "digits", "--model", "mlp:4"]
    assert main([command, *words, "--device", "meta", "--out", str(out), "--quiet"]) == 2
    assert "device 'meta': expected cpu" in capsys.readouterr().err and not out.exists()


def test_a_program_is_moved_with_the_start_weights_of_the_cpu(monkeypatch, elsewhere):
    data, moved = bmr.load("digits"), []
    to = nn.Module.to
    monkeypatch.setattr(
        nn.Module, "to", lambda self, *where: moved.append(where) or to(self, *where)
    )
    for build in (load_model("mlp:5"), on_device(load_model("mlp:5"), "cpu")):
        torch.manual_seed(4)
        program = build(data, bmr.Gaussian())
        moved.append(program.net.state_dict())
    first, where, second = moved
    assert where == (torch.device("cpu"),)
    assert all(torch.equal(first[name], second[name]) for name in first)
    by_hand = on_device(lambda data, prior: "a program", "cpu")
    assert by_hand(data, bmr.Gaussian()) == "a program"
    elsewhere("cuda")
    by_hand = on_device(lambda data, prior: "a program", "cuda")
    with pytest.raises(bmr.errors.ModelError, match=r"device 'cuda': .* module, got str"):
        by_hand(data, bmr.Gaussian())


def test_several_processes_do_not_share_a_gpu(elsewhere, tmp_path, capsys, monkeypatch):
    elsewhere("cuda")
    words = ["fit", "--data", "digits", "--model", "mlp:4", "--device", "cuda"]
    words += ["--out", str(tmp_path / "out"), "--quiet"]
    assert main([*words, "--shard"]) == 2
    assert "expected one process and no --shard, got 1" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2 and "got 2 processes" in capsys.readouterr().err


def test_cells_of_another_device_have_folders_of_their_own(elsewhere):
    data, settings = bmr.load("digits"), Settings()
    given = "mlp:5", data, None, ["reduced"], 1, settings
    usual = comparison(*given).cells
    assert [c.slug for c in comparison(*given, device="cpu").cells] == [c.slug for c in usual]
    method = {"name": "p", "method": "plain"}
    study = {"name": "n", "data": ["digits"], "models": ["mlp:4"], "method": [method]}
    assert declare(study).command.endswith("--out .")
    elsewhere("cuda:1")
    cells = comparison(*given, device="cuda:1").cells
    slugs = {cell.slug for cell in cells}
    assert declare(study, device="cuda:1").command.endswith("--out . --device cuda:1")
    assert {cell.device for cell in cells} == {"cuda:1"} and not slugs & {c.slug for c in usual}
    assert {cell.size_of for cell in cells if cell.size_of} <= slugs


@GPU
def test_a_comparison_on_a_gpu_has_the_scores_of_the_cpu(tmp_path):
    data = bmr.load("digits")
    tables = [
        bmr.compare(
            "mlp:20", data, priors={"gaussian:layer": bmr.Gaussian("layer")}, seeds=1,
            settings=Settings(epochs=5), out=tmp_path / device, device=device,
            progress=False,
        )
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    for name in ("accuracy", "nll", "kept", "size"):
        pd.testing.assert_series_equal(tables[0][name], tables[1][name], atol=0.1, rtol=0)
    net = nn.Linear(64, 3).cuda()
    assert outputs_of(net, data.x_test).device == data.x_test.device
