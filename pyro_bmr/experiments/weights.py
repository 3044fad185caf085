"""Figures of the weights of a study: what is kept of each layer, and the first layer as images.

Owns `layers` and `first_weights`. Next: `pictures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file

from pyro_bmr.errors import PyroBMRError
from pyro_bmr.experiments.curves import Looks, in_percent, legend, panels
from pyro_bmr.experiments.folder import AGAIN, read_cell
from pyro_bmr.files import reading

if TYPE_CHECKING:  # imported where something is drawn
    import pandas as pd
    from matplotlib.figure import Figure

UNITS = 12  # first-layer units that are shown


def layers(chosen: Mapping[str, pd.DataFrame], folder: Path, looks: Looks) -> Figure | None:
    """What is kept of each layer, mean over seeds, a bar per method."""
    fractions = {method: _fractions(rows["cell"], folder) for method, rows in chosen.items()}
    fractions = {method: found for method, found in fractions.items() if found}
    names = list(dict.fromkeys(layer for found in fractions.values() for layer in found))
    if not names:
        return None
    figure, (axes,) = panels(1, max(4.5, min(0.35 * len(names) * len(fractions) + 2.0, 14)))
    width = 0.8 / len(fractions)
    for k, (method, found) in enumerate(fractions.items()):
        values = [found.get(layer, [math.nan]) for layer in names]
        axes.bar(
            np.arange(len(names)) + (k - (len(fractions) - 1) / 2) * width,
            [float(np.mean(v)) for v in values],
            width,
            yerr=[float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in values],
            color=looks[method]["color"],
            label=method,
            error_kw={"elinewidth": 0.8},
        )
    axes.set_xticks(range(len(names)), names, rotation=0 if len(names) < 6 else 60, fontsize=8)
    in_percent(axes, "y", "weights kept")
    axes.grid(visible=False, axis="x")
    legend(figure, axes)
    return figure


def _fractions(cells: Iterable[str], folder: Path) -> dict[str, list[float]]:
    """Layer → the fraction of it that is not zero, a number per cell."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        tensors = read_cell(folder / "cells" / cell / "report.json").get("tensors", {})
        for layer, about in tensors.items():
            if len(about["shape"]) > 1:
                size = max(math.prod(about["shape"]), 1)
                found.setdefault(layer, []).append(about["nonzero"] / size)
    return found


def first_weights(folders: Mapping[str, Path]) -> Figure | None:
    """The units of the first layer with the largest norm, a row per method; blank is zero."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    images = {
        method: found
        for method, folder in folders.items()
        if (found := _first_layer(folder)) is not None
    }
    if not images:
        return None
    colours = colormaps["RdBu_r"].with_extremes(bad="0.8")
    figure = Figure(figsize=(0.75 * UNITS + 2.2, 0.85 * len(images)))
    rows = figure.subplots(len(images), squeeze=False, gridspec_kw={"hspace": 0.1})[:, 0]
    for axes, (method, units) in zip(rows, images.items(), strict=True):
        limit = max(float(np.abs(units).max()), 1e-12)
        image = _framed(units)
        axes.imshow(image, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set(xticks=[], yticks=[], xlim=(-0.5, image.shape[1] / len(units) * UNITS - 0.5))
        axes.spines[:].set_visible(False)
        axes.set_ylabel(method, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def _framed(units: np.ndarray) -> np.ndarray:
    """The images side by side, each in a frame of NaN; small ones in larger pixels, so that the
    frame stays thin.
    """
    times = max(1, 28 // max(units.shape[1:]))
    large = units.repeat(times, 1).repeat(times, 2)
    return np.hstack(list(np.pad(large, [(0, 0), (1, 1), (1, 1)], constant_values=np.nan)))


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
    with reading(f"'{path}' is not what a study writes", PyroBMRError, AGAIN):
        weight = load_file(path)[name].float()
    if weight.ndim == 2 and weight.shape[1] == math.prod(shape):
        weight = weight.reshape(-1, *shape)
    if weight.ndim != 4:
        return None
    order = weight.flatten(1).norm(dim=1).argsort(descending=True)[:UNITS]
    return torch.Tensor.numpy(weight[order].mean(1))
