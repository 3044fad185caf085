"""Files that are written whole or not at all, folders whose files are of one result, and readers
whose errors take one line.

Owns `make_folder`, `write_atomically`, `write_json` and `writing`; `replacing` and `check_digests`,
for files that belong together; `reading` and `read_json`; and `locked`, for a folder that one
process has to itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pyro_bmr.errors import ModelError, PyroBMRError

# the prefix of a folder for files not yet in place; older ones were left by killed processes
_STAGE, _STAGE_SECONDS = ".writing-", 86400.0


def make_folder(folder: Path) -> None:
    """Creates `folder`, or raises a PyroBMRError that says why it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PyroBMRError(
            f"cannot write to '{folder}': {error.strerror or error}; choose another folder"
        ) from None


def write_atomically(path: Path, write: Callable[[Path], object], durable: bool = False) -> None:
    """Calls `write(temporary path)` and renames the result to `path`. If `durable`, it is on the
    disk on return, not only in the system's cache.
    """
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


def write_json(path: Path, content: Mapping[str, Any], durable: bool = False) -> None:
    """Writes an object as strict JSON, as `write_atomically` does; values of other types become
    text.

    Raises:
        ModelError: it is no JSON: it has a number that is NaN or infinite, or contains itself.
        PyroBMRError: the file cannot be written.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False, default=str)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"cannot write '{path.name}': expected finite numbers, strings, lists and dicts, got"
            f" what is no JSON ({error})"
        ) from None
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"), durable)


def finite(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which an error of writing `path` becomes a PyroBMRError that says so."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise PyroBMRError(
            f"cannot write '{path}': {getattr(error, 'strerror', None) or error}"
        ) from None


@contextlib.contextmanager
def replacing(
    folder: Path, *heads: str, gone: Iterable[str] = (), durable: bool = False
) -> Iterator[Path]:
    """An empty folder for files that belong together. When the block ends, they replace the files
    of the same names in `folder`.

    Nobody reads the files without the last of the `heads`. The heads are removed first and moved
    last, in their order. So a process that is killed at any moment leaves all old files, all new
    ones, or no head. A block that raises, as when the disk is full, changes nothing. `gone`: older
    files that are removed unless the block wrote them again.

    Raises:
        PyroBMRError: the folder, or a file of it, cannot be written.
    """
    make_folder(folder)
    _remove_old_stages(folder)
    with writing(folder), tempfile.TemporaryDirectory(dir=folder, prefix=_STAGE) as name:
        stage = Path(name)
        yield stage
        _take_places(stage, folder, heads, gone, durable)


def _take_places(
    stage: Path, folder: Path, heads: Sequence[str], gone: Iterable[str], durable: bool
) -> None:
    """Moves the files of `stage` into `folder`, the `heads` last, and removes those of `gone` that
    are not among them.
    """
    order = {head: number for number, head in enumerate(heads)}
    new = sorted(
        (path for path in stage.iterdir() if path.is_file()),
        key=lambda path: order.get(path.name, -1),
    )
    names = {path.name for path in new}
    for path in new:
        if (folder / path.name).is_dir():
            raise PyroBMRError(
                f"cannot write '{folder / path.name}': it is a folder; choose another folder,"
                " or remove it"
            )
        if durable:
            _sync(path)
    for old_name in (*reversed(heads), *(name for name in gone if name not in names)):
        (folder / old_name).unlink(missing_ok=True)
    for path in new:
        os.replace(path, folder / path.name)
    if durable and os.name == "posix":
        _sync(folder)


def _remove_old_stages(folder: Path) -> None:
    """Removes what killed processes have left of `replacing`."""
    for old in folder.glob(f"{_STAGE}*"):
        # another process may remove its own at the same time
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _STAGE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """Name → SHA-256 of each file in a folder, to be kept in the head of files that belong
    together.
    """
    return {path.name: digest(path) for path in sorted(folder.iterdir()) if path.is_file()}


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            content.update(part)
    return content.hexdigest()


def check_digests(head: Path, expected: Any, error: type[PyroBMRError], mend: str) -> None:
    """Raises `error` unless the files beside `head` have the `expected` digests, those that `head`
    was written with; None, from an older version, accepts all files.
    """
    with reading(f"'{head}' is damaged", error, mend):
        if not isinstance(expected, (dict, type(None))) or not all(
            Path(name).name == name for name in expected or ()
        ):
            raise ValueError("files: no names with a SHA-256 each")
    for name, sha256 in (expected or {}).items():
        path = head.parent / name
        with reading(f"'{path}' is damaged or missing", error, mend):
            found = digest(path)
        if found != sha256:
            raise error(
                f"'{path}': expected the SHA-256 in {head.name}, got another: it is damaged, or of"
                f" another time than {head.name}; {mend}"
            )


@contextlib.contextmanager
def reading(fault: str, error: type[PyroBMRError], mend: str) -> Iterator[None]:
    """A context in which any exception of a reader becomes one `error` of one line: the `fault`
    with the file's name, the reason, and the `mend`.
    """
    try:
        yield
    # readers raise a dozen kinds of exceptions for files of another format
    except Exception as problem:
        raise error(f"{fault} ({_reason(problem)}); {mend}") from None


def read_json(path: Path, fault: str, error: type[PyroBMRError], mend: str) -> dict[str, Any]:
    """The object in a JSON file; anything else in it is an error, as in `reading`."""
    with reading(fault, error, mend):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    return value


@contextlib.contextmanager
def locked(
    folder: Path, error: type[PyroBMRError] = PyroBMRError, *, wait: bool = False
) -> Iterator[None]:
    """A context in which `folder` is locked for all other processes and threads. The lock ends with
    the process, whatever ends it. `wait`: until another process is done, in place of the error.

    Raises:
        PyroBMRError: `folder` cannot be written. `error`: it is locked already; the message names
            the process.
    """
    import filelock

    make_folder(folder)
    lock, owner = filelock.FileLock(folder / ".lock", timeout=-1 if wait else 0), folder / ".owner"
    with writing(folder / ".lock"):
        try:
            lock.acquire()
        except filelock.Timeout:
            raise error(
                f"'{folder}' is in use by {_owner(owner)}; wait for its end, or choose another"
                " folder"
            ) from None
    try:
        with writing(owner):
            owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        for path in (owner, folder / ".lock"):
            # Windows does not remove open files; a lock file without an owner locks nothing
            with contextlib.suppress(OSError):
                path.unlink()
        lock.release()


def _owner(path: Path) -> str:
    try:
        return (
            " ".join(path.read_text(encoding="utf-8", errors="replace").split()[:4])[:100]
            or "another process"
        )
    except OSError:
        return "another process"


def _reason(problem: Exception) -> str:
    """What went wrong, in one line."""
    text = getattr(problem, "strerror", None) or " ".join(str(problem).split())
    return f"no {text}" if isinstance(problem, KeyError) else text or type(problem).__name__


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
