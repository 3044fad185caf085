"""`compare`: the columns that its docstring promises, what is on disk, cells that are not run twice
and fail alone, and scores against `predict` by hand.
"""

import html
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import pyro_bmr as bmr
from pyro_bmr.cli.commands import main
from pyro_bmr.experiments import measures, pictures, plots, recipe, report
from pyro_bmr.experiments.compare import compare, comparison, summary
from pyro_bmr.experiments.conclusions import conclusions
from pyro_bmr.experiments.models import load_model, model_names
from pyro_bmr.experiments.runs import load_run
from pyro_bmr.experiments.settings import ROUTES, Settings
from tests.parameters import others_slow

matplotlib.use("Agg")
torch.set_num_threads(1)
# fits of two epochs, with more weights than rows
pytestmark = pytest.mark.filterwarnings("ignore:.*the reduction after the fit")

COLUMNS = (
    "model data prior route seed temperature {0} nll brier ece ece_mass nll_error base_{0} base_nll"
    " parameters kept_parameters kept size elbo delta_f seconds converged step_ratio"
)
CLASSES = COLUMNS.format("accuracy").split()
REALS = COLUMNS.format("rmse").replace("ece ", "ece crps coverage ", 1).split()
OF_BASELINES = ["scale", "best_epoch"]
ON_DISK = ["kilobytes", "cell"]
PRIORS = ("gaussian", "horseshoe", "spike-and-slab")
ROWS = [(p, r) for p in PRIORS for r in ROUTES] + [("none", "plain"), ("none", "magnitude")]
FAMILIES = {
    "gaussian": bmr.Gaussian(),
    "horseshoe": bmr.Horseshoe(),
    "spike-and-slab": bmr.SpikeAndSlab(),
}
QUICK = Settings(
    epochs=2,
    batch_size=40,
    learning_rate=1e-2,
    temperature=1.0,
    reduce_every=0.5,
    start=0.5,
    stop=1.0,
    draws=4,
    optimizer="adam",
)
GIVEN = {"priors": FAMILIES, "seeds": 2, "settings": QUICK, "progress": False}
# pictures that no other test of the fast suite draws
DRAWN = ("delta_f-gaussian", "layers", "reliability", "weights")
STRUCTURED_SIZE = measures._structured_size
FILE = """
from torch import nn
import pyro_bmr as bmr

def build(data, prior, hidden="3"):
    net = nn.Sequential(nn.Flatten(), nn.Linear(data.x_train[0].numel(), int(hidden)), nn.Tanh(),
    nn.Linear(int(hidden), data.outputs))
    return bmr.BayesianNetwork(net, prior, data.likelihood())
"""


def few(name, train=160, test=60):
    data = bmr.load(name)
    return replace(
        data,
        x_train=data.x_train[:train],
        y_train=data.y_train[:train],
        x_test=data.x_test[:test],
        y_test=data.y_test[:test],
    )


@pytest.fixture(scope="module")
def digits():
    return few("digits")


@pytest.fixture(scope="module")
def diabetes():
    return few("diabetes", 120, 40)


@pytest.fixture(scope="module", autouse=True)
def no_plain_steps():
    """No plain training is timed beside each cell, and no network is shrunk for its size; what
    these give is tested with the measures, and by the studies.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "step_ratio", lambda *_: 1.5)
        patch.setattr(measures, "_structured_size", lambda *_: 0.5)
        yield


@pytest.fixture(scope="module")
def done(digits, tmp_path_factory):
    """All priors, routes and baselines with two seeds, on disk."""
    folder = tmp_path_factory.mktemp("compared") / "results"
    figures = pictures._figures

    def few(*args):
        return (one for one in figures(*args) if one[0] in DRAWN)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_figures", few)  # for all of them there is a test
        return compare("mlp:4", digits, out=folder, **GIVEN), folder


def one(data, **options):
    """A single cheap cell."""
    wanted = {
        "priors": {"gaussian": bmr.Gaussian(0.5)},
        "routes": ["fitted"],
        "baselines": (),
        "seeds": 1,
        "settings": QUICK,
        "progress": False,
    } | options
    return compare(wanted.pop("model", "linear_regression"), data, **wanted)


@pytest.fixture
def blank(monkeypatch):
    """No pictures, for tests that do not look at them."""
    monkeypatch.setattr(report, "draw", lambda *args: [])


def no_fits(*args, **kwargs):
    raise AssertionError("a fit was started")


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def cell_of(table, folder, prior, route, seed):
    """The folder of a cell."""
    rows = table[(table["prior"] == prior) & (table["route"] == route) & (table["seed"] == seed)]
    return folder / "cells" / rows["cell"].item()


def test_columns_and_rows(done):
    table, _ = done
    assert list(table.columns) == [*CLASSES, "kilobytes", *OF_BASELINES, "cell"]
    assert [tuple(key) for key in table[["prior", "route", "seed"]].values] == [
        (*row, s) for row in ROWS for s in (0, 1)
    ]
    assert (
        set(table["model"]) == {"mlp:4"}
        and set(table["data"]) == {"digits"}
        and set(table["temperature"]) == {1.0}
    )
    promised = ", ".join([*CLASSES, *OF_BASELINES])
    for score in ("base_accuracy", " accuracy"):
        promised = promised.replace(score, f"{score} or {score.replace('accuracy', 'rmse')}")
    promised = promised.replace("or  rmse", "or rmse")
    assert compare.__doc__ is not None and promised in re.sub(r"\s+", " ", compare.__doc__)
    assert " and ".join(ON_DISK) in compare.__doc__


def test_scores_are_possible_and_depend_on_the_seed(done):
    table, _ = done
    assert (
        table["accuracy"].between(0, 1).all()
        and table["brier"].between(0, 2).all()
        and table["ece"].between(0, 1).all()
    )
    assert (
        (table["nll"] > 0).all()
        and (table["seconds"] > 0).all()
        and (table["nll"] < 2 * math.log(10)).all()
    )
    first, second = (table[table["seed"] == seed].reset_index(drop=True) for seed in (0, 1))
    assert (first["nll"] != second["nll"]).all()


def test_kept(done):
    table, folder = done
    assert (table["parameters"] == 64 * 4 + 4 + 4 * 10 + 10).all() and table["kept"].between(
        0, 1
    ).all()
    assert (table["kept"] == table["kept_parameters"] / table["parameters"]).all()
    for row in table.to_dict("records"):
        weights = load_file(folder / "cells" / row["cell"] / "model.safetensors")
        assert sorted(weights) == ["1.bias", "1.weight", "3.bias", "3.weight"]
        assert sum(int((w != 0).sum()) for w in weights.values()) == row["kept_parameters"]
    whole = (table["route"] == "map") | (
        (table["prior"] == "gaussian") & (table["route"] == "fitted")
    )
    assert (table.loc[whole, "kept"] == 1).all() and (table.loc[whole, "delta_f"] == 0).all()
    plain = table[table["route"] == "plain"]
    assert (plain["kept"] == 1).all() and plain["delta_f"].isna().all()
    pruned = table[(table["prior"] == "gaussian") & (table["route"] == "reduced")]
    assert (
        (pruned["kept"] < 0.95).all()
        and (pruned["kept"] > 0.05).all()
        and (pruned["delta_f"] > 1).all()
    )


def test_guides(diabetes):
    prior, settings = bmr.Horseshoe(), replace(QUICK, kept=1.0, draws=6)
    found = one(diabetes, priors={"h": prior}, settings=replace(settings, guide="scale-coupled"))
    torch.manual_seed(0)
    program = load_model("linear_regression")(diabetes, prior)
    fit = bmr.fit(
        program,
        diabetes,
        guide=bmr.ScaleCoupled,
        epochs=2,
        batch_size=40,
        optimizer=bmr.adam(1e-2),
        seed=0,
        progress=False,
    )
    prediction = bmr.predict(fit.program, fit.posterior, diabetes.x_test, draws=6)
    assert found["rmse"].item() == pytest.approx(
        bmr.metrics.rmse(prediction.mean, diabetes.y_test) * diabetes.target_scale
    )
    low, high = prediction.interval(0.9)
    inside = ((low <= diabetes.y_test) & (diabetes.y_test <= high)).double().mean()
    assert found["coverage"].item() == pytest.approx(float(inside))
    drawn = bmr.metrics.crps(prediction.samples(4000), diabetes.y_test) * diabetes.target_scale
    assert found["crps"].item() == pytest.approx(drawn, rel=0.03)
    assert (
        found["rmse"].item() != one(diabetes, priors={"h": prior}, settings=settings)["rmse"].item()
    )


def test_a_correlated_site_that_is_gone_stays_gone(diabetes):
    program = load_model("linear_regression")(diabetes, bmr.Gaussian(0.5))
    fit = bmr.fit(program, diabetes, guide=bmr.FullRank, epochs=1, batch_size=40, progress=False)
    gone = bmr.reduce(fit.posterior, to={"w": bmr.Gaussian(scale=0.0)}, kept=0.0).posterior
    assert gone["w"].joint is not None and not gone["w"].kept.any()
    again = bmr.reduce(gone, to={"w": bmr.Gaussian(scale=0.0)})
    assert not again.posterior["w"].kept.any() and again.delta_f == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"guide": "full"},
            "no guide 'full'; the guides are: mean-field, scale-coupled, matrix-variate, low-rank",
        ),
        (
            {"guide": "low-rank", "estimator": "antithetic"},
            "estimator 'antithetic': expected the guide mean-field, got 'low-rank'",
        ),
        (
            {"guide": "scale-coupled", "optimizer": "natural-gradient"},
            "optimizer 'natural-gradient': expected the guide mean-field, got 'scale-coupled'",
        ),
    ],
)
def test_guides_that_are_refused(options, message):
    with pytest.raises(bmr.errors.ModelError, match=message):
        Settings(**options)


# 10 weights and an intercept, which the prior leaves alone
@pytest.mark.parametrize(
    ("kept", "left"), [pytest.param(1.0, 11, marks=pytest.mark.slow), (0.4, 5)]
)
def test_size_of_a_fitted_shrinkage_prior(diabetes, kept, left):
    table = one(diabetes, priors={"horseshoe": bmr.Horseshoe()}, settings=replace(QUICK, kept=kept))
    own = one(diabetes, priors={"horseshoe": bmr.Horseshoe()})
    assert table["kept_parameters"].item() == left != own["kept_parameters"].item()
    gaussian = one(diabetes, settings=replace(QUICK, kept=kept))
    assert gaussian["kept"].iloc[0] == 1


def test_files(done):
    table, folder = done
    pd.testing.assert_frame_equal(pd.read_csv(folder / "results.csv"), table)
    cells = {path.name: path for path in (folder / "cells").iterdir()}
    assert sorted(cells) == sorted(table["cell"]) and len(cells) == 22
    files = {"model.safetensors", "report.json", "history.csv", "row.json"}
    with_fits = files | {"posterior.safetensors"}
    for cell, prior in zip(table["cell"], table["prior"], strict=True):
        there = {p.name for p in cells[cell].iterdir()}
        assert (files if prior == "none" else with_fits) <= there
        assert ("posterior.safetensors" in there) == (prior != "none")
    drawn = sorted(path.name for path in (folder / "pictures").iterdir())
    assert drawn == [f"1-{name}.png" for name in DRAWN]
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_pictures(done, digits, tmp_path, monkeypatch):
    shutil.copytree(done[1], folder := tmp_path / "results")
    monkeypatch.setattr(recipe, "fit", no_fits)
    compare("mlp:4", digits, out=folder, **GIVEN)
    drawn = sorted(path.name for path in (folder / "pictures").iterdir())
    assert drawn == [
        f"1-{name}.png"
        for name in (
            "cost",
            "delta_f-gaussian",
            "delta_f-horseshoe",
            "delta_f-spike-and-slab",
            "fronts",
            "layers",
            "learning",
            "reliability",
            "weights",
        )
    ]
    assert all(
        (folder / "pictures" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in drawn
    )
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert all(f"(pictures/{name})" in text for name in drawn)
    assert not list(folder.rglob("*.tmp"))


def test_what_a_cell_leaves(done):
    table, folder = done
    path = cell_of(table, folder, "gaussian", "reduced", 1)
    row = table[table["cell"] == path.name].iloc[0]
    kept = strict(path / "row.json")
    figures = [name for name in CLASSES[6:] if name in kept]
    assert figures == CLASSES[6:]
    known = [name for name in figures if kept[name] is not None]
    # the plain step is timed for the first seed
    assert set(figures) - set(known) - {"converged"} == {"step_ratio"}
    assert {k: kept[k] for k in known} == {k: row[k] for k in known}
    settings = strict(path / "settings.json")
    usual = Settings()
    changed = {k: v for k, v in vars(QUICK).items() if v != getattr(usual, k)}
    assert (settings["model"], settings["data"], settings["method"], settings["seed"]) == (
        "mlp:4",
        "digits",
        "reduced",
        1,
    )
    assert settings["options"] == {"prior": repr(bmr.Gaussian()), **changed}
    said = strict(path / "report.json")
    assert sum(tensor["nonzero"] for tensor in said["tensors"].values()) == row["kept_parameters"]
    sites = strict(path / "reduction.json")["sites"]
    assert {site["site"] for site in sites} == set(said["tensors"])
    ece = sum(
        part * abs(confidence - accuracy) for confidence, accuracy, part in said["calibration"]
    )
    assert ece == pytest.approx(row["ece"], abs=1e-12) and sum(
        part for _, _, part in said["calibration"]
    ) == pytest.approx(1)
    history = pd.read_csv(path / "history.csv")
    assert list(history["epoch"]) == [1, 2] and history["step"].iloc[-1] == 2 * 160 / 40


def test_report_of_the_comparison(done):
    table, folder = done
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert (
        text.startswith("# mlp:4 on digits\n")
        and "22 of 22 cells finished, 0 failed; 2 seeds" in text
        and "310 parameters" in text
        and "epochs 2" in text
    )
    for row in summary(table).itertuples(index=False):
        assert "| " + " | ".join(row) + " |" in text
    for path in (folder / "pictures").iterdir():
        assert f"(pictures/{path.name})" in text
    declared = strict(folder / "comparison.json")
    assert declared["settings"]["epochs"] == 2
    assert declared["baselines"] == ["plain", "magnitude"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    sentences = conclusions(table)
    assert len(sentences) >= 3
    for sentence in sentences:
        assert f"\n- {sentence}\n" in text and f"<li>{html.escape(sentence)}</li>" in page


@pytest.mark.parametrize(
    ("optimizer", "declared"),
    [
        ("natural-gradient", bmr.Gaussian("layer")),
        pytest.param("adam", bmr.Gaussian(), marks=pytest.mark.slow),
    ],
)
def test_the_gaussian_before_a_shrinkage_prior_is_that_of_the_optimizer(optimizer, declared):
    settings, priors = Settings(epochs=1, temperature=1.0, optimizer=optimizer), []

    def build(rows, prior):
        priors.append(prior)
        return load_model("mlp:4")(rows, prior)

    for route, prior in (("reduced", declared), ("fitted", bmr.SpikeAndSlab())):
        of = build, few("digits"), bmr.SpikeAndSlab(), route
        assert recipe.fit_by_route(*of, 0, settings, False).declared == priors.pop() == prior


def test_a_cell_is_a_run_that_can_be_reduced_and_exported(done, tmp_path, monkeypatch, capsys):
    """The fit under a Gaussian, the reduction to the horseshoe after it, and the weights of both:
    those of the cell's own export.
    """
    table, folder = done
    monkeypatch.setattr("pyro_bmr.experiments.runs.data_named", lambda *_: few("digits"))
    cell = cell_of(table, folder, "horseshoe", "reduced", 0)
    row = table[table["cell"] == cell.name].iloc[0]
    assert load_run(cell).prior() == bmr.Gaussian()  # by Adam
    assert load_run(cell, reduced=True).reduction
    assert main(["export", str(cell), "--seconds", "0", "--out", str(tmp_path / "out")]) == 0
    own, exported = (load_file(path / "model.safetensors") for path in (cell, tmp_path / "out"))
    assert own.keys() == exported.keys()
    assert all(torch.equal(own[name], exported[name]) for name in own)
    assert strict(tmp_path / "out" / "report.json")["kept"] == row["kept"]
    assert main(["reduce", str(cell), "--kept", "0.2", "--draws", "2"]) == 0
    assert "kept 0.2," in capsys.readouterr().out
    whole = cell_of(table, folder, "gaussian", "map", 0)
    assert main(["export", str(whole), "--seconds", "0", "--out", str(tmp_path / "map")]) == 0
    assert main(["reduce", str(whole)]) == 2 and "variance 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "prior", "message"),
    [
        ("function", bmr.Gaussian(0.5), "expected a model that can be loaded, got an object"),
        ("mlp:4", bmr.Gaussian(0.5), "expected a data that can be loaded, got an object"),
    ],
)
def test_a_cell_of_objects_in_memory_says_what_it_lacks(
    digits, tmp_path, capsys, blank, model, prior, message
):
    def build(data, prior):
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        return bmr.BayesianNetwork(net, prior, data.likelihood())

    data = bmr.load("digits") if model == "function" else digits
    settings = replace(QUICK, epochs=1, batch_size=1000)
    table = one(
        data,
        model=build if model == "function" else model,
        priors={"mine": prior},
        settings=settings,
        out=tmp_path / "out",
    )
    cell = tmp_path / "out" / "cells" / table["cell"].item()
    assert main(["export", str(cell), "--out", str(tmp_path / "no")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_prior_without_a_name_is_that_of_the_posterior(tmp_path, blank):
    data = bmr.load("diabetes")
    given = bmr.Horseshoe(tau0=0.3)
    for prior, name in ((given, None), (bmr.Gaussian(0.5), "gaussian:0.5")):
        table = one(data, model="mlp:2", priors={"mine": prior}, out=tmp_path)
        cell = tmp_path / "cells" / table["cell"].item()
        assert strict(cell / "settings.json")["prior"] == name
        run = load_run(cell)
        assert run.prior() == prior
        assert set(run.program(run.data()).priors.values()) == {prior}


def test_summary(done):
    table, _ = done
    text = summary(table)
    shown = "prior route accuracy nll brier ece kept delta_f seconds"
    assert " ".join(text.columns) == f"{shown} converged"
    assert [tuple(pair) for pair in text[["prior", "route"]].values] == ROWS
    rows = table[(table["prior"] == "horseshoe") & (table["route"] == "reduced")]
    a, b = rows["nll"]
    got = text[(text["prior"] == "horseshoe") & (text["route"] == "reduced")].iloc[0]
    # worse than the class frequencies of the training rows: marked
    marked = (a + b) / 2 > rows["base_nll"].mean()
    assert got["nll"] == f"{(a + b) / 2:.3f} ± {abs(a - b) / math.sqrt(2):.3f}" + " *" * int(marked)
    a, b = rows["kept"]
    assert got["kept"] == f"{(a + b) / 2:.4f} ± {abs(a - b) / math.sqrt(2):.4f}"
    alone = summary(table[table["seed"] == 0])
    assert alone["nll"].iloc[0] == f"{table['nll'].iloc[0]:.3f}"


def test_a_pruned_baseline_has_the_size_of_the_reduced_gaussian_of_its_seed(done):
    table, folder = done
    sizes = {
        route: table[(table["prior"] == prior) & (table["route"] == route)].set_index("seed")
        for prior, route in (("gaussian", "reduced"), ("none", "magnitude"))
    }
    kept = sizes["magnitude"]["kept_parameters"]
    assert kept.tolist() == sizes["reduced"]["kept_parameters"].tolist() and kept[0] != kept[1]
    for seed in (0, 1):
        cell = cell_of(table, folder, "none", "magnitude", seed)
        assert strict(cell / "settings.json")["options"] == {
            "epochs": 2,
            "batch_size": 40,
            "learning_rate": 1e-2,
            "weight_decay": 1 / 160,
            "calibrate": True,
            "kept": sizes["reduced"]["kept"][seed],
        }


def test_a_baseline_whose_size_is_not_known_fails_with_the_cell_of_that_size(
    diabetes, tmp_path, blank, monkeypatch
):
    settings = replace(QUICK, epochs=1, batch_size=120)
    known = {"model": "mlp:2", "settings": settings, "routes": ["reduced"]}
    with (
        monkeypatch.context() as patch,
        pytest.warns(bmr.PyroBMRWarning, match="reduced.*seed-0_.* failed: AssertionError: a fit"),
        pytest.warns(bmr.PyroBMRWarning, match="magnitude.* failed: its size is that of .*reduced"),
    ):
        patch.setattr(recipe, "fit", no_fits)
        table = one(diabetes, **known, baselines=["magnitude", "plain"], out=tmp_path)
    assert table["route"].tolist() == ["plain"]
    failed = "Failed, and in no figure: gaussian reduced (seed 0) and magnitude pruning (seed 0)."
    assert failed in (tmp_path / "report.md").read_text(encoding="utf-8")
    again = one(diabetes, **known, baselines=["magnitude", "plain"], out=tmp_path)
    assert again["route"].tolist() == ["reduced", "magnitude", "plain"]
    assert len(set(again["kept"].iloc[:2])) == 1


def test_baselines_that_are_not_possible(diabetes, tmp_path, blank, capsys):
    with pytest.raises(bmr.errors.ModelError, match="baselines: expected names among plain, magni"):
        one(diabetes, baselines=["dropout"])
    with pytest.raises(bmr.errors.ModelError, match="baselines: magnitude has the size of a reduc"):
        one(diabetes, model="mlp:2", baselines=["magnitude"])
    program = bmr.BayesianNetwork(torch.nn.Linear(10, 1), bmr.Gaussian(), bmr.Normal())
    bare = {"model": lambda data, prior: lambda x, y=None: program(x, y), "baselines": None}
    with pytest.raises(bmr.errors.ModelError, match="baselines plain: expected a model whose"):
        one(diabetes, **{**bare, "baselines": ["plain"]})
    table = one(diabetes, **bare, out=tmp_path)
    assert table["route"].tolist() == ["fitted"]
    said = "No baselines: expected a model whose build returns a BayesianNetwork, got function."
    assert said in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "No baselines" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert capsys.readouterr().out == ""


def test_a_program_written_by_hand_may_have_a_plain_network(diabetes):
    path = Path(__file__).parents[2] / "models" / "linear_regression.py"
    table = one(diabetes, model=path, baselines=["plain"])
    assert table["route"].tolist() == ["fitted", "plain"]
    assert table["parameters"].tolist() == [11, 11] and (table["rmse"] < 300).all()


def test_what_fits_say_of_their_end_is_in_the_table(diabetes, tmp_path, blank, monkeypatch, capsys):
    fit = recipe.fit

    def ended(*args, **kwargs):
        done = fit(*args, **kwargs)
        object.__setattr__(done, "converged", kwargs["seed"] == 0)
        object.__setattr__(done, "convergence", "the bound still rises")
        return done

    monkeypatch.setattr(recipe, "fit", ended)
    settings = replace(QUICK, epochs=1)
    table = one(diabetes, seeds=2, settings=settings, out=tmp_path, progress=True)
    assert table["converged"].tolist() == [1.0, 0.0]
    assert "gaussian fitted (1 of 2 seeds)" in capsys.readouterr().out
    cell = cell_of(table, tmp_path, "gaussian", "fitted", 1)
    assert strict(cell / "report.json")["convergence"] == "the bound still rises"


def test_going_on_fits_nothing_twice(done, digits, monkeypatch, blank):
    table, folder = done
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    monkeypatch.setattr(recipe, "fit", no_fits)
    again = compare("mlp:4", digits, out=folder, **GIVEN)
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")} == before


@pytest.fixture
def fits(monkeypatch):
    """The seeds of the fits that were started."""
    seeds, fit = [], recipe.fit
    monkeypatch.setattr(
        recipe, "fit", lambda *args, **kwargs: seeds.append(kwargs["seed"]) or fit(*args, **kwargs)
    )
    return seeds


def test_going_on_with_more_seeds(diabetes, tmp_path, fits, blank):
    one(diabetes, out=tmp_path)
    table = one(diabetes, out=tmp_path, seeds=3)
    assert fits == [0, 1, 2] and list(table["seed"]) == [0, 1, 2]
    assert list(table.columns) == REALS + ON_DISK
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results.csv"), table)


@pytest.mark.parametrize("name", others_slow(["0.1", "None", "a/b"], "a/b"))
def test_going_on_with_any_name_of_a_prior(diabetes, tmp_path, monkeypatch, blank, name):
    table = one(diabetes, priors={name: bmr.Gaussian(0.5)}, routes=["reduced"], out=tmp_path)
    monkeypatch.setattr(recipe, "fit", no_fits)
    again = one(diabetes, priors={name: bmr.Gaussian(0.5)}, routes=["reduced"], out=tmp_path)
    assert list(again["prior"]) == [name] and again["nll"].tolist() == table["nll"].tolist()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"settings": replace(QUICK, epochs=3)}, id="epochs"),
        pytest.param({"settings": replace(QUICK, kept=0.5)}, id="kept", marks=pytest.mark.slow),
        pytest.param(
            {"settings": replace(QUICK, optimizer="natural-gradient", learning_rate=0.1)},
            id="optimizer",
            marks=pytest.mark.slow,
        ),
        pytest.param({"model": "mlp:2"}, id="model", marks=pytest.mark.slow),
        pytest.param({"priors": {"gaussian": bmr.Gaussian(0.01)}}, id="prior"),
        pytest.param({"data": "renamed"}, id="name", marks=pytest.mark.slow),
        pytest.param({"data": "other targets"}, id="targets"),
    ],
)
def test_what_makes_another_cell(diabetes, tmp_path, blank, fits, change):
    """Results of other settings, another model, prior or other data are never taken for these."""
    first = one(diabetes, out=tmp_path)
    changed = dict(change)
    data = {
        "renamed": replace(diabetes, name="other"),
        "other targets": replace(diabetes, y_test=diabetes.y_test + 1),
    }.get(changed.pop("data", None), diabetes)
    other = one(data, out=tmp_path, **changed)
    assert fits == [0, 0] and set(other["cell"]).isdisjoint(first["cell"]) and len(other) == 1
    assert pd.read_csv(tmp_path / "results.csv")["cell"].tolist() == other["cell"].tolist()
    again = one(diabetes, out=tmp_path)
    assert fits == [0, 0]
    pd.testing.assert_frame_equal(again, first, check_exact=True)


def test_settings_at_their_defaults_are_no_part_of_a_cell(diabetes):
    """A setting of a later version, at its default, leaves the finished cells finished."""

    def options(**settings):
        declared = comparison(
            "linear_regression", diabetes, None, ["fitted"], 1, Settings(**settings)
        )
        return {name: v for name, v in declared.cells[0].options.items() if name != "prior"}

    # defaults that may change are written down
    own = {"optimizer": "natural-gradient", "temperature": 1.0}
    assert options() == options(guide="mean-field", learning_rate=0.1) == own
    assert options(optimizer="adam") == options(optimizer="adam", learning_rate=3e-3)
    assert options(optimizer="adam") == {**own, "optimizer": "adam"}
    assert options(widen=2.0, kept=0.5) == {**own, "widen": 2.0, "kept": 0.5}


def test_a_cell_that_fails_fails_alone(diabetes, tmp_path, monkeypatch, blank):
    fit = recipe.fit

    def bad(*args, **kwargs):
        if kwargs["seed"] == 1:
            raise bmr.errors.FitError("no luck")
        return fit(*args, **kwargs)

    monkeypatch.setattr(recipe, "fit", bad)
    with pytest.warns(bmr.PyroBMRWarning, match=r"fitted_prior-gaussian_seed-1_.* failed: no luck"):
        table = one(diabetes, seeds=3, out=tmp_path)
    assert table["seed"].tolist() == [0, 2] and "no luck" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(recipe, "fit", no_fits)
    with pytest.warns(bmr.PyroBMRWarning, match="seed-1_.* failed: AssertionError: a fit was"):
        one(diabetes, seeds=3, out=tmp_path)
    with pytest.raises(bmr.PyroBMRError, match="no cell could be fitted; .*seed-0_.* failed: Ass"):
        one(diabetes, out=tmp_path / "none")
    with pytest.raises(AssertionError, match="a fit was started"):
        one(diabetes)


@pytest.mark.slow  # in the fast suite a study does it
def test_the_same_numbers_in_two_processes(diabetes, tmp_path, blank, monkeypatch):
    monkeypatch.setattr(measures, "_structured_size", STRUCTURED_SIZE)
    tables = [
        one(
            diabetes,
            routes=ROUTES,
            baselines=None,
            priors={"g": bmr.Gaussian(0.5)},
            jobs=jobs,
            **more,
        )
        for jobs, more in ((None, {}), (2, {"out": tmp_path}))
    ]
    drop = ["seconds", "step_ratio"]
    assert tables[0]["route"].tolist() == [*ROUTES, "plain", "magnitude"]
    pd.testing.assert_frame_equal(
        tables[0].drop(columns=drop), tables[1].drop(columns=[*drop, *ON_DISK]), check_exact=True
    )


def test_an_unwritable_folder(diabetes, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(bmr.PyroBMRError, match=r"cannot write to .*file/results"):
        one(diabetes, out=tmp_path / "file" / "results")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(digits, blank):
    tables = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        tables.append(
            one(
                digits,
                model="mlp:4",
                routes=ROUTES,
                priors={"horseshoe": bmr.Horseshoe(), "gaussian": bmr.Gaussian()},
            )
        )
        assert torch.equal(torch.get_rng_state(), state)
    pd.testing.assert_frame_equal(
        *(table.drop(columns=["seconds", "step_ratio"]) for table in tables), check_exact=True
    )


@pytest.mark.slow
def test_regression_columns(diabetes):
    table = one(diabetes, priors=None, routes=ROUTES)
    assert list(table.columns) == REALS and len(table) == 9
    assert (
        table["brier"].isna().all()
        and table["ece"].isna().all()
        and (table["rmse"] > 20).all()
        and (table["rmse"] < 300).all()
        and (table["crps"] < table["rmse"]).all()
        and (table["crps"] > 10).all()
        and table["coverage"].between(0.3, 1).all()
    )
    assert {"crps", "coverage"} <= set(summary(table))
    assert (
        "rmse" in summary(table) and "ece" not in summary(table) and "brier" not in summary(table)
    )


@pytest.mark.slow
def test_regression_on_disk(diabetes, tmp_path):
    table = one(diabetes, out=tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results.csv"), table)
    cell = tmp_path / "cells" / table["cell"].item()
    assert strict(cell / "row.json")["brier"] is None
    assert strict(cell / "report.json")["calibration"] is None
    assert set(load_file(cell / "model.safetensors")) == {"w", "b", "noise"}
    assert (tmp_path / "pictures" / "1-fronts.png").exists()


def test_real_targets_are_scored_in_their_own_units(diabetes):
    prior = bmr.Gaussian(0.5)
    row = one(diabetes, settings=replace(QUICK, epochs=40)).iloc[0]
    program = load_model("linear_regression")(diabetes, prior)
    fit = bmr.fit(
        program,
        diabetes,
        epochs=40,
        batch_size=40,
        optimizer=bmr.adam(1e-2),
        seed=0,
        progress=False,
    )
    prediction = bmr.predict(program, fit.posterior, diabetes.x_test, draws=4, seed=0)
    y = diabetes.y_test.double().numpy() * diabetes.target_scale + diabetes.target_mean
    locs = prediction.locs.double().numpy() * diabetes.target_scale + diabetes.target_mean
    scales = prediction.scales.double().numpy() * diabetes.target_scale
    density = (np.exp(-0.5 * ((y - locs) / scales) ** 2) / (scales * math.sqrt(2 * math.pi))).mean(
        0
    )
    assert y.std() > 30 and row["rmse"] == pytest.approx(
        math.sqrt(((locs.mean(0) - y) ** 2).mean()), rel=1e-5
    )
    assert row["nll"] == pytest.approx(-np.log(density).mean(), rel=1e-5)
    assert row["rmse"] < 0.95 * y.std(), "forty epochs predict better than the mean"


def test_classes_are_scored_by_the_posterior_predictive(digits):
    row = one(digits, model="mlp:4").iloc[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        program = load_model("mlp:4")(digits, bmr.Gaussian(0.5))
    fit = bmr.fit(
        program, digits, epochs=2, batch_size=40, optimizer=bmr.adam(1e-2), seed=0, progress=False
    )
    probs = (
        bmr.predict(fit.program, fit.posterior, digits.x_test, draws=4, seed=0)
        .probs.double()
        .numpy()
    )
    labels = digits.y_test.numpy()
    right = probs[np.arange(60), labels]
    assert row["nll"] == pytest.approx(-np.log(right).mean(), rel=1e-5) and row[
        "accuracy"
    ] == pytest.approx((probs.argmax(1) == labels).mean())
    assert row["brier"] == pytest.approx((1 - 2 * right + (probs**2).sum(1)).mean(), rel=1e-5)


def test_the_temperature_of_each_route_by_default(digits, diabetes):
    def declared(model, data):
        study = comparison(model, data, None, ROUTES, 1, Settings(), baselines=())
        return {cell.method: cell.options["temperature"] for cell in study.cells}

    assert declared("mlp:4", digits) == {"map": 1.0, "fitted": "auto", "reduced": "auto"}
    assert set(declared("linear_regression", diabetes).values()) == {1.0}


def test_a_baseline_has_as_many_steps_as_the_fits(digits):
    def epochs(**options):
        study = comparison("mlp:4", digits, None, ROUTES, 1, Settings(**options))
        return {c.options["epochs"] for c in study.cells if c.method in ("plain", "magnitude")}

    # of 160 rows a baseline sees 133, in 34 steps an epoch: 3,000 steps
    assert len(digits.x_train) == 160
    assert epochs(batch_size=4) == {89} and epochs(batch_size=4, epochs=7) == {7}
    rows = digits.x_train.repeat(10, 1, 1, 1), digits.y_train.repeat(10)
    many = replace(digits, x_train=rows[0], y_train=rows[1])
    study = comparison("mlp:4", many, None, ["reduced"], 1, Settings(batch_size=4))
    # 20 passes over 1,600 rows are 8,000 steps, of 334 an epoch
    assert {c.options["epochs"] for c in study.cells if c.method == "magnitude"} == {24}


def test_the_temperature_is_used_and_written_down(digits, diabetes):
    classes = {"model": "mlp:4", "settings": replace(QUICK, temperature=0.25)}
    cold, warm = one(digits, **classes).iloc[0], one(digits, model="mlp:4").iloc[0]
    assert cold["temperature"] == 0.25 and cold["nll"] != warm["nll"]
    # the noise of real targets is inferred, and would be false
    with pytest.raises(bmr.errors.FitError, match=r"temperature=0\.25: expected 1"):
        one(diabetes, settings=classes["settings"])


def test_the_natural_gradient(diabetes, tmp_path, blank):
    settings = Settings(epochs=3, batch_size=40, draws=4, optimizer="natural-gradient")
    assert (
        settings.learning_rate == 0.1
        and Settings().learning_rate == 0.1
        and Settings(optimizer="adam").learning_rate == 3e-3
        and Settings(learning_rate=0.2).learning_rate == 0.2
    )
    table = one(
        diabetes,
        priors={"g": bmr.Gaussian(0.5)},
        routes=["map", "fitted"],
        settings=settings,
        out=tmp_path,
    )
    program = load_model("linear_regression")(diabetes, bmr.Gaussian(0.5))
    expected = []
    for guide, optimizer in (
        (bmr.Point, bmr.adam(3e-3)),
        (bmr.MeanField, bmr.natural_gradient(0.1)),
    ):
        fit = bmr.fit(
            program,
            diabetes,
            guide=guide,
            epochs=3,
            batch_size=40,
            optimizer=optimizer,
            progress=False,
        )
        prediction = bmr.predict(
            fit.program, fit.posterior, diabetes.x_test, draws=0 if guide is bmr.Point else 4
        )
        expected.append(bmr.metrics.rmse(prediction.mean, diabetes.y_test) * diabetes.target_scale)
    assert table["rmse"].tolist() == pytest.approx(expected)
    assert strict(tmp_path / "comparison.json")["settings"]["optimizer"] == "natural-gradient"


def test_a_target_fraction(digits):
    table = one(digits, model="mlp:4", routes=["reduced"], settings=replace(QUICK, kept=0.3))
    assert table["kept_parameters"].tolist() == [round(0.3 * (64 * 4 + 4 + 4 * 10 + 10))]


def test_validation_does_not_look_at_the_test_rows(digits):
    blind = replace(
        digits,
        x_test=torch.full_like(digits.x_test, torch.nan),
        y_test=torch.full_like(digits.y_test, 99),
    )
    settings = replace(QUICK, validation=0.2)
    table = one(blind, model="mlp:4", settings=settings)
    assert math.isfinite(table["nll"].iloc[0]) and table["data"].tolist() == ["digits (validation)"]
    assert (table["accuracy"] * 32 % 1).tolist() == pytest.approx([0], abs=1e-9), (
        "a fifth of 160 rows is scored"
    )
    assert table["nll"].iloc[0] != one(digits, model="mlp:4")["nll"].iloc[0]
    with pytest.raises(
        bmr.errors.ModelError, match=r"validation: expected 0 < validation < 1, got 1\.5"
    ):
        one(digits, model="mlp:4", settings=replace(QUICK, validation=1.5))


def test_a_file_as_model(diabetes, tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    path = tmp_path / "mine.py"
    table = one(diabetes, model=path)
    assert table["parameters"].tolist() == [10 * 3 + 3 + 3 + 1] and table["model"].tolist() == [
        str(path)
    ]
    assert one(diabetes, model=f"{path}:2")["parameters"].tolist() == [10 * 2 + 2 + 2 + 1]


def test_a_file_with_a_dataclass(diabetes, tmp_path):
    head = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass"
        " Sizes:\n    hidden: int = 5\n"
    )
    (tmp_path / "mine.py").write_text(head + FILE.replace('hidden="3"', "hidden=Sizes().hidden"))
    assert one(diabetes, model=tmp_path / "mine.py")["parameters"].tolist() == [10 * 5 + 5 + 5 + 1]


def test_a_function_as_model(diabetes):
    def build(data, prior):
        return bmr.BayesianNetwork(torch.nn.Linear(10, 1), prior, data.likelihood())

    assert one(diabetes, model=build)["parameters"].tolist() == [11]


def test_models_that_are_not_there(tmp_path):
    assert {"lenet", "linear_regression", "mlp", "vit"} < set(
        model_names()
    ) and "__init__" not in model_names()
    with pytest.raises(
        bmr.errors.ModelError,
        match=(
            r"no model 'nope'.*lenet, lenet_caffe, linear_regression, .*mlp.*build\(data, prior\)"
        ),
    ):
        load_model("nope")
    with pytest.raises(bmr.errors.ModelError, match=r"no model file '.*gone\.py'"):
        load_model(tmp_path / "gone.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(
        bmr.errors.ModelError, match=r"empty\.py' has no function build\(data, prior\)"
    ):
        load_model(tmp_path / "empty.py")


def test_unknown_routes(diabetes):
    with pytest.raises(
        bmr.errors.ModelError, match=r"expected .*map, fitted, reduced, got .*fited"
    ):
        one(diabetes, routes=["map", "fited"])
    with pytest.raises(bmr.errors.ModelError, match="at least one"):
        one(diabetes, routes=[])
    with pytest.raises(
        bmr.errors.ModelError, match="seeds: expected a number of at least 1, got 0"
    ):
        one(diabetes, seeds=0)


def test_a_model_that_does_not_suit_the_data(digits, diabetes):
    with pytest.raises(
        bmr.errors.DataError,
        match="linear_regression: expected real targets, got the classes of digits",
    ):
        one(digits)
    with pytest.raises(bmr.errors.DataError, match=r"lenet: expected images.*\(10,\)"):
        one(diabetes, model="lenet")


def test_the_histogram_of_a_site_with_nothing_left(tmp_path):
    figure = plots.delta_f_histogram(
        {"gone": torch.full((4,), torch.nan), "there": torch.tensor([-30.0, 1.0, torch.nan, 2.0])}
    )
    heights = [sum(patch.get_height() for patch in axes.patches) for axes in figure.axes]
    assert heights == [3] and [axes.get_title() for axes in figure.axes] == ["there"]
    plots.save_figure(figure, tmp_path / "delta_f.png")
    assert (tmp_path / "delta_f.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_histogram_of_values_that_hardly_differ():
    value = torch.tensor(-0.0014921059)
    figure = plots.delta_f_histogram(
        {"same": torch.stack([value, value.nextafter(torch.tensor(0.0)), value])}
    )
    assert sum(patch.get_height() for patch in figure.axes[0].patches) == 3
    plt.close(figure)


def test_two_names_of_one_folder(diabetes):
    with pytest.raises(bmr.errors.ModelError, match="two of the names give one folder"):
        one(diabetes, priors={"a:b": bmr.Gaussian(), "a-b": bmr.Gaussian(0.5)})


def test_a_warning_of_many_cells_comes_once_with_the_figures_of_the_first(
    diabetes, tmp_path, monkeypatch, blank
):
    monkeypatch.setattr(
        recipe,
        "_cautions",
        lambda program, reduction, data, draws, seed: (f"ΔF = {seed}. Refit", "else"),
    )
    with pytest.warns(bmr.PyroBMRWarning) as caught:
        table = compare(
            "linear_regression",
            diabetes,
            priors={"g": bmr.Gaussian()},
            seeds=3,
            baselines=(),
            settings=replace(QUICK, epochs=1),
            out=tmp_path,
            progress=False,
        )
    words = [str(warning.message) for warning in caught]
    where, rest = (
        f"{diabetes.name}, g, reduced, seed 0, the reduction after the fit",
        " (2 more cells have this warning, with other figures)",
    )
    assert words == [f"{where}: ΔF = 0. Refit{rest}", f"{where}: else{rest}"] and len(table) == 9
    cell = cell_of(table, tmp_path, "g", "reduced", 2)
    assert json.loads((cell / "report.json").read_text())["warnings"][:2] == [
        "ΔF = 2. Refit",
        "else",
    ]
