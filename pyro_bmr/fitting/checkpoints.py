"""Checkpoints of a fit: files from which a fit that was stopped goes on, to the bit.

Owns `Checkpoints`, which `fit` takes, the `Journal` of one fit, and what must be equal for it to go
on. What is saved is said in `fit_snapshot.py`, and how in `checkpoint_file.py`. Next: `fit.py`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_bmr.errors import FitError, PyroBMRError, PyroBMRWarning, described, holds
from pyro_bmr.files import locked, make_folder
from pyro_bmr.fitting.checkpoint_file import digest, read, write
from pyro_bmr.fitting.run import FitState

_SHOWN = 60  # characters of a setting in a message


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a fit is saved: `fit(..., checkpoint=Checkpoints(folder))`, or the folder
    alone.

    Args:
        folder: of one fit; made if it is not there. Its files are ``step-<number>.safetensors``.
        every_seconds: the time between two checkpoints. The first step of a process and the last of
            the fit are saved in any case.
        every_steps: the steps between two checkpoints, as well.
        keep: how many stay; of two, one is whole whatever happens to the other.

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
            raise FitError(
                f"Checkpoints(every_seconds={described(self.every_seconds)}): a number >= 0 is"
                " wanted"
            )
        if self.every_steps is not None and not holds(lambda x: x >= 1, self.every_steps):
            raise FitError(
                f"Checkpoints(every_steps={described(self.every_steps)}): at least 1 is wanted"
            )
        if not holds(lambda x: x >= 1, self.keep):
            raise FitError(f"Checkpoints(keep={described(self.keep)}): at least 1 is wanted")


class Journal:
    """The checkpoints of a running fit; none if `checkpoint` is None. Without `writes` they are
    read alone.
    """

    def __init__(self, checkpoint: str | Path | Checkpoints | None, writes: bool = True) -> None:
        if not isinstance(checkpoint, (str, Path, Checkpoints, type(None))):
            raise FitError(
                "checkpoint: a folder or Checkpoints(folder, ...) is wanted, got"
                f" {described(checkpoint)}"
            )
        self.rule = (
            checkpoint
            if checkpoint is None or isinstance(checkpoint, Checkpoints)
            else Checkpoints(checkpoint)
        )
        self.writes = writes
        self.settings: dict[str, Any] = {}
        self.good: list[Path] = []  # checkpoints that can be read, the oldest first
        self.saved_at: float | None = None  # None before the first of this process
        self.interrupted = False
        if self.rule is not None:
            self.folder = Path(self.rule.folder)
        if self.rule is not None and writes:
            make_folder(self.folder)

    def latest(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state in the newest checkpoint that can be read, with a warning for each that cannot;
        None if there is none.

        Raises:
            FitError: it is of a fit with other settings.
        """
        if self.rule is None:
            return None
        self.settings = dict(settings)
        state = None
        for path in sorted(self.folder.glob("step-*.safetensors"), reverse=True):
            try:
                its_settings, its_state = read(path)
            except FitError as error:
                warnings.warn(
                    f"{error}; the one before is used, or the fit begins anew if there is none",
                    PyroBMRWarning,
                    stacklevel=3,
                )
                continue
            self.good.insert(0, path)
            if state is None:
                _refuse_others(self.folder, its_settings, self.settings)
                state = its_state
        return state

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
        """Writes a checkpoint and removes those that are too many. A folder that cannot be written
        stops the first one; later ones warn.

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
            warnings.warn(
                f"{error}; the fit goes on, its last checkpoint is {self.good[-1].name}",
                PyroBMRWarning,
                stacklevel=3,
            )
        else:
            self.good = [*(p for p in self.good if p != path), path]
            for old in set(self.folder.glob("step-*.safetensors")) - set(
                self.good[-self.rule.keep :]
            ):
                with contextlib.suppress(OSError):
                    old.unlink()
            self.good = self.good[-self.rule.keep :]
        self.saved_at = time.monotonic()

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Within it the folder is that of this fit alone, and the first Ctrl-C only sets
        `interrupted`, so that a step is never left half done; the second is as ever.

        Raises:
            FitError: another fit has the folder.
        """
        with (
            locked(self.folder, FitError)
            if self.rule is not None and self.writes
            else contextlib.nullcontext()
        ):
            for left in (
                self.folder.glob(".step-*.safetensors.*.tmp")
                if self.rule is not None and self.writes
                else ()
            ):
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
        """Raises KeyboardInterrupt, saying how to go on."""
        raise KeyboardInterrupt(f"stopped after step {step}{self.last_good()}")

    def last_good(self) -> str:
        """What to add to the message of a fit that broke off."""
        good = (
            self.good
            if self.writes or self.rule is None
            else sorted(self.folder.glob("step-*.safetensors"))
        )
        return (
            f"; the last good checkpoint is '{good[-1]}', from which the same call goes on"
            if good
            else ""
        )


def fit_settings(
    run: FitState,
    optimizer: Optimizer,
    scheduler: Any,
    data: Mapping[str, Tensor],
    **arguments: Any,
) -> dict[str, Any]:
    """All that must be the same when a fit goes on, and in ``environment`` what must be for the
    result to be the same to the bit.

    Raises:
        FitError: an optimiser or a schedule that keeps state where it cannot be saved.
    """
    refuse_hidden_state(optimizer, scheduler)
    sites = {}
    for name, site in run.posterior().sites.items():
        prior = _description(site.declared)
        if site.declared is None and site.prior is not None and not site.given:
            prior = digest({"mean": site.prior.mean, "var": site.prior.var})
        sites[name] = {
            "shape": list(site.mean.shape),
            "dtype": str(site.mean.dtype),
            "support": site.support,
            "prior": prior,
        }
    groups = [
        {key: _description(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    schedule = (
        {key: _description(value) for key, value in scheduler.state_dict().items()}
        if scheduler is not None
        else {}
    )
    found = {
        "program": _description(run.program),
        "sites": sites,
        "guide": _description(run.guide),
        "data": {
            name: f"{tuple(t.shape)} {t.dtype}, sha256 {digest({name: t})[:12]}"
            for name, t in data.items()
        },
        "optimizer": {"type": _description(type(optimizer)), "groups": groups},
        "scheduler": {"type": _description(type(scheduler)), **schedule},
        **{name: _description(value) for name, value in arguments.items()},
        "environment": {
            "torch": torch.__version__,
            "pyro_bmr": importlib.metadata.version("pyro_bmr"),
            "threads": torch.get_num_threads(),
            "processes": run.processes.size,
            "device": str(run.x.device),
            "processor": platform.machine(),
        },
    }
    return dict(json.loads(json.dumps(found)))


def refuse_hidden_state(optimizer: Optimizer, scheduler: Any) -> None:
    """Raises FitError if the optimiser or the schedule is known to keep state that its `state_dict`
    does not have.
    """
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim") and kind.state_dict is Optimizer.state_dict:
        more = sorted(
            {name for name in vars(optimizer) if not name.startswith("_")}
            - {"defaults", "param_groups", "state", "step"}
        )
        if more:
            raise FitError(
                f"checkpoint: the optimizer {kind.__name__} keeps {', '.join(more)} outside its"
                " state_dict, so it cannot go on to the bit; give it state_dict and"
                " load_state_dict that hold its whole state, or fit without checkpoint"
            )
    if scheduler is not None and not (
        hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")
    ):
        raise FitError(
            f"checkpoint: the scheduler {type(scheduler).__name__} has no state_dict and"
            " load_state_dict; add them, or fit without checkpoint"
        )


def _description(value: Any) -> Any:
    """`value` in words that are the same in another process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, partial):
        return {
            "function": _description(value.func),
            **{key: _description(v) for key, v in value.keywords.items()},
        }
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}, sha256 {digest({'': value})[:12]}"
    if isinstance(value, (list, tuple)):
        return [_description(v) for v in value]
    if isinstance(value, Mapping):
        return {str(key): _description(v) for key, v in value.items()}
    kind = value if hasattr(value, "__qualname__") else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    parts = (
        {f.name: _description(getattr(value, f.name)) for f in fields(value) if f.compare}
        if is_dataclass(value) and not isinstance(value, type)
        else {}
    )
    if isinstance(value, nn.Module):
        shapes = {
            key: f"{tuple(t.shape)} {t.dtype}"
            for key, t in [*value.named_parameters(), *value.named_buffers()]
        }
        more = {
            key: _description(v)
            for key, v in vars(value).items()
            if key in ("priors", "likelihood", "estimator")
        }
        return {"type": name, "modules": repr(value), "tensors": shapes, **more}
    return {"type": name, **parts} if parts else name


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What is not the same in two settings of a fit, a line each; what begins with ``environment``
    matters to the last bits alone.
    """
    was, now = _flat(old), _flat(new)
    return [
        "{} was {}, is {}".format(key, *_shown(was.get(key), now.get(key)))
        for key in {**was, **now}
        if was.get(key) != now.get(key)
    ]


def _refuse_others(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    found = differences(old, new)
    machine = [text for text in found if text.startswith("environment")]
    others = [text for text in found if not text.startswith("environment")]
    if others:
        more = f"; and {len(others) - 5} more" if len(others) > 5 else ""
        raise FitError(
            f"'{folder}' has checkpoints of another fit ({'; '.join(others[:5])}{more}); give the"
            " same arguments, or another folder"
        )
    if machine:
        warnings.warn(
            f"'{folder}': the fit goes on from its checkpoint, but not to the bit"
            f" ({'; '.join(machine)})",
            PyroBMRWarning,
            stacklevel=4,
        )


def _flat(settings: Any, where: str = "") -> dict[str, Any]:
    pairs = (
        settings.items()
        if isinstance(settings, dict)
        else enumerate(settings)
        if isinstance(settings, list)
        else None
    )
    if pairs is None:
        return {where: settings}
    return {
        key: value
        for name, inner in pairs
        for key, value in _flat(inner, f"{where}.{name}" if where else str(name)).items()
    }


def _shown(old: Any, new: Any) -> tuple[str, str]:
    """Both, each cut to the stretch where they begin to differ."""
    a, b = " ".join(repr(old).split()), " ".join(repr(new).split())
    first = next(
        (k for k, (p, q) in enumerate(zip(a, b, strict=False)) if p != q), min(len(a), len(b))
    )
    start = max(first - _SHOWN // 3, 0) if max(len(a), len(b)) > _SHOWN else 0
    cut = [
        ("…" if start else "")
        + text[start : start + _SHOWN]
        + ("…" if len(text) > start + _SHOWN else "")
        for text in (a, b)
    ]
    return cut[0], cut[1]
