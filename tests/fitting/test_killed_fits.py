"""Fits killed by SIGKILL within a step, within a save and within a reduction, started again by the
same call, against one that was never stopped.
"""

from __future__ import annotations

import functools
import multiprocessing
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.data.named import sources
from pyro_bmr.fitting import checkpoint_file as checkpoint_files
from pyro_bmr.fitting import checkpoints
from pyro_bmr.fitting import loop as fitting
from pyro_bmr.fitting.run import Run
from tests.fitting.test_checkpoints import same
from tests.fitting.test_fit import blobs

PHASES = ("step", "save", "reduce")


class Size(NamedTuple):
    """Of a network with more than 10,000 weights, of which the KL is evaluated in every eighth
    step, and of its fit.
    """

    inputs: int
    units: int
    outputs: int
    epochs: int
    checkpoint_steps: int
    reduction_epochs: float


SIZES = {
    "blobs": Size(4, 3000, 3, 5, 3, 0.5),
    "digits": Size(64, 200, 10, 150, 20, 2),
    "fashion-mnist": Size(784, 32, 10, 5, 20, 0.05),
}


@functools.cache
def rows(name: str) -> Any:
    return blobs(900) if name == "blobs" else bmr.load(name)


def fit(folder: Path | None, name: str) -> bmr.Fit:
    size = SIZES[name]
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(size.inputs, size.units),
        nn.BatchNorm1d(size.units),
        nn.ReLU(),
        nn.Linear(size.units, size.outputs),
    )
    program = bmr.BayesianNetwork(net, bmr.Gaussian(), bmr.Categorical())
    schedule = bmr.Every(epochs=size.reduction_epochs, kept=0.1, start=0.1, stop=0.95)
    checkpoint = (
        None if folder is None else bmr.Checkpoints(folder, every_steps=size.checkpoint_steps)
    )
    return bmr.fit(
        program,
        rows(name),
        epochs=size.epochs,
        batch_size=128,
        temperature=0.1,
        reduce=schedule,
        progress=False,
        checkpoint=checkpoint,
    )


def child(sender: Connection, folder: Path, name: str) -> None:
    """The fit that is killed. It sends what it begins, (phase, step)."""
    torch.set_num_threads(1)
    number = 0

    def telling(owner: object, method: str, phase: str) -> None:
        plain = getattr(owner, method)

        def told(self, *arguments):
            nonlocal number
            number = arguments[2] if phase == "step" else number
            sender.send((phase, number))
            return plain(self, *arguments)

        setattr(owner, method, told)

    for owner, method, phase in (
        (fitting, "take_step", "step"),
        (checkpoints.CheckpointWriter, "save", "save"),
        (Run, "prune", "reduce"),
    ):
        telling(owner, method, phase)
    fit(folder, name)


def kill(folder: Path, name: str, phase: str, after: int, delay: float) -> int:
    """Starts the fit, kills it `delay` seconds into the first such phase after the step `after`,
    and returns that step.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fitting.fits_to_kill"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, folder, name), daemon=True)
    process.start()
    sender.close()
    while True:
        what, number = receiver.recv()  # EOFError if the fit ends before
        if what == phase and number > after:
            break
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return number


@pytest.mark.slow
def test_killed_three_times(tmp_path):
    for phase, after, delay in (("save", 3, 0.002), ("reduce", 15, 0.0), ("step", 25, 0.0)):
        assert kill(tmp_path, "blobs", phase, after, delay) > after
    assert any(tmp_path.glob("step-*.safetensors"))
    assert same(fit(None, "blobs"), fit(tmp_path, "blobs"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_killed_fifty_times(name, tmp_path):
    if not sources()[name].installed():
        pytest.skip(f"{name} is not installed")
    rng = random.Random(0)
    whole = fit(None, name)
    at, counts, half_written = 0, dict.fromkeys(PHASES, 0), 0
    for k in range(50):
        phase = PHASES[k % 3]
        at = kill(
            tmp_path,
            name,
            phase,
            at + rng.randrange(60 if phase == "step" else 20),
            rng.random() * (0.02 if phase == "reduce" else 0.006),
        )
        counts[phase] += 1
        half_written += len(list(tmp_path.glob(".step-*")))
        for path in tmp_path.glob("step-*.safetensors"):
            checkpoint_files.read(path)
    assert same(whole, fit(tmp_path, name))
    print(
        f"\n{name}: killed within {counts}, last at step {at} of {whole.history['step'].iloc[-1]};"
        f" {half_written} times a file was left half written"
    )
