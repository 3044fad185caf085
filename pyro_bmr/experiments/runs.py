"""A fit on disk: a folder that `pyro-bmr reduce` and `pyro-bmr export` read. `pyro-bmr fit` writes
one, and every cell of a grid is one.

Owns `Run`. In the folder are `settings.json` (model, data, prior, how it was fitted, and the
SHA-256 of the two files that follow), `posterior.safetensors`, `network.safetensors` (what the
program holds besides its posterior: parameters that were left, running statistics) and, after a
reduction, `reduced.safetensors` and `reduction.json` (with the SHA-256 of that and of the posterior
that was reduced). The cell of a baseline has its weights alone, in `model.safetensors`. Next:
`log.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from pyro_bmr.data.data_set import Data
from pyro_bmr.data.named import load
from pyro_bmr.errors import ModelError, PyroBMRError
from pyro_bmr.experiments.grid import fingerprint
from pyro_bmr.experiments.held_out import with_noise
from pyro_bmr.experiments.methods import network_of
from pyro_bmr.experiments.models import load_model
from pyro_bmr.experiments.options import data_named
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
from pyro_bmr.fitting.arguments import Program
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.priors import Gaussian, Prior
from pyro_bmr.priors.names import PRIORS, prior_from_name
from pyro_bmr.reduction.result import Reduction

FORMAT = "pyro_bmr run 1"
_FILES, _REDUCTION = (
    ("posterior.safetensors", "network.safetensors"),
    ("reduced.safetensors", "reduction.json"),
)


@dataclass(frozen=True)
class Run:
    """A saved fit. `settings` has at least model, data and seed; `posterior` is None for the cell
    of a baseline; `reduction` is what the last reduction said, or empty.
    """

    folder: Path
    settings: Mapping[str, Any]
    posterior: Posterior | None
    reduction: Mapping[str, Any]

    def data(self) -> Data:
        """The data set of the fit, with the noise that it was given.

        Raises:
            PyroBMRError: it cannot be loaded, or a cell was fitted to other data.
        """
        noise = self.settings.get("noise")
        return with_noise(self._loaded(), float(noise)) if noise else self._loaded()

    def _loaded(self) -> Data:
        name, mark = str(self.settings["data"]), self.settings.get("fingerprint")
        likelihood = self.settings.get("likelihood")
        if mark is None:
            return load(name, self.settings["target"], likelihood)
        try:
            data = data_named(name, self.settings["validation"], likelihood)
        except PyroBMRError:
            self._refuse_memory("data")
            raise
        if fingerprint(str(self.settings["model"]), data) != mark:
            self._refuse_memory("data")
            raise ModelError(
                f"'{self.folder}': expected the data and the model file of its fit, got others"
                f" under the names '{name}' and '{self.settings['model']}'; restore them"
            )
        return data

    def prior(self) -> Prior:
        """The prior of the fit, by its name or as the posterior has it.

        Raises:
            ModelError: it has neither.
        """
        if (name := self.settings.get("prior")) is not None:
            return prior_from_name(str(name))
        sites = self.posterior.sites.values() if self.posterior else ()
        declared = [site.declared for site in sites if site.declared is not None]
        if declared and len({repr(prior) for prior in declared}) == 1:
            return declared[0]
        raise ModelError(
            f"'{self.folder}': expected a prior with a name, as the command line has it, got one"
            " that was given in memory; reduce and export it in Python"
        )

    def program(self, data: Data) -> Any:
        """The fitted program, built again by the model's `build`, with all that it had learned
        besides its posterior.

        Raises:
            ModelError: the model's file has changed since the fit, or what it builds has other
                parameters.
        """
        program = self._built(data, self.prior())
        if isinstance(program, nn.Module):
            self._fill(program, "network.safetensors")
        return program

    def network(self, data: Data) -> nn.Module:
        """The network of a baseline's cell, as plain torch.

        Raises:
            ModelError: as `program`, or it is no single network.
        """
        if self.settings["method"] == "ensemble":
            raise ModelError(
                f"'{self.folder}': expected one network, got an ensemble; its weights are in"
                " model.safetensors"
            )
        net = network_of(self._built(data, Gaussian()), str(self.settings["method"]), data)
        self._fill(net, "model.safetensors")
        return net

    def _built(self, data: Data, prior: Prior) -> Any:
        self._refuse_memory("model")
        model = str(self.settings["model"])
        if _digest(model) != self.settings.get("model_sha256", _digest(model)):
            raise ModelError(
                f"'{model}' has changed since the fit in '{self.folder}'; restore it, or fit again"
            )
        with torch.random.fork_rng():
            torch.manual_seed(self.settings["seed"])
            return load_model(model)(data, prior)

    def _fill(self, module: nn.Module, name: str) -> None:
        path = self.folder / name
        fault = f"'{path}' does not fit what '{self.settings['model']}' builds, or is damaged"
        with reading(fault, ModelError, "fit again"):
            module.load_state_dict(load_file(path))
        module.eval()

    def _refuse_memory(self, part: str) -> None:
        if part in self.settings.get("in_memory", ()):
            raise ModelError(
                f"'{self.folder}': expected a {part} that can be loaded, got an object in memory;"
                " give compare its name or its file, or export in Python"
            )

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
            f"'{folder}': expected a folder without results, got one of compare or study; choose"
            " another folder for the run"
        )
    make_folder(folder)


class Fitted(Protocol):
    """What of a fit its run has."""

    @property
    def posterior(self) -> Posterior: ...

    @property
    def program(self) -> Program: ...


def save_run(fit: Fitted, folder: str | Path, settings: Mapping[str, Any]) -> Run:
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
            "format": FORMAT,
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
    """A run saved by `save_run`, or a finished cell, with the posterior of its last reduction if
    there is one and `reduced` asks for it.

    Raises:
        ModelError: the folder is no run, or a file of it is damaged, or of another fit or reduction
            than the rest.
    """
    folder = Path(folder)
    settings = _settings(folder)
    if "method" in settings:
        if not (folder / "row.json").exists():
            raise ModelError(f"'{folder}' is a cell that is not finished; run its study again")
        if settings.get("files") is None:  # of a baseline
            return Run(folder, settings, None, {})
    after = reduced and any((folder / name).exists() for name in _REDUCTION)
    reduction, path = {}, folder / "reduction.json"
    if after:
        mend = "its process was perhaps killed as it wrote: reduce again"
        reduction = read_json(path, f"'{path}' cannot be read", ModelError, mend)
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


def _settings(folder: Path) -> dict[str, Any]:
    killed = (folder / _FILES[0]).exists()
    settings = read_json(
        folder / "settings.json",
        f"'{folder}' is no run of pyro-bmr fit: settings.json cannot be read",
        ModelError,
        "its process was perhaps killed as it wrote: fit into it again"
        if killed
        else "give a folder that pyro-bmr fit wrote, or a folder in cells/ of a study",
    )
    if settings.get("format") != FORMAT:
        raise ModelError(
            f"'{folder}' is no run of pyro-bmr fit: expected the format {FORMAT!r}, got"
            f" {settings.get('format')!r}; fit into it again"
        )
    return settings


def prior_name(prior: Prior | None) -> str | None:
    """The name that `prior_from_name` has for a prior; None if it has none."""
    names = {repr(other): name for name, other in PRIORS.items()}
    if isinstance(prior, Gaussian) and isinstance(prior.scale, (int, float)):
        names[repr(Gaussian(prior.scale))] = f"gaussian:{prior.scale!r}"
    return names.get(repr(prior))


def _digest(model: str) -> str | None:
    """The sha256 of a model's file; None for the models of the library."""
    path = Path(model.partition(":")[0])
    if path.suffix != ".py" or not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()
