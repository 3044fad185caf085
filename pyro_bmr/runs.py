"""A fit on disk: a folder that `pyro-bmr reduce` and `pyro-bmr export` take up again.

Owns `Run`. In the folder are `settings.json` (model, data, prior, and how it was fitted), `posterior.safetensors`, `network.safetensors` (what the
program holds besides its posterior: parameters that were left, running statistics) and, after a reduction, `reduced.safetensors` and `reduction.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pyro_bmr.comparison import load_model
from pyro_bmr.data import load
from pyro_bmr.data_set import Data
from pyro_bmr.errors import ModelError
from pyro_bmr.exporting.formats import save_tensors
from pyro_bmr.files import make_folder, write_atomically
from pyro_bmr.fitting import Fit
from pyro_bmr.posterior import Posterior
from pyro_bmr.priors import Prior
from pyro_bmr.reduction.outcome import Reduction

_FORMAT = "pyro_bmr run 1"


@dataclass(frozen=True)
class Run:
    """A saved fit. `settings` has at least model, data, target, prior, seed, temperature; `reduction` is what the last reduction said, or empty."""

    folder: Path
    settings: Mapping[str, Any]
    posterior: Posterior
    reduction: Mapping[str, Any]

    def data(self) -> Data:
        """The data set of the fit."""
        return load(self.settings["data"], self.settings["target"])

    def program(self, prior: Prior, data: Data) -> Any:
        """The fitted program, built again by the model's `build`, with all that it had learned besides its posterior.

        Raises:
            ModelError: the model's file has changed since the fit, or what it builds has other parameters.
        """
        model = str(self.settings["model"])
        if _digest(model) != self.settings["model_sha256"]:
            raise ModelError(f"'{model}' has changed since the fit in '{self.folder}'; restore it, or fit again")
        with torch.random.fork_rng():
            torch.manual_seed(self.settings["seed"])
            program = load_model(model)(data, prior)
        if isinstance(program, nn.Module):
            path = self.folder / "network.safetensors"
            try:
                program.load_state_dict(load_file(path))
            except (RuntimeError, OSError, SafetensorError) as error:
                reason = " ".join(str(error).split())
                raise ModelError(f"'{path}' does not fit what '{model}' builds, or is damaged ({reason}); fit again") from None
            program.eval()
        return program

    def reduced(self, reduction: Reduction, about: Mapping[str, Any]) -> Run:
        """The run with this reduction saved in its folder, in place of an earlier one."""
        content = {**about, "kept": reduction.kept, "delta_f": reduction.delta_f, "sites": json.loads(reduction.table().to_json(orient="records"))}
        reduction.posterior.save(self.folder / "reduced.safetensors")
        write_atomically(self.folder / "reduction.json", lambda path: path.write_text(json.dumps(content, indent=1)))
        return Run(self.folder, self.settings, reduction.posterior, content)


def save_run(fit: Fit, folder: str | Path, settings: Mapping[str, Any]) -> Run:
    """Writes a fit to `folder`; `settings` as in `Run`. A reduction that an earlier fit left there is removed."""
    folder = Path(folder)
    make_folder(folder)
    for name in ("reduced.safetensors", "reduction.json"):
        (folder / name).unlink(missing_ok=True)
    settings = {"format": _FORMAT, **settings, "model_sha256": _digest(str(settings["model"]))}
    fit.posterior.save(folder / "posterior.safetensors")
    if isinstance(fit.program, nn.Module):
        state = fit.program.state_dict()
        write_atomically(folder / "network.safetensors", lambda path: save_tensors(state, path))
    write_atomically(folder / "settings.json", lambda path: path.write_text(json.dumps(settings, indent=1)))
    return Run(folder, settings, fit.posterior, {})


def load_run(folder: str | Path, reduced: bool = False) -> Run:
    """A run saved by `save_run`, with the posterior of its last reduction if there is one and `reduced` asks for it.

    Raises:
        ModelError: the folder is no run, or a file of it is damaged.
    """
    folder = Path(folder)
    settings = _json(folder / "settings.json")
    if settings.get("format") != _FORMAT:
        raise ModelError(f"'{folder}' is no run of pyro-bmr fit (format {settings.get('format')!r}, expected {_FORMAT!r})")
    after = reduced and (folder / "reduction.json").exists()
    reduction = _json(folder / "reduction.json") if after else {}
    return Run(folder, settings, Posterior.load(folder / ("reduced.safetensors" if after else "posterior.safetensors")), reduction)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"'{path.parent}' is no run of pyro-bmr fit: {path.name} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return content if isinstance(content, dict) else {}


def _digest(model: str) -> str | None:
    """The sha256 of a model's file; None for the models of the library."""
    path = Path(model.partition(":")[0])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".py" and path.is_file() else None
