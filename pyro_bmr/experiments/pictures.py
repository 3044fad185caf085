"""The pictures of a study, one set per model and data set: fronts of size and quality, calibration,
learning curves, layers, first weights, cost.

Owns `draw` and `Picture`. A method has one colour in all of them. Where a method has several target
fractions and one has to be chosen, it is the smallest that is finished. Next: `page.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file

from pyro_bmr.errors import PyroBMRError
from pyro_bmr.experiments import plots
from pyro_bmr.experiments.cell_folder import read_cell, read_history
from pyro_bmr.files import reading

if TYPE_CHECKING:  # imported where something is drawn
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEYS = ("model", "data", "method", "option_kept")
_MARKERS = "osD^vP*X<>"
_NAMES = {
    "nll": "NLL (nats per row)",
    "ece": "ECE (15 bins of equal width)",
    "rmse": "RMSE",
    "accuracy": "accuracy",
}
_BETTER = {"accuracy": "higher is better"}
_UNITS = 12  # first-layer units that are shown


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
    for k, place in enumerate(
        mean[["model", "data"]].drop_duplicates().itertuples(index=False, name=None)
    ):
        here, mean_here, spread_here = (
            part[(part["model"] == place[0]) & (part["data"] == place[1])]
            for part in (table, mean, spread)
        )
        looks = {method: _look(n) for n, method in enumerate(dict.fromkeys(mean_here["method"]))}
        chosen = _sparsest(here, mean_here)
        first = {
            method: folder / "cells" / str(rows["cell"].iloc[0]) for method, rows in chosen.items()
        }
        size = "each method at its smallest size"
        calibration = {
            method: read_cell(path / "report.json").get("calibration")
            for method, path in first.items()
        }
        drawn = [
            (
                "fronts",
                "Size against quality: mean over seeds, band or bar of one standard deviation",
                _fronts(mean_here, spread_here, looks),
            ),
            (
                "reliability",
                f"Calibration on the scored rows, {size}, first seed",
                _reliability(calibration, looks),
            ),
            ("learning", f"Epoch by epoch, {size}, first seed", _learning(first, looks)),
            (
                "layers",
                f"What is kept of the weights of each layer, {size}, mean over seeds",
                _layers(chosen, folder, looks),
            ),
            (
                "weights",
                (
                    f"The {_UNITS} units of the first layer with the largest norm, {size}, first"
                    " seed; blank is zero"
                ),
                _first_weights(first),
            ),
            (
                "cost",
                "Seconds of training on one core, mean over seeds and sizes",
                _cost(here, looks),
            ),
        ]
        for name, caption, figure in drawn:
            if figure is not None:
                file = f"{k + 1}-{name}.png"
                plots.save_figure(figure, folder / "pictures" / file)
                pictures.append(Picture(file, f"{caption}.", place))
    return pictures


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


def _legend(figure: Figure, axes: Axes) -> None:
    """One legend below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 4),
        fontsize=8,
        frameon=False,
    )


def _panels(columns: int, width: float = 4.2, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained"
    )
    for axes in panels[0]:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels[0])


def _in_percent(axes: Axes, which: Literal["x", "y"], label: str) -> None:
    """A logarithmic axis of fractions, which ends at 100 %."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    low, high = axis.get_view_interval()
    low, high = min(float(low), 0.5), min(float(high), 1.15)
    steps = (1, 2, 5) if high / low < 200 else (1,)
    axis.set_ticks([c * 10.0**e for e in range(-7, 1) for c in steps if low <= c * 10.0**e <= high])
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.set_minor_formatter(NullFormatter())
    axes.set(**{f"{which}lim": (low, high), f"{which}label": label})


def _fronts(
    mean: pd.DataFrame, spread: pd.DataFrame, looks: Mapping[str, dict[str, Any]]
) -> Figure:
    measures = [
        name
        for name in ("accuracy", "rmse", "nll", "ece")
        if name in mean and mean[name].notna().any()
    ]
    figure, panels = _panels(len(measures))
    for axes, measure in zip(panels, measures, strict=True):
        for method, rows in mean.groupby("method", sort=False):
            rows = rows[rows["kept"] > 0].sort_values("kept")
            band = spread.loc[rows.index, measure].fillna(0.0)
            look = looks[str(method)]
            if len(rows) > 1:
                axes.plot(rows["kept"], rows[measure], label=method, **look)
                axes.fill_between(
                    rows["kept"],
                    rows[measure] - band,
                    rows[measure] + band,
                    color=look["color"],
                    alpha=0.15,
                    linewidth=0,
                )
            else:
                axes.errorbar(
                    rows["kept"], rows[measure], yerr=band, capsize=3, label=method, **look
                )
        axes.set_ylabel(_NAMES[measure])
        axes.set_title(_BETTER.get(measure, "lower is better"), fontsize=8, color="0.4")
        _in_percent(axes, "x", "parameters kept")
    _legend(figure, panels[0])
    return figure


def _reliability(tables: Mapping[str, Any], looks: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Accuracy less confidence: the diagonal of a reliability diagram takes all its room, and says
    nothing.
    """
    found = {
        method: np.asarray(rows, dtype=float) for method, rows in tables.items() if rows is not None
    }
    if not found:
        return None
    figure, (diagram, gap) = _panels(2)
    diagram.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    gap.axhline(0, color="0.7", linewidth=1)
    for method, rows in found.items():
        diagram.plot(rows[:, 0], rows[:, 1], label=method, **looks[method])
        gap.plot(rows[:, 0], rows[:, 1] - rows[:, 0], **looks[method])
    diagram.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    gap.set(xlim=(0, 1), xlabel="confidence", ylabel="accuracy − confidence")
    gap.set_title("above 0 too timid, below too bold", fontsize=8, color="0.4")
    _legend(figure, diagram)
    return figure


def _learning(folders: Mapping[str, Path], looks: Mapping[str, dict[str, Any]]) -> Figure | None:
    import pandas as pd
    from matplotlib.ticker import MaxNLocator

    histories = {method: read_history(folder) for method, folder in folders.items()}
    wanted = {
        "validation_nll": "validation NLL (nats per row)",
        "expected_log_likelihood": "expected log likelihood (nats)",
        "elbo": "ELBO (nats)",
        "kept": "weights kept",
    }
    columns = [
        name
        for name in wanted
        if any(name in history and history[name].notna().any() for history in histories.values())
    ]
    if not columns:
        return None
    figure, panels = _panels(len(columns))
    for axes, column in zip(panels, columns, strict=True):
        for method, history in histories.items():
            if column in history and "epoch" in history:
                axes.plot(
                    history["epoch"],
                    history[column],
                    label=method,
                    **{**looks[method], "marker": None},
                )
            else:
                axes.plot([], [], label=method, **{**looks[method], "marker": None})
        axes.set(xlabel="epoch", ylabel=wanted[column])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if column == "kept":
            _in_percent(axes, "y", wanted[column])
        elif column != "validation_nll":
            finite = pd.concat(
                [history[column] for history in histories.values() if column in history]
            ).dropna()
            if len(finite) > 4:  # the first epochs would hide all others
                axes.set_ylim(
                    bottom=float(finite.quantile(0.1)) - 0.02 * abs(float(finite.quantile(0.1)))
                )
    _legend(figure, panels[0])
    return figure


def _layers(
    chosen: Mapping[str, pd.DataFrame], folder: Path, looks: Mapping[str, dict[str, Any]]
) -> Figure | None:
    fractions: dict[str, dict[str, list[float]]] = {}
    for method, rows in chosen.items():
        for cell in rows["cell"]:
            tensors = read_cell(folder / "cells" / cell / "report.json").get("tensors", {})
            for layer, about in tensors.items():
                if len(about["shape"]) > 1:
                    fractions.setdefault(method, {}).setdefault(layer, []).append(
                        about["nonzero"] / max(math.prod(about["shape"]), 1)
                    )
    layers = list(dict.fromkeys(layer for found in fractions.values() for layer in found))
    if not layers:
        return None
    figure, (axes,) = _panels(1, max(4.5, min(0.35 * len(layers) * len(fractions) + 2.0, 14)))
    width = 0.8 / len(fractions)
    for k, (method, found) in enumerate(fractions.items()):
        values = [found.get(layer, [math.nan]) for layer in layers]
        places = np.arange(len(layers)) + (k - (len(fractions) - 1) / 2) * width
        axes.bar(
            places,
            [float(np.mean(v)) for v in values],
            width,
            yerr=[float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in values],
            color=looks[method]["color"],
            label=method,
            error_kw={"elinewidth": 0.8},
        )
    axes.set_xticks(range(len(layers)), layers, rotation=0 if len(layers) < 6 else 60, fontsize=8)
    _in_percent(axes, "y", "weights kept")
    axes.grid(visible=False, axis="x")
    _legend(figure, axes)
    return figure


def _first_weights(folders: Mapping[str, Path]) -> Figure | None:
    import matplotlib.pyplot as plt

    images = {
        method: found
        for method, folder in folders.items()
        if (found := _first_layer(folder)) is not None
    }
    if not images:
        return None
    figure, panels = plt.subplots(
        len(images),
        _UNITS,
        figsize=(0.75 * _UNITS + 2.2, 0.85 * len(images)),
        squeeze=False,
        layout="constrained",
    )
    for row, (method, units) in zip(panels, images.items(), strict=True):
        limit = max(float(np.abs(units).max()), 1e-12)
        for k, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="0.8", linewidth=0.5)
            if k < len(units):
                axes.imshow(
                    units[k], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
                )
            else:
                axes.set_visible(False)
        row[0].set_ylabel(method, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def _first_layer(folder: Path) -> np.ndarray | None:
    """(units, height, width) of the units with the largest norm, if the first layer reads images:
    kernels, or dense rows in the shape of the input.
    """
    report = read_cell(folder / "report.json")
    shape = report.get("input_shape", [])
    name = next(
        (name for name, about in report.get("tensors", {}).items() if len(about["shape"]) > 1), None
    )
    if len(shape) != 3 or name is None:
        return None
    path = folder / "model.safetensors"
    with reading(
        f"'{path}' is not what a study writes",
        PyroBMRError,
        "remove the folder to run the cell again",
    ):
        weight = load_file(path)[name].float()
    if weight.ndim == 2 and weight.shape[1] == math.prod(shape):
        weight = weight.reshape(-1, *shape)
    if weight.ndim != 4:
        return None
    order = weight.flatten(1).norm(dim=1).argsort(descending=True)[:_UNITS]
    return torch.Tensor.numpy(weight[order].mean(1))


def _cost(table: pd.DataFrame, looks: Mapping[str, dict[str, Any]]) -> Figure:
    groups = table.groupby("method", sort=False)["seconds"]
    mean, spread = groups.mean(), groups.std().fillna(0.0)
    figure, (axes,) = _panels(1, 6.5, 0.35 * len(mean) + 1.0)
    axes.barh(
        mean.index,
        mean,
        xerr=spread,
        color=[looks[str(method)]["color"] for method in mean.index],
        error_kw={"elinewidth": 0.8},
    )
    for place, seconds in enumerate(mean):
        axes.text(
            seconds + float(spread.iloc[place]),
            place,
            f"  {seconds:.3g} s",
            va="center",
            fontsize=8,
        )
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.15)
    axes.set_xlabel("seconds")
    return figure
