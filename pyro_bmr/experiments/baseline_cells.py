"""The baselines of a comparison, rows of plain torch beside those of the priors: a network with
early stopping and a temperature, and magnitude pruning at the size that the evidence chose.

Owns `baseline_cells` and `IN_COMPARISONS`. Next: `options.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pyro_bmr.baselines.targets import plain_likelihood
from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import ModelError
from pyro_bmr.experiments.grid import Cell
from pyro_bmr.experiments.methods import network_of
from pyro_bmr.experiments.settings import Settings, optimizer_named, usual_steps
from pyro_bmr.priors import Gaussian, Prior

IN_COMPARISONS = {"plain": "the plain network", "magnitude": "magnitude pruning"}
"""Name of a baseline → what it is called in a sentence."""
PRIOR = "none"
"""What a baseline has in the column of the priors."""


def baseline_cells(
    first: Cell,
    wanted: Sequence[str] | None,
    program: Any,
    data: Data,
    priors: Mapping[str, Prior],
    fits: Sequence[Cell],
    settings: Settings,
) -> tuple[list[Cell], str]:
    """The cells of the baselines, a row each, over the seeds of `fits`; and why there are none.

    Both hold out a sixth of the training rows, for the epoch of least NLL and for the temperature
    or noise of their predictions, and have the weight decay of the prior N(0, 1).

    Args:
        first: a cell of the comparison, without method and seed.
        wanted: names of baselines; None for all that the model and the routes allow.
        program: what the model builds.

    Raises:
        ModelError: a baseline is not known, or is asked for and not possible here.
    """
    names = list(IN_COMPARISONS) if wanted is None else list(wanted)
    if unknown := [name for name in names if name not in IN_COMPARISONS]:
        raise ModelError(
            f"baselines: expected names among {', '.join(IN_COMPARISONS)}, got '{unknown[0]}'"
        )
    sizes = _sizes(priors, fits)
    try:
        if names:
            _check(program, data, names, sizes if wanted is not None else {0: ""})
    except ModelError as error:
        if wanted is not None:
            raise
        return [], str(error).partition(": ")[2].partition(";")[0]
    seeds = list(dict.fromkeys(cell.seed for cell in fits))
    cells = [
        _cell(first, name, seed, _options(name, data, settings), sizes.get(seed, ""))
        for name in names
        for seed in seeds
        if name != "magnitude" or seed in sizes
    ]
    return cells, ""


def _check(program: Any, data: Data, names: Sequence[str], sizes: Mapping[int, str]) -> None:
    """Raises ModelError unless the baselines can be trained."""
    baselines = f"baselines {', '.join(names)}"
    network_of(program, baselines, data)
    try:
        plain_likelihood(data)
    except ModelError as error:
        raise ModelError(f"{baselines}: {error}; give baselines=()") from None
    if "magnitude" in names and not sizes:
        raise ModelError(
            "baselines: magnitude has the size of a reduced row; expected the route reduced, or"
            " magnitude left out"
        )


def _sizes(priors: Mapping[str, Prior], fits: Sequence[Cell]) -> dict[int, str]:
    """Seed → the folder of the cell whose size a pruned baseline has: that of the reduced route of
    the first Gaussian, or else of the first prior; empty without that route.
    """
    order = sorted(priors, key=lambda name: not isinstance(priors[name], Gaussian))
    reduced = [cell for cell in fits if cell.method == "reduced" and cell.name == order[0]]
    return {cell.seed: cell.slug for cell in reduced}


def _options(name: str, data: Data, settings: Settings) -> dict[str, Any]:
    """What a baseline is given. −log N(w; 0, 1) over N rows is the weight decay 1/N a row."""
    rows, batch_size = len(data.x_train), settings.batch_size
    own = settings.optimizer == "adam"
    seen = rows - round(rows / 6)
    epochs = usual_steps(rows, batch_size) / math.ceil(seen / batch_size)
    options: dict[str, Any] = {
        "epochs": settings.epochs or math.ceil(epochs),
        "batch_size": batch_size,
        "learning_rate": settings.learning_rate if own else optimizer_named("adam")[1],
        "weight_decay": 1 / rows,
        "calibrate": True,
    }
    return {**options, "early_stopping": True} if name == "plain" else options


def _cell(first: Cell, name: str, seed: int, options: Mapping[str, Any], size_of: str) -> Cell:
    line = {"prior": PRIOR, "route": name, "seed": seed, "temperature": 1.0}
    return replace(
        first,
        name=name,
        label=IN_COMPARISONS[name],
        method=name,
        options=options,
        seed=seed,
        about={**first.about, **line},
        size_of=size_of if name == "magnitude" else "",
        timed=seed == 0,
    )
