"""Files that belong together are all of one time, whenever the process dies; a full disk loses
nothing; a folder has one owner; a reader is linear.
"""

import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file

import pyro_bmr as bmr
from pyro_bmr import files
from pyro_bmr.experiments import log as cell_log
from pyro_bmr.experiments import plots, report, runs
from pyro_bmr.experiments.compare import comparison
from pyro_bmr.experiments.folder import run_cell
from pyro_bmr.exporting import deployment
from pyro_bmr.exporting.formats import FORMATS
from pyro_bmr.files import locked, reading, replacing
from pyro_bmr.fitting import checkpoint_file as checkpoint_files
from pyro_bmr.formulas.diagonal import Diagonal
from tests.experiments.test_runs import loaders

DATA = bmr.Data("lines", *(torch.linspace(-1, 1, 40).view(20, 2), torch.linspace(-1, 1, 20)) * 2)


class Killed(BaseException):
    """In the place of SIGKILL: nothing of the library catches it."""


def moments(version: float, site="w") -> bmr.Posterior:
    return bmr.Posterior.from_moments(
        {site: torch.full((3,), version)}, {site: torch.full((3,), 0.5)}, bmr.Gaussian(0.7)
    )


def network(version: float, bias=True) -> torch.nn.Module:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=bias))
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, version)
    return net


class OfRun:
    """A run, read with the network beside its posterior."""

    def write(self, folder, version):
        fit = SimpleNamespace(posterior=moments(version), program=network(version))
        runs.save_run(
            fit,
            folder,
            {
                "model": "mlp",
                "data": "digits",
                "target": None,
                "prior": "gaussian",
                "seed": version,
                "temperature": 1.0,
            },
        )

    def read(self, folder):
        run = runs.load_run(folder, reduced=True)
        return {
            run.settings["seed"],
            float(run.posterior["w"].mean[0]),
            float(load_file(folder / "network.safetensors")["0.weight"][0, 0]),
        }


class OfRunReduced(OfRun):
    """The reduction of a run, in the place of another one."""

    def write(self, folder, version):
        if not (folder / "settings.json").exists():
            super().write(folder, 0.0)
        reduction = bmr.reduce(moments(version), to=bmr.Gaussian(scale=0.5))
        runs.load_run(folder).reduced(reduction, {"to": version})

    def read(self, folder):
        run = runs.load_run(folder, reduced=True)
        wanted = bmr.reduce(moments(run.reduction["to"]), to=bmr.Gaussian(scale=0.5)).posterior
        assert torch.equal(run.posterior["w"].mean, wanted["w"].mean)
        return {run.reduction["to"]}


class OfReduction:
    """A reduction."""

    def write(self, folder, version):
        bmr.reduce(moments(version), to=bmr.Gaussian(scale=0.5)).save(folder)

    def read(self, folder):
        reduction = bmr.Reduction.load(folder)
        wanted = bmr.reduce(reduction.before, to=bmr.Gaussian(scale=0.5))
        assert (
            torch.equal(reduction.posterior["w"].mean, wanted.posterior["w"].mean)
            and reduction.delta_f == wanted.delta_f
        )
        return {float(reduction.before["w"].mean[0])}


class OfWeights:
    """An exported network and its report."""

    def write(self, folder, version):
        bmr.save(network(version), folder, {"version": version})

    def read(self, folder):
        try:
            report = json.loads((folder / "report.json").read_text())
        except FileNotFoundError:
            raise bmr.PyroBMRError("no report") from None
        return {report["version"], float(load_file(folder / "model.safetensors")["0.weight"][0, 0])}


class OfDeployment:
    """A deployed network, read by its own loaders; the second has no bias."""

    def write(self, folder, version):
        bmr.deploy(
            network(version, version == 1.0),
            folder,
            torch.ones(2, 2),
            formats=["half"],
            report={"version": version},
            seconds=0,
        )

    def read(self, folder):
        try:
            own = loaders(folder)
        except FileNotFoundError:
            raise bmr.PyroBMRError("no network.py") from None
        nets = [own.load(), own.load("model-half.safetensors")]
        return {
            json.loads((folder / "report.json").read_text())["version"],
            *(float(next(net.parameters()).detach()[0, 0]) for net in nets),
        }


KINDS = (OfRun, OfRunReduced, OfReduction, OfWeights, OfDeployment)


def dying(patch, at):
    """Every file of the library gets its name by `os.replace`; the one numbered `at` does not."""
    calls, replace = [], os.replace

    def maybe(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise Killed
        replace(*arguments)

    patch.setattr(files.os, "replace", maybe)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_between_any_two_files_leaves_one_state_or_an_error(kind, tmp_path, monkeypatch):
    made, seen, at = kind(), set(), 0
    made.write(tmp_path / "first", 1.0)
    assert made.read(tmp_path / "first") == {1.0}
    while True:
        at += 1
        folder = shutil.copytree(tmp_path / "first", tmp_path / str(at))
        with monkeypatch.context() as patch:
            calls = dying(patch, at)
            try:
                made.write(folder, 2.0)
            except Killed:
                pass
            else:
                break
        try:
            (state,) = made.read(folder)  # one of the two, in all files
            seen.add(state)
        except bmr.PyroBMRError as error:
            assert "\n" not in str(error)
            seen.add("refused")
        made.write(folder, 2.0)  # the mend
        assert made.read(folder) == {2.0} and not [
            path for path in folder.rglob("*") if path.name.startswith(".")
        ]
    assert len(calls) == at - 1 >= 3 and {"refused"} <= seen <= {1.0, 2.0, "refused"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_changes_nothing(kind, tmp_path, monkeypatch):
    made = kind()
    made.write(tmp_path, 1.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(path, text, **_):
        with path.open("w") as file:
            file.write(text[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as patch,
        pytest.raises(bmr.PyroBMRError, match="cannot write '.*: No space left on device"),
    ):
        patch.setattr(Path, "write_text", full)
        made.write(tmp_path, 2.0)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {p: b for p, b in after.items() if "__pycache__" not in p.parts} == {
        p: b for p, b in before.items() if "__pycache__" not in p.parts
    }
    assert made.read(tmp_path) == {1.0}


def test_files_of_two_fits_are_told_apart(tmp_path):
    of_run, of_reduced = OfRun(), OfRunReduced()
    for version in (1.0, 2.0):
        of_run.write(tmp_path / str(version), version)
    for name in ("posterior.safetensors", "network.safetensors"):
        folder = tmp_path / name
        of_run.write(folder, 1.0)
        (folder / name).write_bytes((tmp_path / "2.0" / name).read_bytes())
        with pytest.raises(
            bmr.errors.ModelError,
            match=(
                rf"{name}': expected the SHA-256 in settings\.json, got another: .*fit into the"
                r" folder again"
            ),
        ):
            runs.load_run(folder)
    of_reduced.write(tmp_path / "1.0", 3.0)
    stale = runs.load_run(tmp_path / "1.0")
    of_run.write(tmp_path / "1.0", 4.0)  # a fit, while another process reduces what was there
    assert runs.load_run(tmp_path / "1.0", reduced=True).reduction == {}
    stale.reduced(bmr.reduce(stale.posterior, to=bmr.Gaussian(scale=0.5)), {"to": 1.0})
    with pytest.raises(
        bmr.errors.ModelError,
        match="the reduction of another fit than that in the folder; reduce again",
    ):
        runs.load_run(tmp_path / "1.0", reduced=True)
    assert runs.load_run(tmp_path / "1.0").settings["seed"] == 4.0
    bmr.reduce(moments(1.0), to=bmr.Gaussian(scale=0.5)).save(tmp_path / "a")
    bmr.reduce(moments(2.0), to=bmr.Gaussian(scale=0.5)).save(tmp_path / "b")
    (tmp_path / "a" / "before.safetensors").write_bytes(
        (tmp_path / "b" / "before.safetensors").read_bytes()
    )
    with pytest.raises(
        bmr.errors.ReductionError,
        match=(
            r"before\.safetensors': expected the SHA-256 in reduction\.json, got another: .*reduce"
            r" and save again"
        ),
    ):
        bmr.Reduction.load(tmp_path / "a")


def test_a_run_of_the_version_before_is_read(tmp_path):
    OfRun().write(tmp_path, 1.0)
    whole = (tmp_path / "settings.json").read_text()
    settings = json.loads(whole)
    del settings["files"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    runs.load_run(tmp_path).reduced(
        bmr.reduce(moments(1.0), to=bmr.Gaussian(scale=0.5)), {"to": 1.0}
    )
    assert runs.load_run(tmp_path, reduced=True).reduction["to"] == 1.0
    reduction = json.loads((tmp_path / "reduction.json").read_text())
    (tmp_path / "reduction.json").write_text(
        json.dumps({k: v for k, v in reduction.items() if k not in ("files", "fit")})
    )
    for text in (json.dumps(settings), whole):
        (tmp_path / "settings.json").write_text(text)
        assert runs.load_run(tmp_path, reduced=True).reduction["to"] == 1.0


@pytest.mark.parametrize(
    "names",
    ["x", 3, "outside", {"posterior.safetensors": None}, {"gone": "0"}, ["a"]],
)
def test_digests_that_are_none(names, tmp_path):
    folder = tmp_path / "run"
    OfRun().write(folder, 1.0)
    if names == "outside":  # a file that is there, with its own digest
        (tmp_path / "other").write_text("")
        names = {"../other": files.digest(tmp_path / "other")}
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "files": names}))
    with pytest.raises(bmr.errors.ModelError, match=r"^[^\n]*fit into the folder again$"):
        runs.load_run(folder)


def test_warnings_of_a_reduction_that_are_none(tmp_path):
    OfReduction().write(tmp_path, 1.0)
    about = json.loads((tmp_path / "reduction.json").read_text())
    (tmp_path / "reduction.json").write_text(json.dumps({**about, "warnings": 3}))
    with pytest.raises(
        bmr.errors.ReductionError,
        match=r"a damaged reduction \('int' object is not iterable\); reduce and save again",
    ):
        bmr.Reduction.load(tmp_path)


def test_another_deployment_leaves_no_format_of_the_one_before(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    bmr.deploy(
        network(1.0),
        tmp_path,
        torch.ones(2, 2),
        formats=["half"],
        ensemble={"0.weight": torch.ones(1, 2, 2), "0.bias": torch.ones(1, 2)},
        seconds=0,
    )
    bmr.deploy(network(2.0), tmp_path, torch.ones(2, 2), formats=["state_dict"], seconds=0)
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names == {"mine.txt", "model.safetensors", "network.py", "report.json", "state_dict.pt"}
    assert deployment._written_before(tmp_path / "none") == []


def test_what_is_in_the_way_is_said_before_anything_goes(tmp_path):
    OfWeights().write(tmp_path, 1.0)
    report = (tmp_path / "report.json").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(bmr.PyroBMRError, match=r"model\.safetensors': it is a folder"):
        OfWeights().write(tmp_path, 2.0)
    assert (tmp_path / "report.json").read_bytes() == report
    (tmp_path / "file").write_text("")
    for kind in KINDS:
        with pytest.raises(bmr.PyroBMRError, match="cannot write to .*file"):
            kind().write(tmp_path / "file", 1.0)


def test_what_a_killed_process_left_goes_a_day_later(tmp_path):
    for name, age in ((".writing-old", 90_000), (".writing-new", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("")
        os.utime(tmp_path / name, (files.time.time() - age,) * 2)
    with replacing(tmp_path, "head") as stage:
        (stage / "head").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing-new", "head"]


def test_a_stage_of_another_process_may_go_at_any_moment(tmp_path):
    # listed, and no longer there when its age is asked for
    (tmp_path / ".writing-gone").symlink_to("nowhere")
    with replacing(tmp_path, "head") as stage:
        (stage / "head").write_text("")
    assert (tmp_path / "head").exists()


def test_a_picture_and_a_history_are_whole_or_not_there(tmp_path, monkeypatch):
    def half(self, path, **_):
        Path(path).write_bytes(b"\x89PN")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", half)
    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    with pytest.raises(bmr.PyroBMRError, match=r"cannot write '.*a\.png': No space left on device"):
        plots.save_figure(plt.figure(figsize=(0.1, 0.1)), tmp_path / "a.png")
    assert not plt.get_fignums() and (tmp_path / "a.png").read_bytes() == b"old"
    (cell,) = line_fits().cells
    assert run_cell(cell, tmp_path / "cells") is None
    written = {path.name: path for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(written) == [
        "a.png",
        "failed.txt",
        "log.txt",
        "model.safetensors",
        "report.json",
        "settings.json",
    ]
    assert re.search(
        r"cannot write '.*history\.csv': No space left on device",
        written["failed.txt"].read_text(),
    )


def line_fits():
    """The declaration of one cheap fit."""
    priors, settings = {"p": bmr.Gaussian(0.5)}, bmr.Settings(epochs=1)
    return comparison("linear_regression", DATA, priors, ["fitted"], 1, settings, baselines=())


def test_results_without_their_settings_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *args: [])
    bmr.study(line_fits(), tmp_path, progress=False)
    (path,) = tmp_path.rglob("settings.json")
    path.unlink()
    with pytest.raises(
        bmr.PyroBMRError, match=r"settings\.json' is not what a study writes \(No such file"
    ):
        bmr.study(line_fits(), tmp_path, progress=False)


def test_a_log_that_cannot_be_written_is_no_reason_to_fail(tmp_path):
    class Full:
        def write(self, *text):
            raise OSError(errno.ENOSPC, "full")

        close = flush = write

    log = cell_log.Log(Full())
    assert log.write("words\n") == 6 and log.write("\r100%") == 5
    log.close()


def holds(folder, ready, leave):
    with locked(folder):
        ready.set()
        leave.wait(60)


def test_a_folder_has_one_owner_until_its_process_ends(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=holds, args=(tmp_path, ready, leave))
    other.start()
    assert ready.wait(60)
    with (
        pytest.raises(
            bmr.errors.FitError,
            match=(
                rf"is in use by process {other.pid} on .*; wait for its end, or choose another"
                r" folder"
            ),
        ) as caught,
        locked(tmp_path, bmr.errors.FitError),
    ):
        raise AssertionError
    assert "\n" not in str(caught.value)
    other.kill()
    other.join()
    with (
        locked(tmp_path),
        pytest.raises(bmr.PyroBMRError, match=f"process {os.getpid()}"),
        locked(tmp_path),
    ):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_who_uses_a_folder_has_it_alone(tmp_path, monkeypatch):
    x = torch.randn(20, 2)

    def fit(**options):
        program = bmr.BayesianNetwork(torch.nn.Linear(2, 1), bmr.Gaussian(), bmr.Normal())
        return bmr.fit(
            program, (x, x[:, 0]), epochs=1, progress=False, checkpoint=tmp_path, **options
        )

    data, declared = (
        DATA,
        {
            "name": "n",
            "data": "diabetes",
            "models": "linear_regression",
            "method": [{"method": "fitted", "epochs": 1}],
        },
    )
    with locked(tmp_path):
        with pytest.raises(bmr.errors.FitError, match=f"in use by process {os.getpid()}"):
            fit()
        with pytest.raises(bmr.PyroBMRError, match="in use by"):
            bmr.compare(
                "linear_regression",
                data,
                priors={"g": bmr.Gaussian()},
                out=tmp_path,
                progress=False,
            )
        with pytest.raises(bmr.PyroBMRError, match="in use by"):
            bmr.study(declared, tmp_path, progress=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".owner"]
    fit()
    with pytest.raises(bmr.errors.FitError, match="another fit"):
        fit(seed=1)
    assert fit().seed == 0


def test_reading_says_one_line(tmp_path):
    for problem, words in (
        (KeyError("w"), "no 'w'"),
        (OSError(2, "No such file"), "No such file"),
        (RuntimeError("a\nb"), "a b"),
        (MemoryError(), "MemoryError"),
    ):
        with (
            pytest.raises(bmr.errors.DataError) as caught,
            reading("'f' is nothing", bmr.errors.DataError, "mend it"),
        ):
            raise problem
        assert str(caught.value) == f"'f' is nothing ({words}); mend it"


def calls_of(action):
    """How many functions are called, those in C as well."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_the_work_grows_as_the_number_of_sites(tmp_path):
    counts = []
    for sites in (20, 20, 80):  # the first has what is done once only
        names = [f"s{k}" for k in range(sites)]
        whole = bmr.Posterior(
            {
                name: bmr.Site(
                    torch.ones(2),
                    torch.ones(2),
                    Diagonal(torch.zeros(2), torch.ones(2)),
                    bmr.Gaussian(1.0),
                )
                for name in names
            }
        )
        reduction = bmr.reduce(whole, to=bmr.Gaussian(scale=0), per="layer")
        state = {name: torch.ones(2) for name in names}
        actions = {
            "save": lambda whole=whole: whole.save(tmp_path / "many.safetensors"),
            "load": lambda: bmr.Posterior.load(tmp_path / "many.safetensors"),
            "reduce": lambda whole=whole: bmr.reduce(whole, to=bmr.Gaussian(scale=0)),
            "table": reduction.table,
            "save reduction": lambda reduction=reduction: reduction.save(tmp_path / "many"),
            "load reduction": lambda: bmr.Reduction.load(tmp_path / "many"),
            "checkpoint": lambda state=state: checkpoint_files.write(
                tmp_path / "many.checkpoint", {}, state
            ),
        }
        counts.append({name: calls_of(action) for name, action in actions.items()})
    grown = {name: counts[2][name] / counts[1][name] for name in counts[0]}
    assert max(grown.values()) < 4.4, grown


@pytest.mark.parametrize("name", ["state_dict", "safetensors", "program"])
def test_what_torch_writes_to_a_full_disk_is_an_error_too(name, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises((OSError, SafetensorError), match="too large"):
            FORMATS[name].write(network(1.0), torch.ones(2, 2), tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
