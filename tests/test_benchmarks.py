"""The programs behind the results pages load, and the schedule that one of them brings does what
its page says. Their figures are not tested here.
"""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.experiments.models import load_model
from tests.parameters import others_slow

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


def load(name):
    # the second for what one of them takes from another
    for folder in (str(ROOT), str(ROOT / "benchmarks")):
        if folder not in sys.path:
            sys.path.append(folder)
    return importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_it_loads_and_says_how_it_is_run(path):
    try:
        module = load(path.stem)
    except ModuleNotFoundError as error:
        if error.name != "rdata":
            raise
        pytest.skip("rdata, which reads the data of this benchmark, is not installed")
    assert callable(module.main) and f"benchmarks/{path.name}" in module.__doc__


@pytest.mark.filterwarnings("ignore:ΔF.*parameters > rows")
@pytest.mark.parametrize("size", [None, 0.4])
def test_structured_pruning_takes_units_first_and_then_weights(size):
    structured = load("structured_pruning")
    data = bmr.load("digits")
    torch.manual_seed(4)
    program = load_model("mlp:20-12")(data, bmr.Gaussian())
    chain = (("1", "3", 1), ("3", "5", 1))
    schedule = structured.EveryUnit(1, kept=0.3, start=0.2, stop=1.0, chain=chain, size=size)
    fit = bmr.fit(program, data, epochs=8, temperature=0.1, reduce=schedule, progress=False)
    assert fit.history["kept"].iloc[-1] == pytest.approx(0.3, abs=0.01)
    left = {}
    for layer, reader, _ in chain:
        alive = fit.masks[f"{layer}.weight"].any(1)
        assert (
            not fit.masks[f"{reader}.weight"][:, ~alive].any()
            and not fit.masks[f"{layer}.bias"][~alive].any()
        )
        left[layer] = int(alive.sum())
    if size is not None:
        parameters = 65 * left["1"] + (left["1"] + 1) * left["3"] + (left["3"] + 1) * 10
        assert parameters <= size * sum(p.numel() for p in program.net.parameters())
    assert fit.history["delta_f"].iloc[-1] != 0


def test_the_study_keeps_rows_of_declared_cells(tmp_path):
    study = load("study")
    cells = [SimpleNamespace(slug=slug, label=slug.upper()) for slug in ("a", "b", "c")]
    before = pd.DataFrame(
        {
            "method": ["renamed", "gone"],
            "cell": ["c", "gone"],
            "nll": [0.3, 0.9],
            "commit": ["1111111", "0000000"],
        }
    )
    (tmp_path / "cells" / "b").mkdir(parents=True)
    (tmp_path / "cells" / "b" / "settings.json").write_text('{"versions": {"commit": "2222222"}}')
    table = study.with_those_before(
        SimpleNamespace(cells=cells),
        before,
        pd.DataFrame({"method": ["B"], "cell": ["b"], "nll": [0.2]}),
        tmp_path,
    )
    assert table.to_dict("list") == {
        "method": ["B", "C"],
        "cell": ["b", "c"],
        "nll": [0.2, 0.3],
        "commit": ["2222222", "1111111"],
    }
    assert study.with_those_before(
        SimpleNamespace(cells=cells), before[["cell"]][:0], pd.DataFrame(), tmp_path
    ).empty


def test_moved_digits_are_one_pixel_off():
    images = np.arange(1, 2 * 12 + 1).reshape(2, 1, 3, 4)
    five = load("moved_mnist").moved(images).reshape(5, 2, 3, 4)
    left, right, up, down = five[1:, 1]
    assert np.array_equal(five[0], images[:, 0])
    assert np.array_equal(left[0], [14, 15, 16, 0]) and np.array_equal(right[0], [0, 13, 14, 15])
    assert np.array_equal(up[:, 0], [17, 21, 0]) and np.array_equal(down[:, 0], [0, 13, 17])


def test_grey_values_of_standardised_images():
    raw = np.array([[0, 255], [7, 128]], dtype=np.uint8)
    assert np.array_equal(load("moved_mnist").grey((raw.astype(np.float32) - 33.3) / 78.6), raw)


def on_cpu(tmp_path, part):
    """What the script for a GPU finds at small sizes on the CPU."""
    kept = tmp_path / "gpu.json"
    load("gpu").main(["--device", "cpu", "--small", "--only", part, "--json", str(kept)])
    return json.loads(kept.read_text())[part]


@pytest.mark.slow
def test_the_gpu_script_tells_other_answers_from_equal_ones(tmp_path, monkeypatch):
    found = on_cpu(tmp_path, "equality")
    assert found.pop("equal to 1e-9") is True and set(found.values()) == {0.0}
    gpu = load("gpu")
    right, calls = gpu._answers, []

    def wrong(device):
        answers = right(device)
        if calls:
            answers["gradient of means"][3] *= 1 + 1e-5
            answers["gradient of means"][3] += 1e-5
        calls.append(device)
        return answers

    monkeypatch.setattr(gpu, "_answers", wrong)
    found = gpu.equality(torch.device("cpu"), True, 1.0)
    assert not found["equal to 1e-9"] and found["gradient of means"] > 1e-9 and not found["KL"]


def test_the_gpu_script_has_reductions_over_a_copy(tmp_path):
    found = on_cpu(tmp_path, "reductions")
    copied = found["copy of mean and variance"]["seconds"]
    assert found["bandwidth, GB/s"] == pytest.approx(16e-9 * found["weights"] / copied)
    for name in ("reduce to Gaussian(0)", "reduce to SpikeAndSlab()"):
        assert found[name]["over a copy"] == pytest.approx(found[name]["seconds"] / copied)


def test_the_gpu_script_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        load("gpu").main([])
    assert "expected a GPU that torch can use, got none" in capsys.readouterr().err


def test_the_parts_of_the_gpu_script_take_less_than_eight_minutes():
    assert sum(limit for _, limit in load("gpu").PARTS.values()) < 8 * 60


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit has not converged", "ignore:There is a performance")
@pytest.mark.parametrize("part", ["steps", "waits", "transformer"])
def test_the_gpu_script_runs_its_other_parts(tmp_path, part):
    found = on_cpu(tmp_path, part)
    if part == "steps":
        assert list(found) == ["784-300-100-10, batch 8", "LeNet-5, batch 8"]
        for case in found.values():
            assert case["over plain"]["plain training, fused Adam"] == 1
            assert len(case["ms"]) + len(case["left out"]) == len(load("gpu").CONTENDERS)
    elif part == "transformer":
        assert found["rows"] == 128 and 0 < found["nll"] < 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_computes_what_the_cpu_does():
    found = load("gpu").equality(torch.device("cuda"), False, 20)
    assert found["equal to 1e-9"], found


def test_networks_of_the_gpu_script_have_their_sizes():
    """Those of He et al. for CIFAR-10, but that a skip has offsets and no norm; of LeCun et al."""
    networks = load("gpu").NETWORKS
    sizes = {n: sum(p.numel() for p in build().parameters()) for n, (build, _) in networks.items()}
    assert sizes["ResNet-18"] == 11_173_962 - (128 + 256 + 512) and sizes["LeNet-5"] == 61_706
    assert sizes["784-300-100-10"] == 266_610


@pytest.mark.parametrize(
    ("prior", "route"),
    others_slow(
        [("gaussian:layer", "reduced"), ("horseshoe", "fitted"), ("spike-and-slab", "fitted")],
        ("gaussian:layer", "reduced"),
    ),
)
def test_a_regression_fitted_with_others_is_that_fitted_alone(prior, route):
    """One row has the posterior of the fit by the route, draw for draw, pruned entries included; a
    row beside another differs by the draws alone.
    """
    from pyro_bmr.experiments.recipe import fit_by_route
    from pyro_bmr.experiments.settings import Settings

    columns = load("kept_columns")
    data, settings = columns.table_of("three", 60, 4, 0)[0], Settings(epochs=40)
    alone = columns.fit_at_once([data], [prior], route, 3, settings)[0]
    build, declared = load_model("linear_regression"), columns.PRIORS[prior]
    routed = fit_by_route(build, data, declared, route, 3, settings, progress=False).fit.posterior
    assert set(alone) == set(routed)
    for name, site in routed.sites.items():
        torch.testing.assert_close(alone[name].mean, site.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[name].var, site.var, rtol=1e-4, atol=1e-7)
        assert torch.equal(alone[name].kept, site.kept)
    if route == "reduced":
        assert not routed["w"].kept.all()
    else:
        other = columns.table_of("three", 60, 4, 1)[0]
        beside = columns.fit_at_once([data, other], [prior] * 2, route, 3, settings)[0]["w"]
        assert ((beside.mean - routed["w"].mean).abs() < 4 * routed["w"].var.sqrt()).all()
