"""`compare`: prior × route × seed → one table. No training of its own: it calls `fit`, `reduce`,
`predict` and `export`.

Owns `compare`. Next: `options.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pyro_bmr.data.data_set import Data, validation_data
from pyro_bmr.errors import DataError, ModelError, described, warn
from pyro_bmr.experiments.cells import ROUTES, Settings, counted, run_cell, scores, sizes
from pyro_bmr.experiments.models import Build, load_model
from pyro_bmr.experiments.results_folder import ResultsFolder, file_name
from pyro_bmr.files import locked
from pyro_bmr.priors import Gaussian, Horseshoe, Prior, SpikeAndSlab

if TYPE_CHECKING:
    import pandas as pd


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

    Columns: model, data, prior, route, seed, temperature, accuracy or rmse, nll, brier, ece,
    parameters, kept_parameters, kept, delta_f, seconds.

    Routes, for a prior p:

    - point: maximum a posteriori under p, an empirical scale staying at its start, 1; nothing is
      pruned.
    - fitted: mean field under p; a shrinkage prior then says which weights are zero
      (`reduce(..., to=None)`), a Gaussian keeps all.
    - reduced: mean field under a Gaussian — p itself if it is one, else `Gaussian()` — reduced
      during and after the fit to p; a Gaussian p reduces to the point spike, which removes a weight
      when the evidence rises without it.

    accuracy … ece and rmse are those of the posterior predictive on the test rows (nats per row;
    rmse and nll in the target's units). `kept` counts all parameters of the network that are not
    zero. `delta_f` is the predicted gain in log evidence of all reductions, nats.

    Args:
        model: a name in `models/` with an optional argument (``"mlp:500-500"``), a path of a .py
            file with `build(data, prior)`, or such a function.
        out: a folder for results.csv, report.md, pictures and each row's exported weights. Rows
            already there are not computed again.
        settings: see `Settings`. With `validation`, that fraction of the training rows is held out
            and scored instead of the test rows, for tuning.

    Raises:
        PyroBMRError: an unknown name, settings that differ from those of the results in `out`, or
            an `out` that cannot be written or is in use by another process.

    Example:
        >>> compare("mlp:100-50", load("digits"), priors={"gaussian": Gaussian()}, seeds=2,
        ...     settings=Settings(epochs=20))
    """
    if not isinstance(data, Data):
        raise DataError(
            f"compare: data as load(...) gives them are wanted, got {type(data).__name__}"
        )
    settings = settings or Settings()
    priors = priors or {
        "gaussian": Gaussian(),
        "horseshoe": Horseshoe(),
        "spike-and-slab": SpikeAndSlab(),
    }
    if callable(model):
        build, model_name = (
            model,
            f"{getattr(model, '__module__', '')}.{getattr(model, '__qualname__', repr(model))}",
        )
    else:
        build, model_name = load_model(model), str(model)
    unknown = [route for route in routes if route not in ROUTES]
    if unknown or not routes or seeds < 1:
        raise ModelError(
            f"routes={list(routes)}, seeds={described(seeds)}: routes are {', '.join(ROUTES)}; at"
            " least one of each is wanted"
        )
    if settings.validation is not None:
        data = validation_data(data, settings.validation)
    if len({file_name(prior) for prior in priors}) < len(priors):
        raise ModelError(
            f"priors {', '.join(priors)}: two of the names give one folder; rename one"
        )
    cells = [(prior, route, seed) for prior in priors for route in routes for seed in range(seeds)]
    with nullcontext() if out is None else locked(Path(out)):
        folder = (
            ResultsFolder(Path(out), model_name, data, settings, priors)
            if out is not None
            else None
        )
        table = _rows(build, model_name, data, priors, cells, settings, folder, progress)
        if folder:
            folder.report(table)
    return table


def _rows(
    build: Build,
    model_name: str,
    data: Data,
    priors: Mapping[str, Prior],
    cells: Sequence[tuple[str, str, int]],
    settings: Settings,
    folder: ResultsFolder | None,
    progress: bool,
) -> pd.DataFrame:
    """A row for each cell: that of the folder, or of a fit, which is kept there. Each kind of
    warning comes once, at the end, with its first figures.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    said: dict[str, list[str]] = {}  # mend → a message for each cell that it would help
    try:
        for prior, route, seed in tqdm(
            cells, disable=not progress, unit="fit", desc=f"{model_name} on {data.name}"
        ):
            row = folder.finished(prior, route, seed) if folder else None
            if row is None:
                cell = run_cell(build, data, priors[prior], route, seed, settings, progress)
                row = {
                    "model": model_name,
                    "data": data.name,
                    "prior": prior,
                    "route": route,
                    "seed": seed,
                    "temperature": settings.temperature,
                    **scores(cell.prediction, data),
                    **sizes(cell.weights, counted(cell)),
                    "delta_f": cell.delta_f,
                    "seconds": cell.fit.seconds,
                }
                if folder:
                    folder.keep(row, cell, data)
                for message in cell.warnings:
                    where = (
                        f"{data.name}, {prior}, {route}, seed {seed}, the reduction after the fit"
                    )
                    said.setdefault(message.rpartition(". ")[2], []).append(f"{where}: {message}")
            rows.append(row)
    finally:  # also where a later cell fails
        for first, *others in said.values():
            warn(
                first
                + (
                    f" ({len(others)} more cells have this warning, with other figures)"
                    if others
                    else ""
                )
            )
    return pd.DataFrame(rows)
