"""`compare`, a study of prior × route × seed whose model, data and priors may be objects in memory.

Owns `compare` and `comparison`, its declaration. Next: `cli/options.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_bmr.data.data_set import Data, validation_data
from pyro_bmr.errors import DataError, ModelError, PyroBMRError, described, warn
from pyro_bmr.experiments.baseline_cells import baseline_cells
from pyro_bmr.experiments.conclusions import conclusions
from pyro_bmr.experiments.folder import Row, row_of
from pyro_bmr.experiments.grid import Cell, Study, check_model, fingerprint, plain_name
from pyro_bmr.experiments.models import Build, cell_device, load_model, on_device
from pyro_bmr.experiments.recipe import for_route
from pyro_bmr.experiments.report import summary_of, table_of
from pyro_bmr.experiments.settings import ROUTES, Settings
from pyro_bmr.experiments.study import (
    COMPARISON,
    StudyResults,
    check_jobs,
    in_parallel,
    in_turn,
    run,
)
from pyro_bmr.priors import Gaussian, Horseshoe, Prior, SpikeAndSlab

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = (
    *("prior", "route", "accuracy", "rmse", "nll", "brier", "ece", "crps", "coverage", "kept"),
    *("delta_f", "seconds", "converged"),
)

_PRIORS: dict[str, Prior] = {
    "gaussian:layer": Gaussian("layer"),
    "horseshoe": Horseshoe(),
    "spike-and-slab": SpikeAndSlab(),
}


def compare(
    model: str | Path | Build,
    data: Data,
    *,
    priors: Mapping[str, Prior] | None = None,
    routes: Sequence[str] = ROUTES,
    baselines: Sequence[str] | None = None,
    seeds: int = 3,
    settings: Settings | None = None,
    out: str | Path | None = None,
    jobs: int | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """One row per prior, route and seed, with what it scored, what is left of it, and what it took.

    Columns: model, data, prior, route, seed, temperature, accuracy or rmse, nll, brier, ece,
    ece_mass, nll_error, base_accuracy or base_rmse, base_nll, parameters, kept_parameters, kept,
    size, elbo, delta_f, seconds, converged, step_ratio, scale, best_epoch (see docs/studies.md),
    and with `out` kilobytes and cell, the name of its folder in ``out/cells``. Real targets also
    have crps and coverage, after ece, and noise, where trials chose it.

    Routes, for a prior p:

    - map: maximum a posteriori under p, an empirical scale staying at its start, 1; nothing is
      pruned.
    - fitted: mean field under p; a shrinkage prior then says which weights are zero
      (`reduce(..., to=None)`), a Gaussian keeps all.
    - reduced: mean field under a Gaussian — p itself, or else `Gaussian("layer")`, by Adam
      `Gaussian()` — reduced during and after the fit to p; a Gaussian p reduces to the point spike,
      which removes a weight if the evidence increases without it.

    Baselines, in plain torch, under the prior "none" (`baseline_cells`):

    - plain: the network with early stopping and a temperature.
    - magnitude: pruned by magnitude to the size of the reduced Gaussian of the same seed.

    With `progress`, `conclusions` of the table are printed at the end.

    accuracy … ece, rmse, crps and coverage (of 90 % intervals) are those of the posterior
    predictive on the test rows (nats per row; rmse, crps and nll in the target's units). `kept`
    counts all parameters of the network that are not zero. `delta_f` is the predicted gain in log
    evidence of all reductions, nats.

    Args:
        model: a name in `models/` with an optional argument (``"mlp:500-500"``), a path of a .py
            file with `build(data, prior)`, or such a function.
        baselines: names of the baselines; by default both, if the model has a plain network.
        out: a folder for results.csv, report.md, report.html, pictures and the cells: exported
            weights, and a run for ``pyro-bmr reduce`` and ``pyro-bmr export``. Cells that are
            finished there are not run again; one that fails is left out with a warning, and the
            others go on. Without `out` it raises.
        settings: see `Settings`. With `validation`, that fraction of the training rows is held out
            and scored instead of the test rows, for tuning.
        jobs: processes, as for `study`; the numbers do not depend on it.
        device: where the fits, the baselines and the predictions are computed, such as cuda.

    Raises:
        PyroBMRError: an unknown name, no cell that could be fitted, or an `out` that cannot be
            written or is in use by another process.

    Example:
        >>> compare("mlp:100-50", load("digits"), priors={"gaussian": Gaussian()}, seeds=2,
        ...     settings=Settings(epochs=20))
    """
    check_jobs(jobs)
    given = settings or Settings()
    declared = comparison(
        model, data, priors, routes, seeds, given, baselines=baselines, device=device
    )
    if out is not None:
        done = run_comparison(declared, out, jobs=jobs, progress=progress)
        for cell, line in done.failures.items():
            warn(f"{cell} failed: {line}")
        table, failed = done.table, done.failed
    else:
        table, failed = _in_memory(declared, jobs, progress), ()
    if progress:
        print("\n".join([*conclusions(table, failed), *declared.remarks]))
    return table


def _in_memory(declared: Study, jobs: int | None, progress: bool) -> pd.DataFrame:
    """The table of a comparison of which nothing is kept on disk."""
    work = partial(row_of, number=torch.get_num_threads(), progress=progress)
    found: dict[str, tuple[Row, tuple[str, ...]]] = {}
    cells: list[Cell] = []

    def figures(slug: str) -> Row:
        return found[slug][0]

    for turn in in_turn(declared.cells, figures):
        found.update(in_parallel(work, turn, jobs, progress, declared.name))
        cells += turn
    declared = replace(declared, cells=tuple(cells))
    _warn_of(declared, {slug: cautions for slug, (_, cautions) in found.items()})
    table = table_of(declared, {slug: row for slug, (row, _) in found.items()})
    return table.drop(columns="cell")


def run_comparison(
    declared: Study, out: str | Path, *, jobs: int | None, progress: bool
) -> StudyResults:
    """Runs a comparison in a folder. Each kind of warning comes once, with its first figures.

    Raises:
        PyroBMRError: no cell of it is finished.
    """
    threads = torch.get_num_threads()
    done = run(declared, Path(out), declared.cells, jobs=jobs, progress=progress, threads=threads)
    _warn_of(declared, done.cautions)
    if done.table.empty:
        cell, line = next(iter(done.failures.items()))
        raise PyroBMRError(f"no cell could be fitted; {cell} failed: {line}")
    return done


def comparison(
    model: str | Path | Build,
    data: Data,
    priors: Mapping[str, Prior] | None,
    routes: Sequence[str],
    seeds: int,
    settings: Settings,
    source: str | None = None,
    baselines: Sequence[str] | None = None,
    likelihood: str | None = None,
    device: str = "cpu",
) -> Study:
    """The declaration of a comparison. `source`: what `data` were loaded by, if it was a name or a
    file, and under which `likelihood`, if it was given by name.

    Raises:
        PyroBMRError: as `compare`.
    """
    if not isinstance(data, Data):
        raise DataError(f"compare: expected data as load(...) gives them, got {described(data)}")
    priors = priors or _PRIORS
    _check(priors, routes, seeds)
    build = model if callable(model) else load_model(model)
    name = _name_of(model) if callable(model) else str(model)
    if settings.validation is not None:
        data = validation_data(data, settings.validation)
    program = check_model(on_device(build, device), data)
    first = Cell(
        model=name,
        data=source or data.name.removesuffix(" (validation)"),
        validation=settings.validation,
        likelihood=likelihood or ("" if data.family is None else repr(data.family)),
        device=cell_device(device),
        fingerprint=fingerprint(name, data),
        about={"model": name, "data": data.name},
        build=model if callable(model) else None,
        rows=data if source is None else None,
    )
    at = {route: for_route(settings, route, data, program) for route in routes}
    cells = [
        _cell(first, prior, priors[prior], route, seed, at[route])
        for prior in priors
        for route in routes
        for seed in range(seeds)
    ]
    plain, why = baseline_cells(first, baselines, program, data, priors, cells, settings)
    words = {
        "model": name,
        "data": source or data.name,
        **{name: value for name in ("likelihood", "device") if (value := getattr(first, name))},
        "priors": {prior: repr(given) for prior, given in priors.items()},
        "routes": list(routes),
        "baselines": list(dict.fromkeys(cell.method for cell in plain)),
        "seeds": seeds,
        "settings": vars(settings),
    }
    return _study(f"{name} on {data.name}", [*cells, *plain], words, why)


def _study(title: str, cells: Sequence[Cell], words: Mapping[str, Any], why: str) -> Study:
    settings = ", ".join(f"{name} {value}" for name, value in words["settings"].items())
    return Study(
        title,
        tuple(cells),
        json.dumps(words, indent=1),
        COMPARISON,
        shown=_SHOWN,
        note=f"Settings: {settings}.",
        remarks=(f"No baselines: {why}.",) if why else (),
    )


def _cell(first: Cell, name: str, prior: Prior, route: str, seed: int, settings: Settings) -> Cell:
    line = {"prior": name, "route": route, "seed": seed, "temperature": settings.temperature}
    return replace(
        first,
        name=name,
        label=f"{name} {route}",
        method=route,
        options={"prior": prior, **_options(settings), "temperature": settings.temperature},
        varying={"prior": name},
        seed=seed,
        timed=seed == 0,
        about={**first.about, **line},
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation over seeds, one row per prior and route, as text; a figure with a *
    is no better than that of the base rates.
    """
    return summary_of(table, _SHOWN)


def _check(priors: Mapping[str, Prior], routes: Sequence[str], seeds: int) -> None:
    unknown = [route for route in routes if route not in ROUTES]
    if unknown or not routes:
        raise ModelError(
            f"routes: expected at least one of {', '.join(ROUTES)}, got {list(routes)}"
        )
    if not isinstance(seeds, int) or seeds < 1:
        raise ModelError(f"seeds: expected a number of at least 1, got {described(seeds)}")
    if len({plain_name(prior) for prior in priors}) < len(priors):
        raise ModelError(
            f"priors {', '.join(priors)}: two of the names give one folder; rename one"
        )


def _options(settings: Settings) -> dict[str, object]:
    """The settings that differ from the usual ones, so that a setting that is new in a later
    version makes no new cell; and the optimiser, whose default may change.
    """
    usual = vars(Settings(optimizer=settings.optimizer))
    differ = {name: value for name, value in vars(settings).items() if value != usual[name]}
    chosen = {name: value for name, value in differ.items() if name != "validation"}
    return {"optimizer": settings.optimizer, **chosen}


def _name_of(build: Build) -> str:
    module = getattr(build, "__module__", "")
    return f"{module}.{getattr(build, '__qualname__', repr(build))}"


def _warn_of(declared: Study, cautions: Mapping[str, Sequence[str]]) -> None:
    """Warns once of each kind, with the figures of the first cell."""
    said: dict[str, list[str]] = {}  # mend → a message for each cell that it would help
    for cell in declared.cells:
        for message in cautions.get(cell.slug, ()):
            about = cell.about
            where = f"{about['data']}, {about['prior']}, {about['route']}, seed {cell.seed}"
            text = f"{where}, the reduction after the fit: {message}"
            said.setdefault(message.rpartition(". ")[2], []).append(text)
    for first, *others in said.values():
        more = f" ({len(others)} more cells have this warning, with other figures)"
        warn(first + (more if others else ""))
