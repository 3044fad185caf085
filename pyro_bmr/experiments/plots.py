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
    it is pruned. Values below −20 are counted at −20.
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


def headless() -> None:
    """Draws to files without a display; the command line calls it."""
    import matplotlib

    matplotlib.use("Agg")
