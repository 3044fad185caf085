"""The figure of a fitted estimator: intervals, inclusion, predicted against observed.

Owns `figure_of`. matplotlib is imported when it is called. Next: `classifier.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 30  # coefficients in a figure
_KEPT, _PRUNED = "C0", "0.7"


def figure_of(model: Any, X: Any, y: Any) -> Figure:
    """Up to 30 coefficients, those with the largest inclusion: mean and 90 % interval,
    times the standard deviation of their column, and their inclusion. With `X` and `y`
    also predictions of these rows.
    """
    import matplotlib.pyplot as plt

    order = np.argsort(-model.inclusion_, kind="stable")[:_MOST]
    order = np.sort(order)[::-1]
    panels = 2 if X is None or y is None else 3
    height = 1.6 + 0.24 * max(len(order), 8)
    figure, axes = plt.subplots(1, panels, figsize=(4.2 * panels, height), squeeze=False)
    _intervals(axes[0][0], model, order)
    _inclusion(axes[0][1], model, order)
    if panels == 3:
        (_probabilities if hasattr(model, "classes_") else _predictions)(axes[0][2], model, X, y)
    figure.tight_layout()
    return figure


def _intervals(axes: Axes, model: Any, order: Any) -> None:
    draws = model.coef_draws_[..., order] * model.columns_.spread[order]
    mean = model.coef_[..., order] * model.columns_.spread[order]
    if draws.ndim == 2:
        draws, mean = draws[:, None], mean[None]
    rows = np.arange(len(order))
    several = draws.shape[1] > 1
    for k in range(draws.shape[1]):
        low, high = np.quantile(draws[:, k], [0.05, 0.95], axis=0)
        place = rows + (0.25 * (k - (draws.shape[1] - 1) / 2) if several else 0.0)
        colors = [f"C{k}" if several else _KEPT if model.kept_[g] else _PRUNED for g in order]
        axes.hlines(place, low, high, colors=colors)
        axes.scatter(mean[k], place, color=colors, s=14, zorder=3,
                     label=str(model.classes_[k]) if several else None)  # fmt: skip
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(rows, [model.coefficient_names_[g] for g in order], fontsize=8)
    axes.set(xlabel="coefficient × sd of its column", title="mean and 90 % interval")
    if several:
        axes.legend(fontsize=8)


def _inclusion(axes: Axes, model: Any, order: Any) -> None:
    rows = np.arange(len(order))
    colors = [_KEPT if model.kept_[g] else _PRUNED for g in order]
    axes.barh(rows, model.inclusion_[order], color=colors)
    axes.axvline(0.5, color="0.3", linewidth=0.8, linestyle=":")
    axes.set_yticks(rows, [""] * len(rows))
    label = "P(κ < ½)" if model.prior == "horseshoe" else "probability"
    axes.set(xlim=(0, 1.02), xlabel=label, title="inclusion")


def _predictions(axes: Axes, model: Any, X: Any, y: Any) -> None:
    mean, (low, high) = model.predict(X), model.predict_interval(X).T
    reach = np.maximum([mean - low, high - mean], 0.0)  # the mean of counts may be outside
    axes.errorbar(mean, y, xerr=reach, fmt="o", markersize=3, color=_KEPT, ecolor="0.85", zorder=2)
    ends = [min(mean.min(), np.min(y)), max(mean.max(), np.max(y))]
    axes.plot(ends, ends, color="0.3", linewidth=0.8, zorder=3)
    axes.set(xlabel="predicted, with 90 % interval", ylabel="observed", title="predictions")


def _probabilities(axes: Axes, model: Any, X: Any, y: Any) -> None:
    known = {name: k for k, name in enumerate(model.classes_.tolist())}
    labels = np.array([known[name] for name in np.asarray(y).tolist()])
    found = model.predict_proba(X)[np.arange(len(labels)), labels]
    shaken = labels + np.random.default_rng(0).uniform(-0.2, 0.2, len(labels))
    axes.scatter(shaken, found, s=8, color=_KEPT, alpha=0.5)
    axes.set_xticks(range(len(model.classes_)), [str(name) for name in model.classes_])
    axes.set(ylim=(-0.02, 1.02), xlabel="observed", title="probability of the observed class")
