"""The programs behind the results pages load, and the schedule that one of them brings does what
its page says. Their figures are not tested here.
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.experiments.models import load_model

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
    torch.manual_seed(0)
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
