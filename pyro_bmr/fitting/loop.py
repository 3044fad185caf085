"""The loop of a fit: its steps, what happens between some of them, and the rows of its history.

Owns `run_steps` and `bar_of`. `run.py` has what the loop changes, `descent.py` one step of it.
Next: `lost_likelihood.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from tqdm import tqdm

from pyro_bmr.errors import FitError
from pyro_bmr.fitting.checkpoints import CheckpointWriter
from pyro_bmr.fitting.descent import read_terms, take_step
from pyro_bmr.fitting.progress import Progress
from pyro_bmr.fitting.rows import Batch
from pyro_bmr.fitting.run import Run
from pyro_bmr.fitting.timetable import Timetable
from pyro_bmr.isolation import give_way
from pyro_bmr.prediction.calibration import mean_nll

# the terms that the progress bar shows, and their columns in the history
_SHOWN = {"ell": "expected_log_likelihood", "kl": "kl", "kept": "kept"}


def run_steps(
    run: Run,
    timetable: Timetable,
    state: Progress,
    writer: CheckpointWriter,
    bar: tqdm,
    clock: float,
    snapshot: Callable[[], dict[str, Any]],
) -> None:
    """Takes the steps of a fit from `state` to its end.

    Args:
        clock: the time at which the fit would have begun without a stop, by `time.perf_counter`.
        snapshot: what a checkpoint holds of the run, beside `state`.
    """
    for epoch in count(state.epoch(timetable.per_epoch)):
        done = state.begin(epoch, timetable.per_epoch)
        for batch, share in run.rows.batches(epoch, done):
            if state.over:
                break
            _step(run, batch, share, state, writer)
            pauses = timetable.pauses(state)
            _read(run, state, writer, wait=pauses or state.step == state.end)
            if pauses:
                _pause(run, timetable, state)
            if state.step == state.end:
                _turn(run, timetable, state, time.perf_counter() - clock)
            _save(run, state, writer, clock, snapshot)
            bar.update()
            give_way()
        _read(run, state, writer)
        row = _row(run, epoch, state)
        state.history.append(row)
        bar.set_postfix({key: f"{row[name]:.4g}" for key, name in _SHOWN.items()})
        if state.over:
            break


def bar_of(timetable: Timetable, state: Progress, shown: bool) -> tqdm:
    """The progress bar of a fit."""
    return tqdm(
        total=timetable.most, initial=state.step, disable=not shown, unit="step", leave=False
    )


def _step(run: Run, batch: Batch, share: float, state: Progress, writer: CheckpointWriter) -> None:
    """One step, of the schedule as well."""
    state.step += 1
    run.interrupted = writer.interrupted
    with _naming_the_last_good(writer):
        take_step(run, batch, share, state.step)
    if run.scheduler:
        run.scheduler.step()


def _read(run: Run, state: Progress, writer: CheckpointWriter, wait: bool = True) -> None:
    """Counts the terms of the steps that were not read so far (`read_terms`)."""
    with _naming_the_last_good(writer):
        for likelihood, kl in read_terms(run, wait):
            state.add(likelihood, kl, run.temperature)


@contextmanager
def _naming_the_last_good(writer: CheckpointWriter) -> Iterator[None]:
    """Within it an error of the fit names the last good checkpoint."""
    try:
        yield
    except FitError as error:
        raise FitError(f"{error}{writer.last_good()}") from None


def _pause(run: Run, timetable: Timetable, state: Progress) -> None:
    """What happens between some steps: empirical scales, a reduction if one is due, and a check
    that all processes agree.
    """
    began = time.perf_counter()
    if state.step >= timetable.warm_up:
        run.update_scales()
    if timetable.reduce and timetable.due(state, state.step):
        state.delta_f += run.prune(timetable.reduce, state.done)
    run.agree(state.step)
    state.reduction_seconds += time.perf_counter() - began


def _turn(run: Run, timetable: Timetable, state: Progress, seconds: float) -> None:
    """The end of a cycle: the next one begins, or the fit is over. All processes go by the clock of
    the first.
    """
    seconds = run.processes.decided_by_first(lambda: ({}, seconds), run.rows.device)[1]
    if timetable.turn(state, seconds):
        run.begin_cycle(state.length)


def _save(
    run: Run,
    state: Progress,
    writer: CheckpointWriter,
    clock: float,
    snapshot: Callable[[], dict[str, Any]],
) -> None:
    """Writes a checkpoint if one is due, and stops the fit after Ctrl-C in any process."""
    stopping = run.interrupted if run.processes.size > 1 else writer.interrupted
    last = state.over or stopping
    if writer.due(state.step, last):
        _read(run, state, writer)
        if not run.is_finite():
            return
        state.seconds = time.perf_counter() - clock
        writer.save(state.step, {"run": snapshot(), "progress": vars(state)})
    if stopping:
        writer.stop(state.step)


def _row(run: Run, epoch: int, state: Progress) -> dict[str, float]:
    """The row of an epoch in the history."""
    likelihood, kl = state.means()
    row = {
        "epoch": epoch,
        "step": state.step,
        "skipped": run.faults.skipped,
        "expected_log_likelihood": likelihood,
        "kl": kl,
        "elbo": likelihood / run.temperature - kl,
        "kept": run.kept(),
        "delta_f": state.delta_f,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
    }
    if run.rows.held_out is not None:
        row["validation_nll"] = mean_nll(run.program, run.posterior(), run.rows.held_out.batches())
    return row
