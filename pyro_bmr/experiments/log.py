"""The log of a cell: everything that it prints. A progress bar becomes a line every few seconds.

Owns `logged`, `Log` and `threads`. Next: `folder.py`.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pyro_bmr.files import writing

_SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Sets the threads of torch inside the block, so that sums have one order whatever the number
    of processes. With one thread, processes do not compete for a core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Redirects what is printed inside the block to a file."""
    with writing(path):
        log = Log(path.open("w", encoding="utf-8"))
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            yield
        finally:
            log.close()


class Log(io.TextIOBase):
    """A text file in which a progress bar is a line now and then, and its last state one when the
    log is closed. No cell fails for want of its log.
    """

    def __init__(self, file: io.TextIOBase | Any) -> None:
        self.file, self.shown, self.waiting = file, 0.0, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text.startswith("\r"):
            self.waiting = text.strip() or self.waiting
            if time.monotonic() - self.shown > _SECONDS_BETWEEN_LINES:
                self._write_line()
        else:
            self._put(text)
        return len(text)

    def close(self) -> None:
        if self.waiting:
            self._write_line()
        with contextlib.suppress(OSError):
            self.file.close()
        super().close()

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.file.write(text)
            self.file.flush()

    def _write_line(self) -> None:
        self._put(f"{self.waiting}\n")
        self.shown, self.waiting = time.monotonic(), ""
