"""Axes and figures of the measures of a study: fronts of size and quality, calibration, learning
curves, cost. A method has one colour in all of them.

Owns the figures, and `panels`, `legend` and `in_percent`, which all pictures share. Next:
`weights.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:  # imported where something is drawn
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Looks = Mapping[str, dict[str, Any]]
"""Method → its colour, marker and line."""
_NAMES = {
    "nll": "NLL (nats per row)",
    "ece": "ECE (15 bins of equal width)",
    "rmse": "RMSE",
    "accuracy": "accuracy",
}
_BETTER = {"accuracy": "higher is better"}
_CURVES = {
    "validation_nll": "validation NLL (nats per row)",
    "expected_log_likelihood": "expected log likelihood (nats)",
    "elbo": "ELBO (nats)",
    "kept": "weights kept",
}


def legend(figure: Figure, axes: Axes) -> None:
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


def panels(columns: int, width: float = 4.2, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A row of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    grid = figure.subplots(1, columns, squeeze=False)
    for axes in grid[0]:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid[0])


def in_percent(axes: Axes, which: Literal["x", "y"], label: str) -> None:
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


def fronts(mean: pd.DataFrame, spread: pd.DataFrame, looks: Looks) -> Figure:
    """Each measure of quality against the size: a band over seeds, a bar for one size."""
    measures = [
        name
        for name in ("accuracy", "rmse", "nll", "ece")
        if name in mean and mean[name].notna().any()
    ]
    figure, drawn = panels(len(measures))
    for axes, measure in zip(drawn, measures, strict=True):
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
        in_percent(axes, "x", "parameters kept")
    legend(figure, drawn[0])
    return figure


def reliability(tables: Mapping[str, np.ndarray | None], looks: Looks) -> Figure | None:
    """Accuracy less confidence: the diagonal of a reliability diagram takes all its room, and says
    nothing.
    """
    found = {method: rows for method, rows in tables.items() if rows is not None}
    if not found:
        return None
    figure, (diagram, gap) = panels(2)
    diagram.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    gap.axhline(0, color="0.7", linewidth=1)
    for method, rows in found.items():
        diagram.plot(rows[:, 0], rows[:, 1], label=method, **looks[method])
        gap.plot(rows[:, 0], rows[:, 1] - rows[:, 0], **looks[method])
    diagram.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    gap.set(xlim=(0, 1), xlabel="confidence", ylabel="accuracy − confidence")
    gap.set_title("above 0 too timid, below too bold", fontsize=8, color="0.4")
    legend(figure, diagram)
    return figure


def learning(histories: Mapping[str, pd.DataFrame], looks: Looks) -> Figure | None:
    """Likelihood, evidence bound and size, epoch by epoch; None for methods without epochs."""
    from matplotlib.ticker import MaxNLocator

    columns = [
        name
        for name in _CURVES
        if any(name in history and history[name].notna().any() for history in histories.values())
    ]
    if not columns:
        return None
    figure, drawn = panels(len(columns))
    for axes, column in zip(drawn, columns, strict=True):
        for method, history in histories.items():
            there = column in history and "epoch" in history
            curve: tuple[Any, Any] = (history["epoch"], history[column]) if there else ([], [])
            axes.plot(*curve, label=method, **{**looks[method], "marker": None})
        axes.set(xlabel="epoch", ylabel=_CURVES[column])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if column == "kept":
            in_percent(axes, "y", _CURVES[column])
        elif column != "validation_nll":
            _cut_first_epochs(axes, [h[column] for h in histories.values() if column in h])
    legend(figure, drawn[0])
    return figure


def _cut_first_epochs(axes: Axes, curves: list[pd.Series]) -> None:
    """The first epochs would hide all others."""
    import pandas as pd

    finite = pd.concat(curves).dropna()
    if len(finite) > 4:
        low = float(finite.quantile(0.1))
        axes.set_ylim(bottom=low - 0.02 * abs(low))


def cost(table: pd.DataFrame, looks: Looks) -> Figure:
    """Seconds of training, a bar per method."""
    groups = table.groupby("method", sort=False)["seconds"]
    mean, spread = groups.mean(), groups.std().fillna(0.0)
    figure, (axes,) = panels(1, 6.5, 0.35 * len(mean) + 1.0)
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
