"""Studies: what a declaration may say, cells that are run once, fail alone and do not depend on the
number of processes, and reports with the numbers.
"""

import base64
import copy
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import joblib
import matplotlib.pyplot
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

import pyro_bmr as bmr
from pyro_bmr.cli.commands import main
from pyro_bmr.errors import OptionError
from pyro_bmr.experiments import curves, measures, methods, report
from pyro_bmr.experiments import folder as cell_folder
from pyro_bmr.experiments import log as cell_log
from pyro_bmr.experiments.conclusions import conclusions
from pyro_bmr.experiments.declaration import declare
from pyro_bmr.experiments.runs import load_run
from pyro_bmr.experiments.settings import Settings
from pyro_bmr.experiments.study import cells_left, study

matplotlib.use("Agg")
torch.set_num_threads(1)

HEAD = (
    'name = "tiny"\nseeds = 2\ndata = ["digits.npz"]\nmodels = ["mlp:3"]\n[settings]\nepochs ='
    " 2\nbatch_size = 40\n"
)
PLAIN = HEAD + '[[method]]\nname = "MAP & co"\nmethod = "plain"\n'
BOTH = (
    PLAIN + '[[method]]\nname = "half"\nmethod = "reduced"\nkept = [0.5, 0.25]\nstart = 0.5\nstop ='
    " 1.0\ndraws = 2\n"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a few digits, in which the test runs."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    np.savez(
        tmp_path / "digits.npz",
        x_train=images[:160],
        y_train=labels[:160],
        x_test=images[160:240],
        y_test=labels[160:240],
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def blank(monkeypatch):
    """No pictures, for tests that do not look at them."""
    monkeypatch.setattr(report, "draw", lambda *args: [])


@pytest.fixture
def runs(monkeypatch):
    """The seeds and options of the methods that were run."""
    seen = []

    def counted(name, method):
        def run(build, data, seed, options, progress):
            trained = method(build, data, seed, options, progress)
            seen.append((name, seed, options.get("kept")))
            return trained

        return run

    monkeypatch.setattr(
        methods,
        "METHODS",
        {name: counted(name, method) for name, method in methods.METHODS.items()},
    )
    return seen


def write(text, name="study.toml"):
    Path(name).write_text(text, encoding="utf-8")
    return name


def quiet(declaration, out="out", **options):
    return study(declaration, out, progress=False, **options)


def test_the_grid(here):
    text = BOTH.replace('["mlp:3"]', '["mlp:3", "mlp:2"]').replace(
        "epochs = 2", "epochs = 2\ntemperature = 0.5\n[settings.for.'mlp:2']\nepochs = 3"
    )
    text = text.replace("batch_size = 40\n", "").replace(
        'method = "plain"', 'method = "plain"\nmodels = "mlp:2"\nbatch_size = [20, 40]'
    )
    cells = declare(write(text + "[method.for.'digits.npz']\ndraws = 7\n")).cells
    assert [(c.model, c.label, c.options.get("kept"), c.seed) for c in cells] == [
        *(("mlp:3", "half", kept, seed) for kept in (0.5, 0.25) for seed in (0, 1)),
        *(
            ("mlp:2", f"MAP & co, batch_size {size}", None, seed)
            for size in (20, 40)
            for seed in (0, 1)
        ),
        *(("mlp:2", "half", kept, seed) for kept in (0.5, 0.25) for seed in (0, 1)),
    ]
    assert (
        cells[0].options
        == {"epochs": 2, "temperature": 0.5, "kept": 0.5, "start": 0.5, "stop": 1.0, "draws": 7}
        and cells[-1].options["epochs"] == 3
    )
    assert (
        cells[1].slug.startswith("mlp-3_digits.npz_reduced_kept-0.5_seed-1_")
        and len({cell.slug for cell in cells}) == 12
    )


def test_what_makes_another_cell(here):
    slugs = [
        declare(write(text)).cells[0].slug
        for text in (
            PLAIN,
            PLAIN.replace("MAP & co", "renamed"),
            PLAIN.replace("epochs = 2", "epochs = 3"),
        )
    ]
    assert slugs[0] == slugs[1] != slugs[2]
    assert (
        declare(write(PLAIN), validation=0.2).cells[0].slug != slugs[0]
        and len(declare("study.toml", seeds=3).cells) == 3
    )
    with np.load("digits.npz") as arrays:
        np.savez("digits.npz", **{**arrays, "y_test": (arrays["y_test"] + 1) % 10})
    os.utime("digits.npz", (1, 1))
    assert declare("study.toml").cells[0].slug != slugs[0], "other data under the same name"


def test_shared_settings_go_to_the_methods_that_know_them(here, monkeypatch):
    def other(build, data, seed, options, progress):
        if unknown := set(options) - {"rewind"}:
            raise OptionError("other", unknown, ["rewind"])
        build(data, bmr.Gaussian())

    monkeypatch.setitem(methods.METHODS, "other", other)
    cells = declare(
        write(
            PLAIN.replace("epochs = 2", "epochs = 2\nrewind = 1") + '[[method]]\nmethod = "other"\n'
        )
    ).cells
    assert [dict(cell.options) for cell in cells[::2]] == [
        {"epochs": 2, "batch_size": 40},
        {"rewind": 1},
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = 2", "seeds = = 2", r"study\.toml: this is no TOML \(.*line 2"),
        (
            '["mlp:3"]',
            '["linear_regression"]',
            r"study\.toml: models: linear_regression: expected real targets, got the classes",
        ),
        (
            "seeds = 2",
            "seed = 2",
            r"study\.toml: seed: no such key; the keys are name, seeds, data, likelihood",
        ),
        ("seeds = 2", "seeds = 0", r"study\.toml: seeds: .* got 0"),
        ("seeds = 2", "seeds = [1, 1]", r"study\.toml: seeds: .* got \[1, 1\]"),
        ("seeds = 2", "seeds = true", r"study\.toml: seeds: .* got True"),
        ("seeds = 2", "shift = 3", r"study\.toml: shift: expected true or false, got 3"),
        ("seeds = 2", "validation = 1.5", r"study\.toml: validation: .* got 1\.5"),
        ('name = "tiny"\n', "", r"study\.toml: name: is missing"),
        ('["mlp:3"]', "[]", r"study\.toml: models: .* got \[\]"),
        ('["mlp:3"]', '["mlp:3", "mlp:3"]', r"study\.toml: models: expected each name once, got"),
        ('["mlp:3"]', '["mlq"]', r"study\.toml: models: no model 'mlq'"),
        ('["digits.npz"]', '["digit"]', r"study\.toml: data: no data set or file 'digit'"),
        ("epochs = 2", "epochs = []", r"study\.toml: settings\.epochs: .* got \[\]"),
        ("epochs = 2", "epochs = 1979-05-27", r"study\.toml: settings\.epochs: .* got datetime"),
        (
            "epochs = 2",
            "epochs = inf",
            r"study\.toml: settings\.epochs: expected a finite number.* got inf",
        ),
        (
            "epochs = 2",
            "epocs = 2",
            r"study\.toml: settings\.epocs: no method of the study knows this option",
        ),
        (
            "epochs = 2",
            "epochs = 0",
            r"study\.toml: method 'MAP & co': epochs: expected a whole number >= 1, got 0",
        ),
        (
            "epochs = 2",
            "validation = 0.2",
            r"study\.toml: settings\.validation: .*at the top of the file",
        ),
        (
            "epochs = 2",
            "for.lenet.epochs = 3",
            r"study\.toml: settings\.for\.lenet: no such key; the keys are mlp:3, digits\.npz",
        ),
        (
            'method = "plain"',
            'method = "pint"',
            r"study\.toml: method 'MAP & co'\.method: no method 'pint'; the methods are: plain",
        ),
        (
            'method = "plain"',
            'method = "plain"\nkepd = 0.5',
            r"study\.toml: method 'MAP & co': plain: no option kepd",
        ),
        (
            'method = "plain"',
            'method = "plain"\nmodels = "lenet"',
            (
                r"study\.toml: method 'MAP & co'\.models: no 'lenet' at the top of the file, which"
                r" has mlp:3"
            ),
        ),
        (
            'method = "plain"',
            'method = "plain"\nbatch_size = [9, 9]',
            (
                r"study\.toml: method 'MAP & co': mlp-3_digits\S+ is declared already, by method"
                r" 'MAP & co'"
            ),
        ),
        (
            'name = "MAP & co"\n',
            "name = 3\n",
            r"study\.toml: method\[0\]\.name: expected a text, got 3",
        ),
        (
            "[[method]]\n",
            '[[method]]\nmethod = "plain"\nname = "MAP & co"\n[[method]]\n',
            r"study\.toml: method 'MAP & co': two methods have this name",
        ),
        (
            "[[method]]\n",
            '[[method]]\nmethod = "plain"\nname = "twin"\n[[method]]\n',
            r"study\.toml: method 'MAP & co': .* by method 'twin'; remove one",
        ),
        (
            "[[method]]",
            "[method]",
            r"study\.toml: method: expected at least one \[\[method\]\], got",
        ),
    ],
)
def test_what_is_wrong_is_refused_before_anything_runs(here, capsys, runs, old, new, message):
    assert PLAIN.count(old) == 1
    write(PLAIN.replace(old, new))
    assert main(["study", "study.toml", "--out", "out", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not runs and not Path("out").exists()
    with pytest.raises(bmr.PyroBMRError, match=f"^{message}"):
        declare("study.toml")


def test_other_refusals(here, runs, capsys):
    with pytest.raises(bmr.PyroBMRError, match=r"'none\.toml' cannot be read \(No such file"):
        declare("none.toml")
    declared = declare(write(PLAIN))
    for options, message in (
        ({"only": ["MAP"]}, "only 'MAP': .*methods are: MAP & co"),
        ({"jobs": 0}, "jobs: expected a number of processes, .* got 0"),
        ({"seeds": 3}, "give them to declare"),
    ):
        with pytest.raises(bmr.errors.ModelError, match=message):
            quiet(declared, **options)
    assert not runs


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(here, blank, runs, capsys):
    write(BOTH)
    first = quiet("study.toml", only=["MAP & co"])
    assert (
        runs == [("plain", 0, None), ("plain", 1, None)]
        and len(first.table) == 2
        and not first.failures
    )
    cells, seconds = cells_left(declare("study.toml"), "out", jobs=2)
    mean = first.table["seconds"].mean()
    assert (
        cells["state"].tolist() == ["finished"] * 2 + ["open"] * 4
        and seconds == pytest.approx(2 * mean)
        and cells["seconds"][5] == pytest.approx(mean)
    )
    stamps = {path: path.stat().st_mtime_ns for path in Path("out/cells").rglob("*.*")}
    table = quiet("study.toml").table
    assert (
        runs[2:] == [("reduced", seed, kept) for kept in (0.5, 0.25) for seed in (0, 1)]
        and len(table) == 6
    )
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    pd.testing.assert_frame_equal(
        table[:2][first.table.columns], first.table, check_dtype=False, check_exact=True
    )
    assert main(["study", "study.toml", "--out", "out", "--quiet"]) == 0 and len(runs) == 6
    assert main(["study", "study.toml", "--out", "out", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "6 finished, 0 failed, 0 open; about 0 s to go" in printed and "report.html" in printed


@pytest.mark.slow
def test_the_row_of_a_cell(here, blank):
    table = quiet(write(BOTH), only=["half"], seeds=1).table
    data, row = bmr.load("digits.npz"), table.iloc[1]
    options = {"epochs": 2, "batch_size": 40, "kept": 0.25, "start": 0.5, "stop": 1.0, "draws": 2}
    alone = bmr.compare(
        "mlp:3",
        data,
        priors={"g": bmr.Gaussian()},
        routes=["reduced"],
        baselines=(),
        seeds=1,
        settings=Settings(**options),
        progress=False,
    ).iloc[0]
    for name in (
        "accuracy",
        "nll",
        "brier",
        "ece",
        "parameters",
        "kept_parameters",
        "kept",
        "delta_f",
    ):
        assert row[name] == alone[name], name
    assert {name: row[f"option_{name}"] for name in options} == options and row["method"] == "half"
    folder = Path("out/cells") / row["cell"]
    weights = load_file(folder / "model.safetensors")
    assert sum(int(w.count_nonzero()) for w in weights.values()) == row["kept_parameters"] and row[
        "kilobytes"
    ] * 1000 == os.path.getsize(folder / "model.safetensors")
    small = bmr.shrinking.shrink_plan(
        torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 3), torch.nn.ReLU(), torch.nn.Linear(3, 10)
        ),
        weights_alive(weights),
        data.x_test,
    )
    assert row["size"] == small.parameters[1] / small.parameters[0] and 0 < row["ece_mass"] < 1
    history = pd.read_csv(folder / "history.csv")
    assert history["elbo"].iloc[-1] == row["elbo"] and "step" in (folder / "log.txt").read_text()
    config = json.loads((folder / "settings.json").read_text())
    assert (
        config["options"] == options
        and config["seed"] == 0
        and config["fingerprint"]
        and config["versions"]["torch"] == torch.__version__
    )


def weights_alive(weights):
    return {name: w != 0 for name, w in weights.items()}


@pytest.mark.slow
def test_cells_are_runs(here, blank, capsys):
    """That of a method with a posterior can be reduced and exported, that of a baseline exported:
    both as the weights that the cell has already.
    """
    more = '[[method]]\nmethod = "magnitude"\nkept = 0.3\n[[method]]\nmethod = "ensemble"\n'
    table = quiet(write(BOTH + more), seeds=1).table
    cells = {row["method"]: Path("out/cells") / row["cell"] for _, row in table.iterrows()}
    kept = dict(zip(table["method"], table["kept"], strict=True))
    for method in ("MAP & co", "half", "magnitude"):
        out = Path(method)
        assert main(["export", str(cells[method]), "--seconds", "0", "--out", str(out)]) == 0
        own, exported = (load_file(p / "model.safetensors") for p in (cells[method], out))
        assert own.keys() == exported.keys() and all(
            torch.equal(own[name], exported[name]) for name in own
        )
        assert json.loads((out / "report.json").read_text())["kept"] == pytest.approx(kept[method])
    assert main(["reduce", str(cells["half"]), "--kept", "0.2", "--draws", "2"]) == 0
    capsys.readouterr()
    for argv, message in (
        (["reduce", cells["magnitude"]], "expected a fit with a posterior, got .* magnitude"),
        (["export", cells["ensemble"]], "expected one network, got an ensemble"),
        (["export", cells["magnitude"], "--ensemble", "2"], "expected a run with a posterior"),
    ):
        assert main([*map(str, argv)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and re.search(message, err), err
    (cells["half"] / "row.json").unlink()
    with pytest.raises(bmr.errors.ModelError, match="is a cell that is not finished"):
        load_run(cells["half"])
    with np.load("digits.npz") as arrays:
        np.savez("digits.npz", **{**arrays, "y_test": (arrays["y_test"] + 1) % 10})
    os.utime("digits.npz", (1, 1))
    with pytest.raises(bmr.errors.ModelError, match="expected the data and the model file of its"):
        load_run(cells["magnitude"]).data()


def test_held_out_rows(here, blank):
    rows = (
        quiet(write(PLAIN), seeds=1).table.iloc[0],
        quiet("study.toml", seeds=1, validation=0.25).table.iloc[0],
    )
    assert [row["data"] for row in rows] == ["digits.npz", "digits.npz (validation)"] and rows[0][
        "nll"
    ] != rows[1]["nll"]
    assert rows[1]["accuracy"] * 40 == pytest.approx(round(rows[1]["accuracy"] * 40)), (
        "a quarter of 160 rows is scored"
    )


def test_a_cell_that_fails_fails_alone(here, blank, runs, monkeypatch, capsys):
    good = methods.METHODS["plain"]

    def bad(build, data, seed, options, progress):
        trained = good(build, data, seed, options, progress)
        if seed == 0:
            print("so far so good")
            raise ValueError("no\nluck")
        return trained

    monkeypatch.setitem(methods.METHODS, "plain", bad)
    write(BOTH)
    assert main(["study", "study.toml", "--out", "out", "--quiet", "--only", "MAP & co"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert (
        len(errors) == 1
        and errors[0].startswith("pyro-bmr: mlp-3_digits.npz_plain_seed-0_")
        and errors[0].endswith(" failed: ValueError: no luck")
    )
    folder = Path("out/cells") / errors[0].split()[1]
    log = (folder / "log.txt").read_text()
    assert "so far so good" in log and "Traceback" in log and not (folder / "row.json").exists()
    assert pd.read_csv("out/results.csv")["seed"].tolist() == [1]
    assert (
        "no luck" in Path("out/report.md").read_text()
        and "ValueError: no luck" in Path("out/report.html").read_text()
    )
    assert cells_left(declare("study.toml"), "out", only=["MAP & co"])[0]["state"].tolist() == [
        "failed",
        "finished",
    ]
    monkeypatch.setitem(methods.METHODS, "plain", good)
    runs.clear()
    done = quiet("study.toml", only=["MAP & co"])
    assert (
        [run[:2] for run in runs] == [("plain", 0)]
        and not done.failures
        and not (folder / "failed.txt").exists()
        and len(done.table) == 2
    )


def test_a_stopped_study_keeps_what_is_finished(here, blank, monkeypatch, capsys):
    good = methods.METHODS["plain"]

    def stopped(build, data, seed, options, progress):
        trained = good(build, data, seed, options, progress)
        if seed == 1:
            raise KeyboardInterrupt
        return trained

    monkeypatch.setitem(methods.METHODS, "plain", stopped)
    assert main(["study", write(PLAIN), "--out", "out", "--quiet"]) == 130
    assert capsys.readouterr().err == "pyro-bmr: stopped\n"
    assert pd.read_csv("out/results.csv")["seed"].tolist() == [0] and not list(
        Path("out").rglob("*.tmp")
    )
    assert cells_left(declare("study.toml"), "out")[0]["state"].tolist() == ["finished", "open"]


def test_damaged_rows_are_errors_of_one_line(here, blank):
    done = quiet(write(PLAIN), seeds=1)
    row = done.folder / "cells" / done.table["cell"][0] / "row.json"
    good = row.read_text()
    digit = good.index('"nll": ') + 10
    flipped = f"{good[:digit]}{(int(good[digit]) + 1) % 10}{good[digit + 1 :]}"
    for content in ("", "[1]", "{}", '{"nll": "1"}', "[" * 100_000, good[:-6], flipped):
        row.write_text(content)
        with pytest.raises(
            bmr.PyroBMRError, match=r"row\.json' is .*remove .* to run the cell again"
        ):
            quiet("study.toml", seeds=1)


def test_the_bar_in_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(cell_log, "_SECONDS_BETWEEN_LINES", math.inf)
    with (tmp_path / "log.txt").open("w") as file:
        log = cell_log.Log(file)
        for text in ("\r  0%", "\r 50%", "words\n", "\r100%", "\r    "):
            log.write(text)
        log.close()
    assert (tmp_path / "log.txt").read_text() == "words\n100%\n"


class Page(HTMLParser):
    """What a report has in it."""

    VOID = ("meta", "img", "br", "hr", "input", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.pictures, self.words = [], set(), [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(["", attrs.get("data-value")])
        if tag == "img":
            self.pictures.append(attrs["src"])
        assert not {"href", "srcset", "onload"} & set(attrs) and (
            tag == "img" or "src" not in attrs
        )

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1][0] += data


@pytest.mark.slow
def test_the_report(here):
    done = quiet(write(BOTH))
    # to the last digit
    table = pd.read_csv(
        "out/results.csv", converters=dict.fromkeys(done.table.select_dtypes("float"), float)
    )
    pd.testing.assert_frame_equal(
        table, done.table.reset_index(drop=True), check_exact=True, check_dtype=False
    )
    text = Path("out/report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert (
        "http" not in text
        and "url(" not in text
        and "@import" not in text
        and "link" not in page.tags
    )
    files = sorted(Path("out/pictures").iterdir())
    assert [file.name for file in files] == [
        f"1-{name}.png"
        for name in ("cost", "fronts", "layers", "learning", "reliability", "weights")
    ]
    assert sorted(page.pictures) == sorted(
        f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" for file in files
    )
    names = [name for name, _ in page.rows[0]]
    assert names[:5] == ["model", "data", "method", "target", "seeds"] and {
        "accuracy",
        "nll",
        "ece_mass",
        "size",
        "seconds",
        "step_ratio",
    } < set(names)
    groups = [
        table[table["method"] == "MAP & co"],
        table[table["option_kept"] == 0.5],
        table[table["option_kept"] == 0.25],
    ]
    for row, group in zip(page.rows[1:], groups, strict=True):
        assert [row[2][0], row[4][0]] == [group["method"].iloc[0], "2"]
        for name, (shown, value) in list(zip(names, row, strict=True))[5:]:
            a, b = group[name]
            if name == "step_ratio":  # of the first seed alone
                assert math.isnan(b) and float(value) == a and shown == f"{a:.2f}"
                continue
            if name == "converged":
                said = {0: "no", 1: "50% of seeds", 2: "yes"}
                assert shown == ("" if math.isnan(a + b) else said[int(a + b)])
                continue
            if math.isnan(a + b):  # a point estimate has no bound on its evidence
                assert value == "" and name in ("elbo", "delta_f", "scale", "best_epoch")
                continue
            assert float(value) == pytest.approx((a + b) / 2, rel=1e-12, abs=1e-15), name
            digits = len(shown.split(" ")[0].partition(".")[2])
            spread = f"{float(value):.{digits}f} ± {abs(a - b) / math.sqrt(2):.{digits}f}"
            base = group[f"base_{name}"].mean() if name in ("accuracy", "nll") else math.nan
            mark = float(value) <= base if name == "accuracy" else float(value) >= base
            assert shown == spread + (" *" if mark else ""), name
    words = "".join(page.words)
    assert (
        BOTH.strip() in words
        and "6 of 6 cells finished, 0 failed; 2 seeds" in words
        and f"torch {torch.__version__}" in words
    )
    markdown = Path("out/report.md").read_text(encoding="utf-8")
    assert all(f"| {row[5][0]} |" in markdown for row in page.rows[1:]) and all(
        f"(pictures/{file.name})" in markdown for file in files
    )
    said = conclusions(table)
    assert said and all(f"\n- {sentence}\n" in markdown for sentence in said)
    assert re.match("In log score (MAP & co|half at 50 %|half at 25 %) is first", said[0])
    assert Path("out/study.toml").read_text() == BOTH


def test_an_axis_of_fractions_ends_at_100_percent():
    for least in (1.0, 0.03):
        figure, axes = matplotlib.pyplot.subplots()
        axes.plot([least, 1.0], [0.5, 0.6])
        curves.in_percent(axes, "x", "kept")
        figure.canvas.draw()
        low, high = axes.get_xlim()
        assert (
            low < least
            and 1 < high < 2
            and [label.get_text() for label in axes.get_xticklabels()][-1] == "100 %"
        )
        matplotlib.pyplot.close(figure)


@pytest.mark.slow
def test_a_report_of_real_targets(here):
    declaration = {
        "name": "lines",
        "data": "diabetes",
        "models": "linear_regression",
        "settings": {"epochs": 1},
        "method": [{"method": "fitted", "draws": 2}],
    }
    row = quiet(declaration).table.iloc[0]
    assert 20 < row["rmse"] < 300 and math.isnan(row["ece"]) and math.isnan(row["size"])
    page = Page(Path("out/report.html").read_text(encoding="utf-8"))
    names = [name for name, _ in page.rows[0]]
    assert "rmse" in names and "ece" not in names and "size" not in names
    assert (
        sorted(file.name for file in Path("out/pictures").iterdir())
        == ["1-cost.png", "1-fronts.png", "1-learning.png"]
        and len(page.pictures) == 3
    )
    assert json.loads(Path("out/study.json").read_text()) == declaration


@pytest.mark.slow  # two interpreters start; the rest of this file runs in one
def test_the_same_numbers_in_two_processes(here, blank):
    write(BOTH)
    # processes of another study, which stand elsewhere
    joblib.Parallel(n_jobs=2)(joblib.delayed(os.chdir)(os.sep) for _ in range(8))
    tables = [
        quiet("study.toml", f"out-{jobs}", jobs=jobs, only=["half"], seeds=1).table
        for jobs in (1, 2)
    ]
    pd.testing.assert_frame_equal(
        *(table.drop(columns=["seconds", "step_ratio"]) for table in tables), check_exact=True
    )


def test_size_is_what_is_left_without_dead_units():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    x, y = torch.randn(20, 4), torch.randint(3, (20,))

    def size():
        trained = methods.Trained(
            None, dict(net.named_parameters()), net, pd.DataFrame(), 5, seconds=1.0
        )
        return measures._sizes(trained, bmr.Data("made up", x, y, x, y, 3), None)["size"]

    assert size() == 1
    with torch.no_grad():
        net[2].weight[:, 1] = 0
    assert size() == (5 * 4 + 5 + 3 * 5 + 3) / (6 * 4 + 6 + 3 * 6 + 3)


@pytest.mark.parametrize("classes", [3, None])
def test_step_ratio_is_the_training_over_as_many_plain_steps(classes, monkeypatch):
    rows, clock = [], [0.0]

    class Slow(torch.nn.Linear):
        def forward(self, x):
            rows.append(len(x))
            clock[0] += 0.01
            return super().forward(torch.nn.functional.dropout(x, 0.5, self.training))

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    x = torch.randn(20, 4)
    y = torch.randint(3, (20,)) if classes else torch.randn(20)
    net = Slow(4, classes or 1)
    before = copy.deepcopy(net.state_dict())
    trained = methods.Trained(
        None, {}, net, pd.DataFrame({"step": [4, 8, 12]}), 5, seconds=12 * 0.04
    )
    state = torch.get_rng_state()
    data = bmr.Data("made up", x, y, x, y, classes)
    assert measures.step_ratio(trained, data) == pytest.approx(4)
    assert set(rows) == {5} and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), (
        "the trained network was trained further"
    )
    assert math.isnan(measures.step_ratio(dataclasses.replace(trained, network=None), data))


def test_scores_under_shift_if_asked(here, blank):
    table = quiet(
        write(
            PLAIN.replace("seeds = 2", "seeds = 1\nshift = true").replace(
                "epochs = 2", "epochs = 30"
            )
        )
    ).table
    nll = [table[f"shift_nll_{severity}"][0] for severity in range(1, 6)]
    assert table["nll"][0] < nll[0] < nll[2] < nll[4] and math.isnan(table["ood_auroc"][0])
    assert not any(name.startswith("shift") for name in quiet(write(PLAIN), "plain", seeds=1).table)


def test_a_cell_that_is_being_trained_is_waited_for(here, monkeypatch):
    begun, go_on, runs = threading.Event(), threading.Event(), []
    plain = methods.METHODS["plain"]

    def slow(*given):
        runs.append(given)
        begun.set()
        assert go_on.wait(60)
        return plain(*given)

    cell, said = declare(write(PLAIN)).cells[0], []
    monkeypatch.setitem(methods.METHODS, "plain", slow)

    def run():
        said.append(cell_folder.run_cell(cell, Path("cells")))

    threads = [threading.Thread(target=run) for _ in range(2)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive() and len(runs) == 1
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert said == [(), ()] and len(runs) == 1
    assert not list(Path("cells").rglob(".lock"))


@pytest.mark.slow
def test_control_c(here):
    write(BOTH.replace("seeds = 2", "seeds = 40").replace("epochs = 2", "epochs = 20"))
    command = [
        sys.executable,
        "-m",
        "pyro_bmr",
        "study",
        "study.toml",
        "--jobs",
        "2",
        "--out",
        "out",
    ]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    until = time.monotonic() + 300
    while len(list(Path("out").rglob("row.json"))) < 3 and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130 and error == "pyro-bmr: stopped\n"
    finished = len(list(Path("out").rglob("row.json")))
    assert (
        3 <= finished < 120
        and len(pd.read_csv("out/results.csv")) == finished
        and Path("out/report.html").exists()
    )


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("distributed") is None,
    reason="distributed is not installed: pip install 'pyro_bmr[cluster]'",
)
@pytest.mark.filterwarnings("default")
def test_on_a_dask_cluster(here, blank):
    from distributed import Client, LocalCluster

    write(BOTH)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
        joblib.parallel_config(backend="dask", wait_for_workers_timeout=300),
    ):
        table = quiet("study.toml", "on-cluster").table
        cells = sum(
            len(tasks)
            for tasks in client.run(lambda dask_worker: list(dask_worker.state.log)).values()
        )
    assert cells > 0, "the cluster has seen no task"
    pd.testing.assert_frame_equal(
        table.drop(columns=["seconds", "step_ratio"]),
        quiet("study.toml", "alone").table.drop(columns=["seconds", "step_ratio"]),
        check_exact=True,
    )


COUNTED = """
import contextlib
import os
import time
from pathlib import Path

import torch

import pyro_bmr as bmr


def build(data, prior):
    with open("started.txt", "a") as file:
        print(os.getpid(), file=file)
    finished = list(Path("on-cluster").glob("cells/*/row.json"))
    if os.getpid() != {parent} and finished:
        with contextlib.suppress(FileExistsError), open("chosen.txt", "x") as file:
            print(os.getpid(), file=file, flush=True)
            time.sleep(600)  # it is killed meanwhile
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    return bmr.BayesianNetwork(net, prior, data.likelihood())
"""


def kill_one(killed):
    """Kills the first process that began a cell after another was finished; it waits for that."""
    chosen = Path("chosen.txt")
    for _ in range(6000):
        if chosen.exists() and (words := chosen.read_text().split()):
            os.kill(int(words[0]), signal.SIGKILL)
            killed.append(words[0])
            return
        time.sleep(0.05)


def check_killed_worker(cluster):
    """A study on a `cluster` of two workers, one of which is killed, has the rows of one in this
    process; only the cell that the worker had begun is trained again.
    """
    Path("counted.py").write_text(COUNTED.replace("{parent}", str(os.getpid())))
    write(PLAIN.replace('"mlp:3"', '"counted.py"').replace("seeds = 2", "seeds = 8"))
    killed: list[str] = []
    killer = threading.Thread(target=kill_one, args=(killed,))
    with cluster:
        killer.start()
        table = quiet("study.toml", "on-cluster").table
        killer.join()
    started = Path("started.txt").read_text().split()
    Path("started.txt").unlink()
    alone = quiet("study.toml", "alone").table
    undisturbed = Path("started.txt").read_text().split()
    # The cluster may start a new worker in its place, after the other has trained the rest.
    assert len(killed) == 1 and killed[0] != str(os.getpid())
    assert len(set(started) - {killed[0], str(os.getpid())}) in (1, 2), "those that went on"
    assert len(started) == len(undisturbed) + 1
    times = ["seconds", "step_ratio"]
    pd.testing.assert_frame_equal(
        table.drop(columns=times), alone.drop(columns=times), check_exact=True
    )


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("distributed") is None,
    reason="distributed is not installed: pip install 'pyro_bmr[cluster]'",
)
@pytest.mark.filterwarnings("default")
def test_a_killed_worker_of_dask_loses_nothing(here, blank):
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        check_killed_worker(joblib.parallel_config(backend="dask", wait_for_workers_timeout=300))


@pytest.mark.skipif(
    shutil.which("git") is None, reason="git is not installed (apt-get install git)"
)
def test_the_commit_says_whether_the_code_was_changed_and_not_the_pages(tmp_path, monkeypatch):
    def git(*words):
        words = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words)
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()

    code, page = tmp_path / "pyro_bmr/experiments/folder.py", tmp_path / "docs/study.md"
    for path in (code, page):
        path.parent.mkdir(parents=True)
        path.write_text("as committed")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    commit = git("rev-parse", "--short", "HEAD")
    monkeypatch.setattr(cell_folder, "__file__", str(code))
    page.write_text("a new table")
    assert cell_folder.versions.__wrapped__()["commit"] == commit
    code.write_text("other code")
    assert cell_folder.versions.__wrapped__()["commit"] == commit + "+"
