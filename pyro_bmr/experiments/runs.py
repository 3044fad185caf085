"""A fit on disk: a folder that `pyro-bmr reduce` and `pyro-bmr export` take up again.

Owns `Run`. In the folder are `settings.json` (model, data, prior, how it was fitted, and the
SHA-256 of the two files that follow), `posterior.safetensors`, `network.safetensors` (what the
program holds besides its posterior: parameters that were left, running statistics) and, after a
reduction, `reduced.safetensors` and `reduction.json` (with the SHA-256 of that and of the posterior
that was reduced).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from pyro_bmr.data.data_set import Data
from pyro_bmr.data.named import load
from pyro_bmr.errors import ModelError
from pyro_bmr.experiments.models import load_model
from pyro_bmr.exporting.weights_file import save_tensors
from pyro_bmr.files import (
    check_digests,
    digests,
    finite,
    make_folder,
    read_json,
    reading,
    replacing,
    write_atomically,
    write_json,
)
from pyro_bmr.fitting.fit import Fit
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.priors import Prior
from pyro_bmr.reduction.result import Reduction

_FORMAT = "pyro_bmr run 1"
_FILES, _REDUCTION = (
    ("posterior.safetensors", "network.safetensors"),
    (
        "reduced.safetensors",
        "reduction.json",
    ),
)


@dataclass(frozen=True)
class Run:
    """A saved fit. `settings` has at least model, data, target, prior, seed, temperature;
    `reduction` is what the last reduction said, or empty.
    """

    folder: Path
    settings: Mapping[str, Any]
    posterior: Posterior
    reduction: Mapping[str, Any]

    def data(self) -> Data:
        """The data set of the fit."""
        return load(self.settings["data"], self.settings["target"])

    def program(self, prior: Prior, data: Data) -> Any:
        """The fitted program, built again by the model's `build`, with all that it had learned
        besides its posterior.

        Raises:
            ModelError: the model's file has changed since the fit, or what it builds has other
                parameters.
        """
        model = str(self.settings["model"])
        if _digest(model) != self.settings["model_sha256"]:
            raise ModelError(
                f"'{model}' has changed since the fit in '{self.folder}'; restore it, or fit again"
            )
        with torch.random.fork_rng():
            torch.manual_seed(self.settings["seed"])
            program = load_model(model)(data, prior)
        if isinstance(program, nn.Module):
            path = self.folder / "network.safetensors"
            with reading(
                f"'{path}' does not fit what '{model}' builds, or is damaged",
                ModelError,
                "fit again",
            ):
                program.load_state_dict(load_file(path))
            program.eval()
        return program

    def reduced(self, reduction: Reduction, about: Mapping[str, Any]) -> Run:
        """The run with this reduction saved in its folder, in place of an earlier one."""
        sites = json.loads(reduction.table().to_json(orient="records"))
        said = list(reduction.warnings)
        content = {
            **about,
            "kept": reduction.kept,
            "delta_f": reduction.delta_f,
            "warnings": said,
            "sites": sites,
        }
        with replacing(self.folder, "reduction.json") as stage:
            reduction.posterior.save(stage / "reduced.safetensors")
            content = {**content, "files": digests(stage), "fit": self.settings.get("files")}
            write_json(stage / "reduction.json", finite(content))
        return Run(self.folder, self.settings, reduction.posterior, content)


def check_run_folder(folder: str | Path) -> None:
    """Raises unless a fit can be saved in `folder`; to be asked before the fit.

    Raises:
        PyroBMRError: it cannot be written, or holds the results of `compare` or `study`, whose
            settings a run would replace.
    """
    folder = Path(folder)
    if (folder / "results.csv").exists():
        raise ModelError(
            f"'{folder}' holds results of compare or study; choose another folder for the run"
        )
    make_folder(folder)


def save_run(fit: Fit, folder: str | Path, settings: Mapping[str, Any]) -> Run:
    """Writes a fit to `folder`; `settings` as in `Run`. It takes the place of an earlier fit there,
    whose reduction is removed; one of the two is whole.
    """
    folder = Path(folder)
    with replacing(folder, "settings.json", gone=(*_FILES, *_REDUCTION)) as stage:
        fit.posterior.save(stage / "posterior.safetensors")
        if isinstance(fit.program, nn.Module):
            state = fit.program.state_dict()
            write_atomically(stage / "network.safetensors", lambda path: save_tensors(state, path))
        settings = {
            "format": _FORMAT,
            **settings,
            "model_sha256": _digest(str(settings["model"])),
            "files": digests(stage),
        }
        text = json.dumps(finite(settings), indent=1)
        write_atomically(
            stage / "settings.json", lambda path: path.write_text(text, encoding="utf-8")
        )
    return Run(folder, settings, fit.posterior, {})


def load_run(folder: str | Path, reduced: bool = False) -> Run:
    """A run saved by `save_run`, with the posterior of its last reduction if there is one and
    `reduced` asks for it.

    Raises:
        ModelError: the folder is no run, or a file of it is damaged, or of another fit or reduction
            than the rest.
    """
    folder = Path(folder)
    killed = (folder / _FILES[0]).exists()
    mend = (
        "its process was perhaps killed as it wrote: fit into it again"
        if killed
        else "give a folder that pyro-bmr fit wrote"
    )
    settings = read_json(
        folder / "settings.json",
        f"'{folder}' is no run of pyro-bmr fit: settings.json cannot be read",
        ModelError,
        mend,
    )
    if settings.get("format") != _FORMAT:
        raise ModelError(
            f"'{folder}' is no run of pyro-bmr fit (format {settings.get('format')!r}, expected"
            f" {_FORMAT!r}); fit into it again"
        )
    after = reduced and any((folder / name).exists() for name in _REDUCTION)
    reduction, path = {}, folder / "reduction.json"
    if after:
        reduction = read_json(
            path,
            f"'{path}' cannot be read",
            ModelError,
            "its process was perhaps killed as it wrote: reduce again",
        )
    posterior = Posterior.load(
        folder / ("reduced.safetensors" if after else "posterior.safetensors")
    )
    check_digests(
        folder / "settings.json", settings.get("files"), ModelError, "fit into the folder again"
    )
    if after:
        check_digests(path, reduction.get("files"), ModelError, "reduce again")
        if reduction.get("fit", settings.get("files")) != settings.get("files"):
            raise ModelError(
                f"'{path}' is the reduction of another fit than that in the folder; reduce again"
            )
    return Run(folder, settings, posterior, reduction)


def _digest(model: str) -> str | None:
    """The sha256 of a model's file; None for the models of the library."""
    path = Path(model.partition(":")[0])
    return (
        hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix == ".py" and path.is_file()
        else None
    )
