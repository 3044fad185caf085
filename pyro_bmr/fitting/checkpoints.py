"""Checkpoints of a fit: files from which a fit that was stopped continues, to the bit.

Owns `Checkpoints`, which `fit` takes, and the `CheckpointWriter` of one fit. `snapshot.py` says
what is saved, `checkpoint_file.py` how. Next: `snapshot.py`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pyro_bmr.errors import FitError, PyroBMRError, described, holds, warn
from pyro_bmr.files import locked, make_folder
from pyro_bmr.fitting.checkpoint_file import OtherFormat, read, write
from pyro_bmr.fitting.settings import refuse_others

_FILES = "step-*.safetensors"


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a fit is saved: `fit(..., checkpoint=Checkpoints(folder))`, or the folder
    alone.

    Args:
        folder: of one fit; made if it is not there. Its files are ``step-<number>.safetensors``.
        every_seconds: the time between two checkpoints. The first step of a process and the last of
            the fit are saved in any case.
        every_steps: the steps between two checkpoints, as well.
        keep: how many files are kept. Of two, one is whole whatever happens to the other.

    Raises:
        FitError: an argument is out of range.

    Example:
        >>> fit(program, data, checkpoint=Checkpoints("checkpoints/lenet", every_seconds=600))
    """

    folder: str | Path
    every_seconds: float = 60.0
    every_steps: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        if not holds(lambda x: x >= 0, self.every_seconds):
            self._refuse("every_seconds", "a number >= 0")
        if self.every_steps is not None and not holds(lambda x: x >= 1, self.every_steps):
            self._refuse("every_steps", "at least 1")
        if not holds(lambda x: x >= 1, self.keep):
            self._refuse("keep", "at least 1")

    def _refuse(self, name: str, expected: str) -> NoReturn:
        raise FitError(f"Checkpoints({name}={described(getattr(self, name))}): expected {expected}")


class CheckpointWriter:
    """The checkpoints of a running fit; none if `checkpoint` is None. Without `writes` it only
    reads them.
    """

    def __init__(self, checkpoint: str | Path | Checkpoints | None, writes: bool = True) -> None:
        if not isinstance(checkpoint, (str, Path, Checkpoints, type(None))):
            raise FitError(
                "checkpoint: expected a folder or Checkpoints(folder, ...), got"
                f" {described(checkpoint)}"
            )
        self.rule = Checkpoints(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
        self.writes = writes and self.rule is not None
        self.settings: dict[str, Any] = {}
        self.good: list[Path] = []  # checkpoints that can be read, the oldest first
        self.saved_at: float | None = None  # None before the first of this process
        self.interrupted = False
        if self.rule is not None:
            self.folder = Path(self.rule.folder)
        if self.writes:
            make_folder(self.folder)

    def latest(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state in the newest checkpoint that can be read, with a warning for each that cannot;
        None if there is none.

        Raises:
            FitError: it is of a fit with other settings, or of another format.
        """
        if self.rule is None:
            return None
        self.settings = dict(settings)
        state = None
        for path in sorted(self.folder.glob(_FILES), reverse=True):
            try:
                its_settings, its_state = self._read(path)
            except OtherFormat:
                raise
            except FitError as error:
                warn(f"{error}; the one before is used, or the fit begins anew if there is none")
                continue
            self.good.insert(0, path)
            if state is None:
                refuse_others(self.folder, its_settings, self.settings)
                state = its_state
        return state

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings and the state in a file."""
        return read(path)

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Within it, a state that is whole but does not fit the fit is a FitError."""
        try:
            yield
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            what = " ".join(str(error).split())
            raise FitError(
                f"'{self.good[-1]}' does not fit this fit ({type(error).__name__}: {what}); remove"
                " the folder, or choose another"
            ) from None

    def due(self, step: int, last: bool) -> bool:
        """Whether a checkpoint is to be written after `step`."""
        if self.rule is None or not self.writes:
            return False
        by_steps = self.rule.every_steps is not None and step % self.rule.every_steps == 0
        return (
            last
            or by_steps
            or self.saved_at is None
            or time.monotonic() - self.saved_at >= self.rule.every_seconds
        )

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint and removes the oldest if there are more than `keep`. A folder that
        cannot be written stops the fit at the first checkpoint; at later ones it is a warning.

        Raises:
            FitError: some of the state cannot be saved.
            PyroBMRError: the first cannot be written.
        """
        assert self.rule is not None
        path = self.folder / f"step-{step:09d}.safetensors"
        try:
            write(path, self.settings, state)
        except FitError:
            raise
        except PyroBMRError as error:
            if self.saved_at is None:
                raise
            warn(f"{error}; the fit goes on, its last checkpoint is {self.good[-1].name}")
        else:
            self.good = [*(p for p in self.good if p != path), path][-self.rule.keep :]
            for old in set(self.folder.glob(_FILES)) - set(self.good):
                with contextlib.suppress(OSError):
                    old.unlink()
        self.saved_at = time.monotonic()

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Within it the folder belongs to this fit alone. The first Ctrl-C only sets `interrupted`,
        so that no step is left half done; the second stops at once.

        Raises:
            FitError: another fit has the folder.
        """
        if not self.writes:
            with self._first_interrupt_noted():
                yield
            return
        with locked(self.folder, FitError):
            for left in self.folder.glob(f".{_FILES}.*.tmp"):
                left.unlink(missing_ok=True)  # of a process that was killed while it wrote
            with self._first_interrupt_noted():
                yield

    @contextlib.contextmanager
    def _first_interrupt_noted(self) -> Iterator[None]:
        previous = signal.getsignal(signal.SIGINT)
        if (
            self.rule is None
            or threading.current_thread() is not threading.main_thread()
            or previous in (None, signal.SIG_IGN)
        ):
            yield
            return

        def note(number: int, frame: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def stop(self, step: int) -> NoReturn:
        """Raises KeyboardInterrupt, and says how to continue."""
        raise KeyboardInterrupt(f"stopped after step {step}{self.last_good()}")

    def last_good(self) -> str:
        """What to add to the message of a fit that broke off."""
        good = self.good
        if self.rule is not None and not self.writes:
            good = sorted(self.folder.glob(_FILES))
        if not good:
            return ""
        return f"; the last good checkpoint is '{good[-1]}', from which the same call goes on"
