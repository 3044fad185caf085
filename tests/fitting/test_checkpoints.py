"""Fits that are stopped and go on: to the bit as if never stopped, at every step, and never from
what is damaged or of another fit.
"""

import json
import math
import os
import shutil
import signal
from functools import partial

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.cli.commands import main
from pyro_bmr.fitting import checkpoint_file as checkpoint_files
from pyro_bmr.fitting import checkpoints, flat_vectors, site_prior
from pyro_bmr.fitting import loop as fitting
from tests.fitting.test_fit import blobs, classifier, linear, regression

fit = partial(bmr.fit, epochs=4, batch_size=32, progress=False)
REDUCE = bmr.Every(epochs=0.5, start=0.3, stop=0.9, kept=0.3)


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch, request):
    """Waiting for the disk takes longer than all else here; one test has it."""
    if request.node.name != "test_a_checkpoint_is_on_the_disk_before_it_has_its_name":
        monkeypatch.setattr("pyro_bmr.files._sync", lambda path: None)


class Killed(BaseException):
    """In the place of a SIGKILL."""


def stopped(call, folder, monkeypatch, at, copies=()):
    """Runs `call` until its checkpoint of step `at` is there; after the steps `copies` the folder
    is copied to one named by the step beside it.
    """
    save = checkpoints.CheckpointWriter.save

    def save_and_die(self, step, state):
        save(self, step, state)
        if step in copies:
            shutil.copytree(folder, folder.with_name(str(step)))
        if step == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.CheckpointWriter, "save", save_and_die)
        with pytest.raises(Killed):
            call(checkpoint=bmr.Checkpoints(folder, every_steps=1 if copies else at))


def same(a, b):
    """Whether two fits are equal to the bit: moments, masks, scales, history, and all that the
    program and the guide hold.
    """
    for x, y in ((a.posterior.masks, b.posterior.masks), (a.masks, b.masks), (a.scales, b.scales)):
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    for name in a.posterior:
        assert torch.equal(a.posterior[name].mean, b.posterior[name].mean), name
        assert torch.equal(a.posterior[name].var, b.posterior[name].var), name
    for x, y in ((a.guide, b.guide), (a.program, b.program)):
        if isinstance(x, nn.Module):
            pairs = zip(
                [*x.named_parameters(), *x.named_buffers()],
                [*y.named_parameters(), *y.named_buffers()],
                strict=True,
            )
            assert all(name == other and torch.equal(s, t) for (name, s), (other, t) in pairs)
    pd.testing.assert_frame_equal(a.history, b.history, check_exact=True)
    return True


def normed(prior, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
    )
    return bmr.BayesianNetwork(net, prior, bmr.Categorical())


def large(prior, seed=0):
    """Enough weights for the KL to be evaluated in every eighth step, and the curvature in every
    fourth.
    """
    torch.manual_seed(seed)
    return bmr.BayesianNetwork(
        nn.Sequential(nn.Linear(4, 1500), nn.ReLU(), nn.Linear(1500, 3)), prior, bmr.Categorical()
    )


def one_cycle(o, steps):
    return torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.005, total_steps=steps)


CASES = {
    "adam": lambda **k: fit(classifier(), blobs(), **k),
    "empirical and pruned": lambda **k: fit(
        classifier(bmr.Gaussian()), blobs(), reduce=REDUCE, epochs=6, **k
    ),
    "large, with a KL of an earlier step": lambda **k: fit(
        large(bmr.Gaussian(0.5)), blobs(), epochs=6, **k
    ),
    "large": lambda **k: fit(
        large(bmr.Gaussian(mean="init")), blobs(), reduce=REDUCE, epochs=6, **k
    ),
    "large, natural gradient": lambda **k: fit(
        large(bmr.Gaussian(0.5)),
        blobs(),
        reduce=REDUCE,
        epochs=6,
        optimizer=bmr.natural_gradient(),
        **k,
    ),
    "natural gradient with norms": lambda **k: fit(
        normed(bmr.Gaussian()),
        blobs(),
        reduce=REDUCE,
        epochs=6,
        optimizer=bmr.natural_gradient(),
        **k,
    ),
    "horseshoe, norms, dropout": lambda **k: fit(normed(bmr.Horseshoe()), blobs(), epochs=3, **k),
    "layer scale, validation": lambda **k: fit(
        classifier(bmr.Gaussian("layer")), blobs(), validation=0.2, **k
    ),
    "spike and slab": lambda **k: fit(classifier(bmr.SpikeAndSlab()), blobs(), **k),
    "point": lambda **k: fit(normed(bmr.Gaussian(0.5)), blobs(), guide=bmr.Point, **k),
    "sgd, one cycle": lambda **k: fit(
        classifier(),
        blobs(),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        scheduler=one_cycle,
        **k,
    ),
    "adamw, constant rate": lambda **k: fit(
        classifier(),
        blobs(),
        optimizer=partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
        scheduler=None,
        **k,
    ),
    "autonormal": lambda **k: fit(
        linear, regression(), guide=AutoNormal, reduce=REDUCE, epochs=6, **k
    ),
    "auto low rank": lambda **k: fit(
        linear, regression(), guide=AutoLowRankMultivariateNormal, **k
    ),
    "full rank": lambda **k: fit(
        linear, regression(dtype=torch.float64), guide=bmr.FullRank, reduce=REDUCE, epochs=6, **k
    ),
    "local noise": lambda **k: fit(
        classifier(), blobs(), guide=partial(bmr.MeanField, estimator="local"), **k
    ),
}


# a second or more each; the others go the same ways
LONG = (
    "large", "large, natural gradient", "natural gradient with norms", "layer scale, validation",
    "spike and slab", "auto low rank", "sgd, one cycle", "adamw, constant rate", "full rank",
    "local noise", "point", "large, with a KL of an earlier step",
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in LONG else c for c in CASES]
)
def test_a_fit_stopped_at_any_step_ends_as_if_never_stopped(case, tmp_path, monkeypatch):
    call = CASES[case]
    whole = call()
    steps = int(whole.history["step"].iloc[-1])
    stops = {1, steps // 2, steps - 3}
    stopped(call, tmp_path / "stopped", monkeypatch, max(stops), copies=stops)
    for at in stops:
        torch.manual_seed(at)  # a process of its own
        assert same(whole, call(checkpoint=tmp_path / str(at))), at


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [bmr.adam(3e-3), bmr.natural_gradient()])
def test_standard_deviations_of_some_steps_ago_are_kept(optimizer, tmp_path, monkeypatch):
    monkeypatch.setattr(flat_vectors, "_FIRST", 4)
    monkeypatch.setattr(flat_vectors, "_LARGE", 10)
    monkeypatch.setattr(site_prior, "_LARGE", 10)

    def call(**k):
        reduce = bmr.Every(epochs=1, start=0.6, stop=0.9, kept=0.6)
        return fit(classifier(), blobs(), optimizer=optimizer, reduce=reduce, epochs=6, **k)

    whole = call()
    assert whole.history["kept"].iloc[-1] < 0.7
    stops = range(6, 16)
    stopped(call, tmp_path / "stopped", monkeypatch, max(stops), copies=stops)
    for at in stops:
        assert same(whole, call(checkpoint=tmp_path / str(at))), at


def test_checkpoints_change_nothing_and_a_finished_fit_is_not_repeated(tmp_path, monkeypatch):
    call = CASES["empirical and pruned"]
    whole = call()
    assert same(whole, call(checkpoint=bmr.Checkpoints(tmp_path, every_steps=1)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-000000017.safetensors",
        "step-000000018.safetensors",
    ]
    monkeypatch.setattr(fitting, "take_step", None)
    assert same(whole, call(checkpoint=tmp_path))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)),
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    fit(classifier(), blobs(), epochs=1, checkpoint=tmp_path / "here")
    assert [c.split(".")[1] if c.startswith(".") else c for c in calls] == [
        "step-000000001",
        "rename",
        "here",
        "step-000000003",
        "rename",
        "here",
    ]


@pytest.fixture(scope="module")
def halfway_of_all(tmp_path_factory):
    """A fit that was never stopped, and the folder of the same with checkpoints after steps 5 and 6
    of 12.
    """
    folder = tmp_path_factory.mktemp("halfway") / "fit"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("pyro_bmr.files._sync", lambda path: None)
        stopped(CASES["adam"], folder, monkeypatch, 6, copies={6})
    return CASES["adam"](), folder


@pytest.fixture
def halfway(tmp_path, halfway_of_all):
    """A folder of a fit with checkpoints after steps 5 and 6 of 12; the call that goes on; and what
    it must give.
    """
    whole, folder = halfway_of_all
    shutil.copytree(folder, tmp_path / "fit")
    return tmp_path / "fit", CASES["adam"], whole


def flip(path, where):
    raw = bytearray(path.read_bytes())
    raw[where] ^= 1
    path.write_bytes(raw)


def progress_at(path):
    return path.read_bytes().index(b"progress")


DAMAGE = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-7]),
    "empty": lambda p: p.write_bytes(b""),
    "a bit of a tensor": lambda p: flip(p, -1),
    "a bit of the header": lambda p: flip(p, p.read_bytes().index(b"generator") + 2),
    "a digit of the state": lambda p: flip(p, p.read_bytes().index(b"6", progress_at(p))),
    "zeros": lambda p: p.write_bytes(bytes(len(p.read_bytes()))),
    "other safetensors": lambda p: save_file({"a": torch.ones(3)}, p),
    "a pickle": lambda p: torch.save({"a": torch.ones(3)}, p),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(halfway, damage):
    folder, call, whole = halfway
    DAMAGE[damage](folder / "step-000000006.safetensors")
    with pytest.warns(
        UserWarning,
        match=r"step-000000006\.safetensors' is (damaged|no checkpoint).*the one before is used",
    ):
        again = call(checkpoint=folder)
    assert same(whole, again)
    # step 6 is the first of the second
    assert [p.name for p in sorted(folder.iterdir())] == [
        "step-000000006.safetensors",
        "step-000000012.safetensors",
    ]


def test_of_damaged_checkpoints_alone_the_fit_begins_anew(halfway):
    folder, call, whole = halfway
    for path in folder.iterdir():
        flip(path, -1)
    with pytest.warns(UserWarning, match="begins anew") as noted:
        assert same(whole, call(checkpoint=folder))
    assert sum("not converged" not in str(one.message) for one in noted) == 2


def other(**changes):
    """The call of `halfway` with something else in it."""
    arguments = {"program": classifier(), "data": blobs(), **changes}
    return lambda checkpoint: fit(
        arguments.pop("program"), arguments.pop("data"), checkpoint=checkpoint, **arguments
    )


def relu():
    torch.manual_seed(0)
    return bmr.BayesianNetwork(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        bmr.Gaussian(0.5),
        bmr.Categorical(),
    )


def wider():
    return bmr.BayesianNetwork(
        nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)),
        bmr.Gaussian(0.5),
        bmr.Categorical(),
    )


OTHERS = {
    "epochs": (lambda: other(epochs=5), r"epochs was 4, is 5"),
    "batch_size": (lambda: other(batch_size=30), r"batch_size was 32, is 30"),
    "seed": (lambda: other(seed=1), r"seed was 0, is 1"),
    "temperature": (lambda: other(temperature=0.5), r"temperature was 1\.0, is 0\.5"),
    "rows": (lambda: other(data=blobs(91)), r"data\.x was .*\(90, 4\).*, is .*\(91, 4\)"),
    "values": (lambda: other(data=(blobs()[0] + 1e-6, blobs()[1])), r"data\.x was "),
    "validation": (lambda: other(validation=0.2), r"data\.validation x was None, is "),
    "learning rate": (
        lambda: other(optimizer=bmr.adam(1e-3)),
        r"optimizer\.groups\.0\.lr was 0\.003, is 0\.001",
    ),
    "optimizer": (
        lambda: other(optimizer=partial(torch.optim.SGD, lr=3e-3)),
        r"optimizer\.type was 'torch\.optim\.adam\.Adam', is 'torch\.optim\.sgd\.SGD'",
    ),
    "natural gradient": (
        lambda: other(optimizer=bmr.natural_gradient(averaging=0.1)),
        r"optimizer\.type was .*OnlineNewton",
    ),
    "scheduler": (
        lambda: other(scheduler=None),
        (
            r"scheduler\.type was 'torch\.optim\.lr_scheduler\.CosineAnnealingLR', is"
            r" 'builtins\.NoneType'"
        ),
    ),
    "reduce": (lambda: other(reduce=REDUCE), r"reduce"),
    "guide": (
        lambda: other(guide=bmr.Point),
        (
            r"guide\.type was 'pyro_bmr\.guides\.mean_field\.MeanField', is"
            r" 'pyro_bmr\.guides\.point\.Point'"
        ),
    ),
    "width": (lambda: other(program=wider()), r"program\.modules was .*8.*, is .*9"),
    "activation": (lambda: other(program=relu()), r"program\.modules was .*Tanh.*, is .*ReLU"),
    "prior": (lambda: other(program=classifier(bmr.Gaussian(0.6))), r"scale was 0\.5, is 0\.6"),
    "another program": (lambda: other(program=linear, data=regression()), r"program\.type was "),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_fit_is_refused_with_the_difference(halfway, what):
    folder = halfway[0]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    make, words = OTHERS[what]
    with pytest.raises(
        bmr.errors.FitError,
        match=rf"checkpoints of another fit \(.*{words}.*the same arguments, or another folder",
    ):
        make()(checkpoint=folder)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_network_that_starts_elsewhere_goes_on_all_the_same(halfway):
    """The start values are in the checkpoint: a script need not fix the seed of its network to be
    stopped and started.
    """
    folder, _, whole = halfway
    assert same(whole, fit(classifier(seed=7), blobs(), checkpoint=folder))


def test_a_start_is_known_by_its_values_and_not_by_what_was_drawn_from_it(tmp_path, monkeypatch):
    draws = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))
    start = bmr.Posterior.from_samples({"w": draws}, bmr.Gaussian(0.5))
    call = partial(fit, linear, regression(), start=start)
    stopped(call, tmp_path, monkeypatch, 3)
    start.draw()
    assert start.roots and same(call(), call(checkpoint=tmp_path))
    with pytest.raises(bmr.errors.FitError, match=r"start\.sites\.w\.mean was"):
        fit(
            linear,
            regression(),
            start=bmr.Posterior.from_samples({"w": draws + 1}, bmr.Gaussian(0.5)),
            checkpoint=tmp_path,
        )


def test_a_program_that_has_changed_inside_is_refused(tmp_path, monkeypatch):
    def program(noise):
        def linear(x, y=None):
            w = bmr.Gaussian().sample("w", (6,), x.new_zeros(6))
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

        return linear

    stopped(
        lambda checkpoint: fit(program(0.3), regression(), checkpoint=checkpoint),
        tmp_path,
        monkeypatch,
        3,
    )
    with pytest.raises(
        bmr.errors.FitError,
        match=r"the program has changed.*log likelihood of the first rows was -?[\d.]+, now it is",
    ):
        fit(program(0.31), regression(), checkpoint=tmp_path)


def test_a_state_that_is_whole_but_does_not_fit_is_refused(halfway):
    folder, call, _ = halfway
    for path in folder.iterdir():
        settings, state = checkpoint_files.read(path)
        state["run"]["tensors"]["guide.loc"] = torch.ones(3)
        checkpoint_files.write(path, settings, state)
    with pytest.raises(
        bmr.errors.FitError,
        match=(
            r"step-000000006\.safetensors' does not fit this fit \(RuntimeError: .*remove the"
            r" folder"
        ),
    ):
        call(checkpoint=folder)


def test_a_checkpoint_of_another_format_is_refused_and_kept(halfway):
    folder, call, _ = halfway
    for path in folder.iterdir():
        with safe_open(path, framework="pt") as file:
            metadata = {**file.metadata(), "format": "pyro_bmr checkpoint 2"}
        save_file(load_file(path), path, metadata=metadata)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(
        bmr.errors.FitError,
        match=(
            r"step-000000006\.safetensors': expected a checkpoint of format 3, got format 2, .*in"
            r" another folder"
        ),
    ):
        call(checkpoint=folder)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_another_number_of_threads_is_a_warning(halfway):
    folder, call, _ = halfway
    torch.set_num_threads(2)
    try:
        with pytest.warns(
            UserWarning, match=r"not to the bit \(environment\.threads was 1, is 2\)"
        ):
            call(checkpoint=folder)
    finally:
        torch.set_num_threads(1)


class Lookahead(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.rounds = 0


def test_state_that_cannot_be_saved_is_refused_by_name(tmp_path):
    with pytest.raises(
        bmr.errors.FitError, match=r"optimizer Lookahead keeps rounds outside its state_dict"
    ):
        fit(classifier(), blobs(), optimizer=partial(Lookahead, lr=0.1), checkpoint=tmp_path)

    class Odd(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "hook": print}

    with pytest.raises(
        bmr.errors.FitError,
        match=r"run/optimizer/hook is a builtin_function_or_method, which cannot be saved",
    ):
        fit(classifier(), blobs(), optimizer=partial(Odd, lr=0.1), checkpoint=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(bmr.errors.FitError, match="scheduler Bare has no state_dict"):
        fit(
            classifier(),
            blobs(),
            scheduler=lambda o, steps: type("Bare", (), {"step": lambda self: None})(),
            checkpoint=tmp_path,
        )


def test_a_step_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    step = fitting.take_step

    def overflow(run, batch, share, number):
        terms = step(run, batch, share, number)
        if number == 7:
            run.guide.loc.data[3] = math.inf  # the loss of this step was finite
        return terms

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "take_step", overflow)
        with pytest.raises(
            bmr.errors.FitError,
            match=(
                r"step 8: .*not finite at 0\.weight.*; the last good checkpoint is"
                r" '.*step-000000006\.safetensors'"
            ),
        ):
            CASES["adam"](checkpoint=bmr.Checkpoints(tmp_path, every_steps=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-000000005.safetensors",
        "step-000000006.safetensors",
    ]
    assert same(CASES["adam"](), CASES["adam"](checkpoint=tmp_path))


@pytest.fixture
def keyboard():
    """Ctrl-C as at a terminal: a shell that runs the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("keyboard")
@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, monkeypatch, again):
    step = fitting.take_step

    def pressed(run, batch, share, number):
        if number == 5:
            for _ in range(1 + again):
                signal.raise_signal(signal.SIGINT)
        return step(run, batch, share, number)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "take_step", pressed)
        with pytest.raises(
            KeyboardInterrupt,
            match=(
                "^$"
                if again
                else (
                    r"stopped after step 5; .*step-000000005\.safetensors', from which the same"
                    r" call goes on"
                )
            ),
        ):
            CASES["adam"](checkpoint=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert same(CASES["adam"](), CASES["adam"](checkpoint=tmp_path))


def test_a_full_disk_stops_the_first_checkpoint_and_warns_of_later_ones(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "save_file", full)
        with pytest.raises(
            bmr.PyroBMRError, match=r"cannot write '.*step-000000001\.safetensors': No space left"
        ):
            CASES["adam"](checkpoint=tmp_path)
        assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint_files,
            "save_file",
            lambda t, p, metadata: (full if "step-000000012" in p.name else save_file)(
                t, p, metadata=metadata
            ),
        )
        with pytest.warns(
            UserWarning,
            match=(
                r"No space left on device; the fit goes on, its last checkpoint is"
                r" step-000000001\.safetensors"
            ),
        ):
            assert same(CASES["adam"](), CASES["adam"](checkpoint=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001.safetensors"]


@pytest.mark.parametrize(
    "change",
    [{"every_seconds": -1.0}, {"every_seconds": math.nan}, {"every_steps": 0}, {"keep": 0}],
)
def test_checkpoints_out_of_range(change):
    with pytest.raises(bmr.errors.FitError, match=rf"Checkpoints\({next(iter(change))}="):
        bmr.Checkpoints("here", **change)


def test_a_checkpoint_holds_tensors_and_json_alone(halfway):
    path = halfway[0] / "step-000000006.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (
        metadata["format"] == "pyro_bmr checkpoint 3"
        and json.loads(metadata["settings"])["epochs"] == 4
    )
    tensors = load_file(path)
    assert {"/run/tensors/guide.loc", "/run/optimizer/state/0/exp_avg"} <= tensors.keys()
    # loc, log scale, twice two of Adam, the program; each once
    assert sum(t.numel() for t in tensors.values()) < 8 * (67 * 7 + 5056)


def test_every_so_many_seconds(tmp_path, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: next(now))
    saves, save = [], checkpoints.CheckpointWriter.save
    monkeypatch.setattr(
        checkpoints.CheckpointWriter,
        "save",
        lambda self, step, state: (saves.append(step), save(self, step, state)),
    )
    CASES["adam"](checkpoint=bmr.Checkpoints(tmp_path, every_seconds=4))
    assert saves == [1, 5, 9, 12]


COMMAND = [
    "fit",
    "--model",
    "mlp:8",
    "--epochs",
    "4",
    "--threads",
    "1",
    "--draws",
    "2",
    "--quiet",
    "--resume",
]


@pytest.mark.slow
@pytest.mark.usefixtures("keyboard")
def test_the_command_line_stops_and_goes_on(tmp_path, monkeypatch, capsys):
    folders = {name: tmp_path / f"{name} ü" for name in ("whole", "stopped")}
    assert main([*COMMAND, "--out", str(folders["whole"])]) == 0
    step = fitting.take_step

    def pressed(run, batch, share, number):
        if number == 20:
            signal.raise_signal(signal.SIGINT)
        return step(run, batch, share, number)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "take_step", pressed)
        capsys.readouterr()
        assert main([*COMMAND, "--out", str(folders["stopped"])]) == 130
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.count("\n") == 1
        and err.startswith("pyro-bmr: stopped after step 20; ")
        and "goes on" in err
    )
    assert main([*COMMAND, "--out", str(folders["stopped"])]) == 0
    for name in ("posterior", "network"):
        one, two = (load_file(folder / f"{name}.safetensors") for folder in folders.values())
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert main([*COMMAND, "--out", str(folders["stopped"]), "--epochs", "5"]) == 2
    assert "epochs was 4, is 5" in capsys.readouterr().err
