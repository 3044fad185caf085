"""Writing files so that none is ever half there. Owns `make_folder`, `write_atomically` and `writing`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from pyro_bmr.errors import PyroBMRError


def make_folder(folder: Path) -> None:
    """Creates `folder`, or raises a PyroBMRError that says why it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PyroBMRError(f"cannot write to '{folder}': {error.strerror or error}; choose another folder") from None


def write_atomically(path: Path, write: Callable[[Path], object], durable: bool = False) -> None:
    """Calls `write(temporary path)` and renames the result to `path`; `durable` has it on the disk, and not only in the system's cache, on return."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            write(temporary)
            if durable:
                _sync(temporary)
            os.replace(temporary, path)
            if durable and os.name == "posix":
                _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, what keeps `path` from being written is a PyroBMRError that says so."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise PyroBMRError(f"cannot write '{path}': {getattr(error, 'strerror', None) or error}") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
