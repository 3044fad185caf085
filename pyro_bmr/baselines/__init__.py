"""The baselines of a study, with which reductions are compared. Each is plain torch with the
same budget.
"""

from __future__ import annotations

from typing import Any

from pyro_bmr.baselines.dropout import DropoutOptions, dropout
from pyro_bmr.baselines.magnitude import MagnitudeOptions, RewindingOptions, magnitude, rewinding
from pyro_bmr.baselines.options import options_of
from pyro_bmr.baselines.plain import EnsembleOptions, PlainOptions, deep_ensemble, plain
from pyro_bmr.baselines.signal_to_noise import EverySignalToNoise
from pyro_bmr.baselines.training import Trained
from pyro_bmr.baselines.variational_dropout import VariationalDropoutOptions, variational_dropout

BASELINES: dict[str, tuple[Any, type[Any]]] = {
    "plain": (plain, PlainOptions),
    "ensemble": (deep_ensemble, EnsembleOptions),
    "magnitude": (magnitude, MagnitudeOptions),
    "rewinding": (rewinding, RewindingOptions),
    "dropout": (dropout, DropoutOptions),
    "sparse-variational-dropout": (variational_dropout, VariationalDropoutOptions),
}
"""Name → (function of what makes a network, data, seed, options and progress; the class of its
options).
"""
OF_REAL_TARGETS = ("plain", "magnitude", "rewinding")
"""The baselines that take real targets, and others that have a density, as well as classes."""

__all__ = ["BASELINES", "OF_REAL_TARGETS", "EverySignalToNoise", "Trained", "options_of"]
