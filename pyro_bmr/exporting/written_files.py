"""The files of a deployment, written and read back: `network.py` and a file of each format.

Owns `write_network_file`, `loaded_module`, `write_format` and `read_back`. Next: `deployment.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._pytree import tree_structure

from pyro_bmr.data.inputs import Inputs, called, device_of, of_each
from pyro_bmr.errors import ModelError, PyroBMRError
from pyro_bmr.exporting.formats import FORMATS
from pyro_bmr.exporting.loaders_source import loaders_source
from pyro_bmr.exporting.network_source import network_source
from pyro_bmr.exporting.traced_forward import trace
from pyro_bmr.networks.plain_module import module_copy
from pyro_bmr.shrinking.refusals import MASKED, first_line
from pyro_bmr.shrinking.verification import (
    FLOOR,
    Answers,
    answers,
    difference,
    disagreement,
    inputs_like,
    leaves,
)


def write_network_file(
    plain: nn.Module, title: str, rows: Sequence[Inputs], path: Path
) -> tuple[nn.Module, str]:
    """Writes `network.py`, with the class of the network if it gives the outputs of `plain`.

    Returns:
        tuple: The network whose tensors the class loads, and why there is no class; empty if there
            is one.
    """
    try:
        if not isinstance(rows[0], Tensor):
            raise ModelError(f"it has {len(rows[0])} inputs")
        graph = trace(module_copy(plain))
        path.write_text(network_source(graph, title, version("pyro_bmr")), encoding="utf-8")
        weights = {name: t.detach() for name, t in graph.state_dict().items()}
        _check_written_class(plain, loaded_module(path).with_weights(weights), rows)
        return graph, ""
    # A user's forward may raise anything when it gets a proxy, and so may a line of Python that is
    # not what it was.
    except Exception as error:
        if isinstance(error, PyroBMRError):
            reason = str(error).removesuffix(f"; {MASKED}")
        else:
            reason = f"{type(error).__name__}: {first_line(error)}"
    path.write_text(loaders_source(reason, title, version("pyro_bmr")), encoding="utf-8")
    return plain, reason


def _check_written_class(plain: nn.Module, net: nn.Module, rows: Sequence[Any]) -> None:
    """Checks that `net`, read from `network.py`, has the outputs of `plain`, in their structure."""
    inputs = [*rows, *inputs_like(rows[0], plain)]
    want, got = (answers(m, inputs, double=False) for m in (plain, net))
    if reason := disagreement(want, got):
        raise ModelError(f"written so, {reason}")
    if tree_structure(net(rows[0].clone())) != tree_structure(plain(rows[0].clone())):
        raise ModelError("written so, its outputs lose their structure")


def loaded_module(path: Path) -> ModuleType:
    """The module in a file. It is not imported, since that would leave a cache in the folder."""
    module = ModuleType("pyro_bmr_written_network")
    module.__file__ = str(path)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
    return module


def write_format(key: str, net: nn.Module, rows: Inputs, path: Path) -> None:
    """Writes `net` in the format `key`.

    Raises:
        ModelError: the format cannot hold the network.
        PyroBMRError: the file cannot be written.
    """
    try:
        FORMATS[key].write(net, rows, path)
    except PyroBMRError:
        raise
    except (OSError, SafetensorError) as error:
        raise PyroBMRError(
            f"cannot write '{path.name}': {getattr(error, 'strerror', None) or error}"
        ) from None
    # torch.export, onnx and safetensors raise errors of many kinds for what they do not support.
    except Exception as error:
        raise ModelError(
            f"format '{key}' cannot hold this network ({type(error).__name__}:"
            f" {first_line(error)}); leave it out of `formats`"
        ) from None


def halved(part: Tensor) -> Tensor:
    """A copy, of real numbers in half precision."""
    return part.half() if part.is_floating_point() else part.clone()


def read_back(
    key: str, loaders: ModuleType, rows: Sequence[Inputs], outputs: Answers
) -> tuple[Callable[..., Any], float]:
    """The network that the loader of the format `key` returns, after a check of its outputs, and
    their largest difference from the network's, relative to the largest output.

    Raises:
        ModelError: it does not run on `rows`, or does not give `outputs`.
    """
    form = FORMATS[key]
    tried = [(x, want) for x, want in zip(rows, outputs.outputs, strict=True) if want is not None]
    try:
        run: Callable[..., Any] = getattr(loaders, form.loader)(form.file)
        if isinstance(run, nn.Module):
            run = run.to(device_of(rows[0]))
        copied = halved if key == "half" else torch.clone
        outputs_read = [leaves(called(run, of_each(copied, x))) for x, _ in tried]
    # A program or an ONNX session may raise anything if it was written for other rows.
    except Exception as error:
        raise ModelError(
            f"format '{key}': read back, it does not run ({type(error).__name__}:"
            f" {first_line(error)}); leave it out of `formats`"
        ) from None
    most = 0.0
    for (_, want), got in zip(tried, outputs_read, strict=True):
        wrong, size = difference(want, got)
        most = max(most, wrong / max(size, FLOOR))
        if not wrong <= form.tolerance * max(size, FLOOR):
            raise ModelError(
                f"format '{key}': read back, its outputs differ from the network's by {wrong:.2g},"
                f" where the largest is {size:.2g}"
            )
    return run, most
