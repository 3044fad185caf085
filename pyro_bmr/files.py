"""Writing files so that none is ever half there. Owns `make_folder` and `write_atomically`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
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


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)` and renames the result to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise PyroBMRError(f"cannot write '{path}': {getattr(error, 'strerror', None) or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
