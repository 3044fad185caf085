"""A network read back from the folder that `deploy` wrote.

Owns `load_network`. Next: `baselines/training.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from pyro_bmr.errors import ModelError
from pyro_bmr.exporting.written_files import loaded_module
from pyro_bmr.files import digest
from pyro_bmr.shrinking.refusals import first_line


def load_network(folder: str | Path) -> nn.Module:
    """The network in a folder that `deploy` wrote, in evaluation mode.

    It is an instance of the class in `network.py`, if the network could be written as Python; else
    the program in `model.pt2` (format "program"). `network.py` is run: it and the weights have to
    be the files that `deploy` wrote, by their sha256 in `report.json`.

    Example:
        >>> bmr.deploy(small, "digits-small", data.x_test)
        >>> net = bmr.load_network("digits-small")

    Raises:
        ModelError: the folder holds no deployed network, a file has changed, or neither a class nor
            a program is there.
    """
    folder = Path(folder)
    report = _report(folder)
    path, files = folder / "network.py", report["files"]
    if not path.is_file() or digest(path) != files.get("network.py", {}).get("sha256"):
        raise ModelError(
            f"'{folder}': network.py is not the file that was written (its sha256 differs from that"
            " in report.json); deploy the network again"
        )
    loaders = loaded_module(path)
    by_class = "not_in_python" not in report
    if not by_class and "model.pt2" not in files:
        raise ModelError(
            f"'{folder}': the network is not written as Python ({report['not_in_python']}), and"
            " there is no program; deploy it with formats=['program'], or fill your own class with"
            " model.safetensors"
        )
    try:
        net: nn.Module = loaders.load() if by_class else loaders.load_program()
    # A file that is truncated or gone makes torch raise errors of many kinds.
    except Exception as error:
        raise ModelError(f"'{folder}' cannot be loaded: {first_line(error)}") from None
    return net


def _report(folder: Path) -> dict[str, Any]:
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if isinstance(report["files"], dict):
            return dict(report)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    raise ModelError(
        f"'{folder}': expected a folder that `deploy` wrote, with its report.json, got none"
    )
