"""Figures as files, and the evidence of each weight as a histogram."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pyro_bmr.files import write_atomically

# matplotlib takes a third of a second or more to import: it is imported where something is drawn
if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130


def delta_f_histogram(delta_f: Mapping[str, Tensor]) -> Figure:
    """One panel per site: the evidence for setting each kept weight to zero, in nats; right of 0
    it is pruned. Values below −20 are counted at −20. Sites without a kept weight have no panel.
    """
    from matplotlib.figure import Figure

    some = {name: values for name, values in delta_f.items() if bool(values.isfinite().any())}
    delta_f = some or delta_f
    figure = Figure(figsize=(2.6 * len(delta_f), 2.6), layout="constrained")
    panels = figure.subplots(1, len(delta_f), squeeze=False)[0]
    for axes, (name, values) in zip(panels, delta_f.items(), strict=True):
        finite = np.clip(values[values.isfinite()].double().cpu().numpy(), -20, None)
        axes.hist(finite, bins=50, range=(-20.0, max(finite.max(initial=0.0), 1.0)), color="C0")
        axes.axvline(0, color="0.3", linewidth=1)
        axes.set(title=name, xlabel="ΔF of w = 0 (nats)", yscale="log" if finite.size else "linear")
        axes.title.set_fontsize(9)
        if finite.size:
            axes.set_ylim(bottom=0.7)  # one weight is to be seen
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all, and closes the figure if pyplot holds it.

    Raises:
        PyroBMRError: it cannot be written.
    """
    # a layout has made room for all that is drawn; to measure it again takes as long as to draw it
    box = None if figure.get_layout_engine() is not None else "tight"
    try:
        write_atomically(path, lambda p: figure.savefig(p, dpi=DPI, bbox_inches=box, format="png"))
    finally:
        if figure.canvas.manager is not None:
            import matplotlib.pyplot as plt

            plt.close(figure)


def headless() -> None:
    """Draws to files without a display; the command line calls it."""
    import matplotlib

    matplotlib.use("Agg")
