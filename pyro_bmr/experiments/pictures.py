"""The pictures of a study, one set per model and data set: fronts of size and quality, calibration,
learning curves, layers, first weights, cost, and the evidence of each weight.

Owns `draw` and `Picture`. If a picture shows one target fraction per method, it is the smallest
finished one. Next: `lines.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_bmr.experiments import curves, plots, weights
from pyro_bmr.experiments.folder import calibration_of, read_history
from pyro_bmr.experiments.grid import plain_name
from pyro_bmr.experiments.runs import load_run
from pyro_bmr.priors import Gaussian
from pyro_bmr.reduction.reduce import quiet_reduction

if TYPE_CHECKING:  # imported where something is drawn
    import pandas as pd
    from matplotlib.figure import Figure

KEYS = ("model", "data", "prior", "route", "method", "option_kept")
_MARKERS = "osD^vP*X<>"


@dataclass(frozen=True)
class Picture:
    """A file in pictures/, what it shows, and the model and data that it is of."""

    file: str
    caption: str
    place: tuple[str, str]


def draw(
    table: pd.DataFrame, mean: pd.DataFrame, spread: pd.DataFrame, folder: Path
) -> list[Picture]:
    """Draws all pictures of the finished cells in `table` into the folder; `mean` and `spread` over
    their seeds.
    """
    pictures = []
    places = mean[["model", "data"]].drop_duplicates().itertuples(index=False, name=None)
    for k, place in enumerate(places):
        here, mean_here, spread_here = (
            part[(part["model"] == place[0]) & (part["data"] == place[1])]
            for part in (table, mean, spread)
        )
        for name, caption, figure in _figures(here, mean_here, spread_here, folder):
            if figure is not None:
                file = f"{k + 1}-{name}.png"
                plots.save_figure(figure, folder / "pictures" / file)
                pictures.append(Picture(file, f"{caption}.", place))
    return pictures


def _figures(
    table: pd.DataFrame, mean: pd.DataFrame, spread: pd.DataFrame, folder: Path
) -> Iterator[tuple[str, str, Figure | None]]:
    """Name, caption and figure of each picture; None for what has no meaning here."""
    looks = {method: _look(n) for n, method in enumerate(dict.fromkeys(mean["method"]))}
    chosen = _sparsest(table, mean)
    first = {
        method: folder / "cells" / str(rows["cell"].iloc[0]) for method, rows in chosen.items()
    }
    size = "each method at its smallest size"
    calibration = {method: calibration_of(path) for method, path in first.items()}
    histories = {method: read_history(path) for method, path in first.items()}
    fronts = "Size against quality: mean over seeds, band or bar of one standard deviation"
    yield "fronts", fronts, curves.fronts(mean, spread, looks)
    reliability = f"Calibration on the scored rows, {size}, first seed"
    yield "reliability", reliability, curves.reliability(calibration, looks)
    learning = f"Epoch by epoch, {size}, first seed"
    yield "learning", learning, curves.learning(histories, looks)
    layers = f"What is kept of the weights of each layer, {size}, mean over seeds"
    yield "layers", layers, weights.layers(chosen, folder, looks)
    units = f"The {weights.UNITS} units of the first layer with the largest norm"
    yield "weights", f"{units}, {size}, first seed; blank is zero", weights.first_weights(first)
    cost = "Seconds of training on one core, mean over seeds and sizes"
    yield "cost", cost, curves.cost(table, looks)
    yield from _evidence(table, folder)


def _evidence(table: pd.DataFrame, folder: Path) -> Iterator[tuple[str, str, Figure | None]]:
    """The evidence for each weight that the fit of a reduced route kept, a picture per prior."""
    if "route" not in table:
        return
    reduced = table[(table["route"] == "reduced")].drop_duplicates("prior")
    for prior, cell in zip(reduced["prior"], reduced["cell"], strict=True):
        posterior = load_run(folder / "cells" / cell).posterior
        if posterior is not None:
            sites = quiet_reduction(posterior, to=Gaussian(scale=0.0)).sites
            figure = plots.delta_f_histogram({k: s.spike_delta_f for k, s in sites.items()})
            caption = f"The evidence for w = 0 of each weight, nats, reduced to {prior}, first seed"
            yield f"delta_f-{plain_name(prior)}", caption, figure


def _look(k: int) -> dict[str, Any]:
    return {
        "color": f"C{k % 10}",
        "marker": _MARKERS[k % len(_MARKERS)],
        "linestyle": ("-", "--", ":")[k // 10 % 3],
        "markersize": 4,
    }


def _sparsest(table: pd.DataFrame, mean: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Method → the cells of its smallest size, one per seed."""
    import pandas as pd

    keys = [key for key in KEYS if key in mean]
    found = {}
    for method, rows in mean.groupby("method", sort=False):
        key = rows.sort_values("kept").iloc[0][keys]
        same = pd.concat(
            [
                (table[name] == key[name]) | (table[name].isna() & pd.isna(key[name]))
                for name in keys
            ],
            axis=1,
        ).all(axis=1)
        found[str(method)] = table[same]
    return found
