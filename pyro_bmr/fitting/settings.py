"""The settings of a fit in words that are the same in another process, and what differs between two
of them.

Owns `description`, `differences`, `refuse_others` and `refuse_hidden_state`. Next:
`checkpoints.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_bmr.errors import FitError, warn
from pyro_bmr.fitting.checkpoint_file import digest

_SHOWN = 60  # characters of a setting in a message
_LISTED = 5  # differences in a message


def description(value: Any) -> Any:
    """`value` in words that are the same in another process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, partial):
        keywords = {key: description(v) for key, v in value.keywords.items()}
        return {"function": description(value.func), **keywords}
    if isinstance(value, Tensor):
        return in_short("", value)
    if isinstance(value, (list, tuple)):
        return [description(v) for v in value]
    if isinstance(value, Mapping):
        return {str(key): description(v) for key, v in value.items()}
    kind = value if hasattr(value, "__qualname__") else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    parts = _parts(value)
    return {"type": name, **parts} if parts else name


def in_short(name: str, tensor: Tensor) -> str:
    """The shape, the dtype and a digest of a tensor called `name`."""
    return f"{tuple(tensor.shape)} {tensor.dtype}, sha256 {digest({name: tensor})[:12]}"


def _parts(value: Any) -> dict[str, Any]:
    """What tells a dataclass or a module from others of its type, but for the values of its
    tensors.
    """
    parts = (
        {f.name: description(getattr(value, f.name)) for f in fields(value) if f.compare}
        if is_dataclass(value) and not isinstance(value, type)
        else {}
    )
    if not isinstance(value, nn.Module):
        return parts
    shapes = {
        key: f"{tuple(t.shape)} {t.dtype}"
        for key, t in [*value.named_parameters(), *value.named_buffers()]
    }
    declared = ("priors", "likelihood", "estimator")
    more = {key: description(v) for key, v in vars(value).items() if key in declared}
    return {"modules": repr(value), "tensors": shapes, **more}


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


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What is not the same in two settings of a fit, a line each. What begins with ``environment``
    matters to the last bits alone.
    """
    was, now = _flat(old), _flat(new)
    return [
        "{} was {}, is {}".format(key, *_shown(was.get(key), now.get(key)))
        for key in {**was, **now}
        if was.get(key) != now.get(key)
    ]


def refuse_others(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises FitError unless the settings `old` of the checkpoints in `folder` are those of the
    fit, `new`; warns if only the environment differs.
    """
    found = differences(old, new)
    machine = [text for text in found if text.startswith("environment")]
    others = [text for text in found if not text.startswith("environment")]
    if others:
        more = f"; and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
        raise FitError(
            f"'{folder}' has checkpoints of another fit ({'; '.join(others[:_LISTED])}{more}); give"
            " the same arguments, or another folder"
        )
    if machine:
        warn(
            f"'{folder}': the fit goes on from its checkpoint, but not to the bit"
            f" ({'; '.join(machine)})"
        )


def _flat(settings: Any, where: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary, each value under the path that leads to it."""
    if isinstance(settings, dict):
        pairs = list(settings.items())
    elif isinstance(settings, list):
        pairs = list(enumerate(settings))
    else:
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
