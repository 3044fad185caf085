"""The methods of a study by name: what trains a network on a data set with one seed, and what it leaves behind.

Owns `Trained`, `METHODS` and `method_named`. Next: `results_folder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor, nn

from pyro_bmr.comparison.cells import ROUTES, Settings, run_cell
from pyro_bmr.comparison.models import Build
from pyro_bmr.data_set import Data
from pyro_bmr.errors import ModelError
from pyro_bmr.exporting import export
from pyro_bmr.networks import BayesianNetwork
from pyro_bmr.prediction import Prediction, predict
from pyro_bmr.prior_names import prior_from_name


@dataclass(frozen=True)
class Trained:
    """What a method leaves behind.

    `predict`: rows → prediction. `weights`: those of the exported network, by name. `network`: that network as plain torch, None for a program that is no
    network. `history`: a row per epoch, with columns as in `Fit.history` where they have a meaning. `elbo`, `delta_f`: nats, NaN where there is none.
    `extra`: further figures of the method, each a column of the table.
    """

    predict: Callable[[Tensor], Prediction]
    weights: dict[str, Tensor]
    network: nn.Module | None
    history: pd.DataFrame
    seconds: float
    elbo: float = float("nan")
    delta_f: float = float("nan")
    extra: dict[str, float] = field(default_factory=dict)


Method = Callable[[Build, Data, int, Mapping[str, Any], bool], Trained]
"""(build, data, seed, options, progress) → what was trained. Options that the method doesn't know are refused by name."""


def _of_route(route: str) -> Method:
    def run(build: Build, data: Data, seed: int, options: Mapping[str, Any], progress: bool) -> Trained:
        given = dict(options)
        prior = prior_from_name(str(given.pop("prior", "gaussian")))
        unknown = set(given) - set(Settings.__dataclass_fields__)
        if unknown:
            raise ModelError(f"{route}: no option {', '.join(sorted(unknown))}; the options are: prior, {', '.join(Settings.__dataclass_fields__)}")
        settings = Settings(**given)
        cell = run_cell(build, data, prior, route, seed, settings, progress)
        program, posterior = cell.fit.program, cell.posterior
        draws = 0 if route == "point" else settings.draws
        return Trained(
            lambda x: predict(program, posterior, x, draws=draws, seed=seed),
            cell.weights,
            export(program, posterior) if isinstance(program, BayesianNetwork) else None,
            cell.fit.history,
            cell.fit.seconds,
            float(cell.fit.history["elbo"].iloc[-1]),
            cell.delta_f,
        )

    return run


METHODS: dict[str, Method] = {route: _of_route(route) for route in ROUTES}
"""Name → method."""


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        ModelError: there is no such method.
    """
    if name not in METHODS:
        raise ModelError(f"no method '{name}'; the methods are: {', '.join(METHODS)}")
    return METHODS[name]
