"""Pictures: calibration, size against quality, and the evidence of each weight. Functions draw into
an axes, or return a figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pyro_bmr.files import write_atomically

# matplotlib takes a third of a second or more to import: it is imported where something is drawn
if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
_STYLE = {"point": "o", "fitted": "s", "reduced": "D"}


def quality_against_kept(table: pd.DataFrame, measure: str, axes: Axes) -> Axes:
    """One point per prior and route: mean of `measure` over seeds against mean kept fraction (log
    scale), bars one standard deviation.
    """
    colors = {prior: f"C{k}" for k, prior in enumerate(dict.fromkeys(table["prior"]))}
    for (prior, route), group in table.groupby(["prior", "route"], sort=False):
        spread = group[measure].std() if len(group) > 1 else 0.0
        axes.errorbar(
            group["kept"].mean(),
            group[measure].mean(),
            yerr=spread,
            fmt=_STYLE.get(str(route), "o"),
            color=colors[prior],
            capsize=3,
            label=f"{prior}, {route}",
        )
    axes.set(xscale="log", xlabel="fraction of parameters kept", ylabel=measure)
    axes.grid(alpha=0.3)
    return axes


def reliability(tables: Mapping[str, Tensor], axes: Axes) -> Axes:
    """Accuracy against confidence per bin, one line per name; `tables` from
    `metrics.calibration`.
    """
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, rows in tables.items():
        axes.plot(rows[:, 0], rows[:, 1], marker=".", label=name)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
    axes.grid(alpha=0.3)
    return axes


def delta_f_histogram(delta_f: Mapping[str, Tensor]) -> Figure:
    """One panel per site: the evidence for setting each living weight to zero, in nats; right of 0
    it goes. Values below −20 are counted at −20.
    """
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(delta_f), figsize=(2.6 * len(delta_f), 2.6), squeeze=False)
    for axes, (name, values) in zip(panels[0], delta_f.items(), strict=True):
        # double: 50 bins fit between any two float32 numbers
        finite = values[values.isfinite()].double().cpu().numpy()
        axes.hist(np.clip(finite, -20, None), bins=50, color="C0")
        axes.axvline(0, color="0.3", linewidth=1)
        axes.set(title=name, xlabel="ΔF of w = 0 (nats)", yscale="log" if finite.size else "linear")
        axes.title.set_fontsize(9)
    figure.tight_layout()
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all, and closes the figure.

    Raises:
        PyroBMRError: it cannot be written.
    """
    import matplotlib.pyplot as plt

    try:
        write_atomically(
            path, lambda p: figure.savefig(p, dpi=DPI, bbox_inches="tight", format="png")
        )
    finally:
        plt.close(figure)


def comparison_figure(table: pd.DataFrame, calibration: Mapping[str, Tensor]) -> Figure:
    """Quality and NLL against the kept fraction, and for classes the reliability diagram."""
    import matplotlib.pyplot as plt

    quality = "accuracy" if "accuracy" in table else "rmse"
    figure, panels = plt.subplots(
        1, 3 if calibration else 2, figsize=(14 if calibration else 9, 4), layout="constrained"
    )
    quality_against_kept(table, quality, panels[0]).legend(fontsize=7)
    quality_against_kept(table, "nll", panels[1])
    if calibration:
        reliability(calibration, panels[2]).legend(fontsize=7)
    return figure


def headless() -> None:
    """Draws to files without a display; the command line calls it."""
    import matplotlib

    matplotlib.use("Agg")
