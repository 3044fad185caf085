"""`compare`: prior × route × seed → one table. No training of its own: it calls `fit`, `reduce`, `predict` and `export`.

Owns `compare`, `summary` and the folder of results, which is also how an interrupted comparison goes on. Next: `cli.py`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from pyro_bmr import metrics, plots
from pyro_bmr.data import Data
from pyro_bmr.errors import ModelError, PyroBMRError
from pyro_bmr.exporting import point_weights, save
from pyro_bmr.files import make_folder, write_atomically
from pyro_bmr.fitting import Fit, adam, fit
from pyro_bmr.guides import MeanField, Point
from pyro_bmr.networks import BayesianNetwork
from pyro_bmr.online_newton import natural_gradient
from pyro_bmr.posterior import Posterior
from pyro_bmr.prediction import ClassPrediction, Prediction, predict
from pyro_bmr.priors import Gaussian, Horseshoe, Prior, SpikeAndSlab
from pyro_bmr.pruning import Every
from pyro_bmr.reduction.outcome import Reduction
from pyro_bmr.reduction.sites import reduce

ROUTES = ("point", "fitted", "reduced")
OPTIMIZERS: dict[str, tuple[Callable[[float], Any], float]] = {"adam": (adam, 3e-3), "natural-gradient": (natural_gradient, 0.1)}
"""Name → what makes the optimiser of `fit` from a learning rate, and the rate where none is given."""
_TEXT = ("model", "data", "prior", "route")
_REAL = ("temperature", "accuracy", "rmse", "nll", "brier", "ece", "kept", "delta_f", "seconds")
Build = Callable[[Data, Prior], Callable[..., Any]]


@dataclass(frozen=True)
class Settings:
    """What every cell of a comparison shares; kept beside its results.

    `optimizer`: one of `OPTIMIZERS`; ``"natural-gradient"`` is for mean field, the point route takes adam at its own rate then. `learning_rate`: None for
    that of the optimiser. `kept`: target fraction for the reduced route, None for the evidence to decide. `reduce_every`: epochs, by default a tenth of
    the fit; `start`, `stop`: as in `Every`. `draws`: of the predictive.
    """

    epochs: int = 40
    batch_size: int = 128
    learning_rate: float | None = None
    temperature: float = 1.0
    kept: float | None = None
    reduce_every: float | None = None
    start: float = 0.1
    stop: float = 0.75
    draws: int = 32
    validation: float | None = None
    optimizer: str = "adam"

    def __post_init__(self) -> None:
        rate = optimizer_named(self.optimizer, self.learning_rate)[1]
        object.__setattr__(self, "learning_rate", rate)  # as a number, which is kept beside the results
        rules = {
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": 0 < rate < math.inf,
            "temperature": 0 < self.temperature < math.inf,
            "kept": self.kept is None or 0 <= self.kept <= 1,
            "reduce_every": self.reduce_every is None or 0 < self.reduce_every < math.inf,
            "start": 0 <= self.start <= self.stop,
            "stop": self.start <= self.stop <= 1,
            "draws": self.draws >= 0,
            "validation": self.validation is None or 0 < self.validation < 1,
        }
        broken = [f"{name}={getattr(self, name)}" for name, good in rules.items() if not good]
        if broken:
            raise ModelError(
                f"{', '.join(broken)}: wanted are epochs, batch_size >= 1, learning_rate, temperature, reduce_every > 0, 0 <= start <= stop <= 1, "
                "0 <= kept <= 1, draws >= 0, 0 < validation < 1"
            )


def compare(
    model: str | Path | Build,
    data: Data,
    *,
    priors: Mapping[str, Prior] | None = None,
    routes: Sequence[str] = ROUTES,
    seeds: int = 3,
    settings: Settings | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """One row per prior, route and seed, with what it scored, what is left of it, and what it took.

    Columns: model, data, prior, route, seed, temperature, accuracy or rmse, nll, brier, ece, parameters, kept_parameters, kept, delta_f, seconds.

    Routes, for a prior p:
        point: maximum a posteriori under p, an empirical scale staying at its start, 1; nothing is pruned.
        fitted: mean field under p; a shrinkage prior then says which weights are zero (`reduce(..., to=None)`), a Gaussian keeps all.
        reduced: mean field under a Gaussian — p itself if it is one, else `Gaussian()` — reduced during and after the fit to p; a Gaussian p reduces to
            the point spike, which removes a weight when the evidence rises without it.

    accuracy … ece and rmse are those of the posterior predictive on the test rows (nats per row; rmse and nll in the target's units). `kept`
    counts all parameters of the network that are not zero. `delta_f` is the predicted gain in log evidence of all reductions, nats.

    Args:
        model: a name in `models/` with an optional argument (``"mlp:500-500"``), a path of a .py file with `build(data, prior)`, or such a function.
        out: a folder for results.csv, report.md, pictures and each row's exported weights. Rows already there are not computed again.
        settings: see `Settings`. With `validation`, that fraction of the training rows is held out and scored instead of the test rows, for tuning.

    Raises:
        PyroBMRError: an unknown name, settings that differ from those of the results in `out`, or an unwritable folder.

    Example:
        >>> compare("mlp:100-50", load("digits"), priors={"gaussian": Gaussian()}, seeds=2, settings=Settings(epochs=20))
    """
    settings = settings or Settings()
    priors = priors or {"gaussian": Gaussian(), "horseshoe": Horseshoe(), "spike-and-slab": SpikeAndSlab()}
    if callable(model):
        build, model_name = model, f"{getattr(model, '__module__', '')}.{getattr(model, '__qualname__', repr(model))}"
    else:
        build, model_name = load_model(model), str(model)
    unknown = [route for route in routes if route not in ROUTES]
    if unknown or not routes or seeds < 1:
        raise ModelError(f"routes={list(routes)}, seeds={seeds}: routes are {', '.join(ROUTES)}; at least one of each is wanted")
    if settings.validation is not None:
        data = _validation_data(data, settings.validation)
    if len({_file_name(prior) for prior in priors}) < len(priors):
        raise ModelError(f"priors {', '.join(priors)}: two of the names give one folder; rename one")
    folder = _Folder(Path(out), model_name, data, settings, priors) if out is not None else None
    cells = [(prior, route, seed) for prior in priors for route in routes for seed in range(seeds)]
    rows = []
    for prior, route, seed in tqdm(cells, disable=not progress, unit="fit", desc=f"{model_name} on {data.name}"):
        row = folder.finished(prior, route, seed) if folder else None
        if row is None:
            cell = _run_cell(build, data, priors[prior], route, seed, settings, progress)
            row = {
                "model": model_name,
                "data": data.name,
                "prior": prior,
                "route": route,
                "seed": seed,
                "temperature": settings.temperature,
                **_scores(cell.prediction, data),
                **_sizes(cell),
                "delta_f": cell.delta_f,
                "seconds": cell.fit.seconds,
            }
            if folder:
                folder.keep(row, cell, data)
        rows.append(row)
    table = pd.DataFrame(rows)
    if folder:
        folder.report(table)
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation over seeds, one row per prior and route, as text."""
    measures = [c for c in ("accuracy", "rmse", "nll", "brier", "ece", "kept", "delta_f", "seconds") if c in table and table[c].notna().any()]

    def text(values: pd.Series[Any]) -> str:
        digits = {"seconds": 1, "delta_f": 0}.get(str(values.name), 4 if values.name == "kept" else 3)
        spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
        return f"{values.mean():.{digits}f}{spread}"

    return table.groupby(["prior", "route"], sort=False)[measures].agg(text).reset_index()


def optimizer_named(name: str, learning_rate: float | None = None) -> tuple[Callable[[], Any], float]:
    """What makes the optimiser of that name for `fit`, and its learning rate, by default its own.

    Raises:
        ModelError: there is no such optimiser.

    Example:
        >>> make, rate = optimizer_named("natural-gradient")
        >>> fit(program, data, optimizer=make())
    """
    if name not in OPTIMIZERS:
        raise ModelError(f"no optimizer '{name}'; the optimizers are: {', '.join(OPTIMIZERS)}")
    make, own = OPTIMIZERS[name]
    rate = own if learning_rate is None else learning_rate
    return partial(make, rate), rate


def load_model(name: str | Path) -> Build:
    """The `build` function of a model: a name in `models/`, with its argument after a colon, or a .py file.

    Raises:
        ModelError: there is no such model, or its file has no `build`.
    """
    stem, _, argument = str(name).partition(":")
    if stem.endswith(".py"):
        path = Path(stem)
        spec = importlib.util.spec_from_file_location(f"pyro_bmr_model_{path.stem}", path) if path.is_file() else None
        if spec is None or spec.loader is None:
            raise ModelError(f"no model file '{stem}'; give a .py file with a function build(data, prior)")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    elif stem in model_names():
        module = importlib.import_module(f"pyro_bmr.models.{stem}")
    else:
        raise ModelError(f"no model '{stem}'; the models are: {', '.join(model_names())}; or give a .py file with a function build(data, prior)")
    build = getattr(module, "build", None)
    if not callable(build):
        raise ModelError(f"'{stem}' has no function build(data, prior) that returns a Pyro program")
    if argument and len(inspect.signature(build).parameters) < 3:
        raise ModelError(f"'{name}': the model '{stem}' takes no argument after a colon")
    return (lambda data, prior: build(data, prior, argument)) if argument else build


def model_names() -> list[str]:
    """The models that come with the library."""
    package = importlib.import_module("pyro_bmr.models")
    return sorted(path.stem for folder in package.__path__ for path in Path(folder).glob("*.py") if path.stem != "__init__")


@dataclass(frozen=True)
class _Cell:
    fit: Fit
    posterior: Posterior
    reduction: Reduction | None
    prediction: Prediction
    delta_f: float
    weights: dict[str, Tensor]


def _run_cell(build: Build, data: Data, prior: Prior, route: str, seed: int, settings: Settings, progress: bool) -> _Cell:
    fitted_under = prior if route != "reduced" or isinstance(prior, Gaussian) else Gaussian()
    target: Prior = Gaussian(scale=0.0) if isinstance(prior, Gaussian) else prior
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        program = build(data, fitted_under)
    schedule = (
        Every(settings.reduce_every or settings.epochs / 10, target, settings.start, kept=settings.kept, stop=settings.stop) if route == "reduced" else None
    )
    make = adam if route == "point" and settings.optimizer != "adam" else optimizer_named(settings.optimizer, settings.learning_rate)[0]
    result = fit(
        program,
        data,
        guide=Point if route == "point" else MeanField,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimizer=make(),
        seed=seed,
        temperature=settings.temperature,
        reduce=schedule,
        progress=progress,
    )
    posterior, reduction, delta_f = result.posterior, None, 0.0
    if route == "reduced":
        reduction = reduce(posterior, to=target, kept=settings.kept)
        delta_f = float(result.history["delta_f"].iloc[-1]) + reduction.delta_f
    elif route == "fitted" and prior.shrinkage:
        reduction = reduce(posterior, to=None)
    if reduction is not None:
        posterior = reduction.posterior
    prediction = predict(result.program, posterior, data.x_test, draws=0 if route == "point" else settings.draws, seed=seed)
    return _Cell(result, posterior, reduction, prediction, delta_f, point_weights(result.program, posterior))


def _scores(prediction: Prediction, data: Data) -> dict[str, float]:
    nll = -float(prediction.log_prob(data.y_test).double().mean())
    if isinstance(prediction, ClassPrediction):
        p, y = prediction.probs, data.y_test
        return {"accuracy": metrics.accuracy(p, y), "nll": nll, "brier": metrics.brier(p, y), "ece": metrics.ece(p, y)}
    return {
        "rmse": metrics.rmse(prediction.mean, data.y_test) * data.target_scale,
        "nll": nll + math.log(data.target_scale),
        "brier": math.nan,
        "ece": math.nan,
    }


def _sizes(cell: _Cell) -> dict[str, float]:
    program = cell.fit.program
    names = (
        [name for name, _ in program.net.named_parameters()]
        if isinstance(program, BayesianNetwork)
        else [name for name in cell.weights if cell.posterior[name].support == "real"]
    )
    total = sum(cell.weights[name].numel() for name in names)
    nonzero = sum(int(cell.weights[name].count_nonzero()) for name in names)
    return {"parameters": total, "kept_parameters": nonzero, "kept": nonzero / total}


def _validation_data(data: Data, fraction: float) -> Data:
    """The training rows, and the validation rows in place of the test rows, which are out of sight; without any, a part of the training rows."""
    if data.x_val is not None and data.y_val is not None:
        return replace(data, name=f"{data.name} (validation)", x_test=data.x_val, y_test=data.y_val)
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    rows = round(fraction * len(order))
    if not 0 < rows < len(order):
        raise ModelError(f"validation={fraction}: a fraction that leaves rows on both sides is wanted")
    held, rest = order[:rows], order[rows:]
    return replace(
        data, name=f"{data.name} (validation)", x_train=data.x_train[rest], y_train=data.y_train[rest], x_test=data.x_train[held], y_test=data.y_train[held]
    )


class _Folder:
    """The results on disk: settings.json, results.csv (one row per finished cell), networks/, pictures/, report.md."""

    def __init__(self, path: Path, model: str, data: Data, settings: Settings, priors: Mapping[str, Prior]) -> None:
        self.path = path
        make_folder(path)
        self.settings = {"model": model, "data": data.name, "fingerprint": _fingerprint(model, data), **settings.__dict__}
        self.table = pd.DataFrame()
        if (path / "results.csv").exists():  # text stays text, whatever it looks like, and numbers are read back exactly
            self.table = pd.read_csv(path / "results.csv", dtype=dict.fromkeys(_TEXT, str), converters=dict.fromkeys(_REAL, float), keep_default_na=False)
        kept = path / "settings.json"
        described = {name: repr(prior) for name, prior in priors.items() if type(prior).__repr__ is not object.__repr__}
        if kept.exists() and not self.table.empty:
            old = {"optimizer": "adam", **json.loads(kept.read_text())}  # folders of 0.1.0 do not say
            old_priors = old.get("priors", {})
            differences = [f"{key} was {old.get(key)!r}, is {value!r}" for key, value in self.settings.items() if old.get(key) != value]
            differences += [f"prior '{name}' was {old_priors[name]}, is {text}" for name, text in described.items() if old_priors.get(name, text) != text]
            described = {**old_priors, **described}
            if differences:
                raise PyroBMRError(f"'{path}' holds results of other settings ({'; '.join(differences)}); choose another folder, or remove it")
        write_atomically(kept, lambda p: p.write_text(json.dumps({**self.settings, "priors": described}, indent=1)))

    def finished(self, prior: str, route: str, seed: int) -> dict[str, Any] | None:
        if self.table.empty:
            return None
        found = self.table[(self.table["prior"] == prior) & (self.table["route"] == route) & (self.table["seed"] == seed)]
        return None if found.empty else {str(k): v for k, v in found.iloc[0].to_dict().items()}

    def keep(self, row: dict[str, Any], cell: _Cell, data: Data) -> None:
        """Weights and pictures first, the row last: a row in results.csv is a finished cell."""
        name = f"{_file_name(row['prior'])}-{row['route']}-{row['seed']}"
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        sites = cell.reduction.table().to_dict("records") if cell.reduction else []
        sites = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in site.items()} for site in sites]
        calibration = metrics.calibration(cell.prediction.probs, data.y_test).tolist() if isinstance(cell.prediction, ClassPrediction) else None
        save(cell.weights, self.path / "networks" / name, {"row": finite, "settings": self.settings, "sites": sites, "calibration": calibration})
        cell.fit.history.to_csv(self.path / "networks" / name / "history.csv", index=False)
        if cell.reduction is not None and row["route"] == "reduced" and row["seed"] == 0:
            make_folder(self.path / "pictures")
            before = reduce(cell.fit.posterior, to=Gaussian(scale=0.0))  # of the weights that survived the fit
            plots.save_figure(
                plots.delta_f_histogram({k: s.spike_delta_f for k, s in before.sites.items()}),
                self.path / "pictures" / f"delta_f-{_file_name(row['prior'])}.png",
            )
        self.table = pd.concat([self.table, pd.DataFrame([row])], ignore_index=True)
        write_atomically(self.path / "results.csv", lambda p: self.table.to_csv(p, index=False, na_rep="nan"))

    def report(self, table: pd.DataFrame) -> None:
        make_folder(self.path / "pictures")
        calibration = {}
        for row in table[table["seed"] == 0].to_dict("records"):
            name = f"{_file_name(row['prior'])}-{row['route']}-0"
            rows = json.loads((self.path / "networks" / name / "report.json").read_text())["calibration"]
            if rows:
                calibration[f"{row['prior']}, {row['route']}"] = torch.tensor(rows)
        plots.save_figure(plots.comparison_figure(table, calibration), self.path / "pictures" / "comparison.png")
        pictures = ["comparison.png", *sorted(p.name for p in (self.path / "pictures").glob("delta_f-*.png"))]
        first = table.iloc[0]
        lines = [
            f"# {first['model']} on {first['data']}",
            "",
            f"{table['seed'].nunique()} seeds, mean ± standard deviation; {int(first['parameters']):,} parameters.",
            "Settings: " + ", ".join(f"{key} {value}" for key, value in self.settings.items() if key not in ("model", "data", "fingerprint")) + ".",
            "",
            markdown(summary(table)),
            "",
            *(f"![{p.removesuffix('.png')}](pictures/{p})" for p in pictures),
            "",
        ]
        write_atomically(self.path / "report.md", lambda p: p.write_text("\n".join(lines), encoding="utf-8"))


def _fingerprint(model: str, data: Data) -> str:
    """A hash of the data, and of the model if it is a file: results of others are never taken for these."""
    content = hashlib.sha256()
    for tensor in (data.x_train, data.y_train, data.x_test, data.y_test):
        content.update(tensor.cpu().contiguous().numpy().tobytes())
    path = Path(model.partition(":")[0])
    if path.suffix == ".py" and path.is_file():
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def _file_name(prior: str) -> str:
    return prior.replace(":", "-").replace("/", "-")


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    rows = [list(map(str, table.columns)), ["---"] * table.shape[1], *(list(map(str, row)) for row in table.itertuples(index=False))]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
