"""What the reductions are compared with: the baselines of a study, each in plain torch and for one budget."""

from __future__ import annotations

from typing import Any

from pyro_bmr.baselines.magnitude import MagnitudeOptions, RewindingOptions, magnitude, rewinding
from pyro_bmr.baselines.point import EnsembleOptions, PointOptions, best_temperature, deep_ensemble, point
from pyro_bmr.baselines.training import Trained, options_of

BASELINES: dict[str, tuple[Any, type[Any]]] = {
    "point": (point, PointOptions),
    "ensemble": (deep_ensemble, EnsembleOptions),
    "magnitude": (magnitude, MagnitudeOptions),
    "rewinding": (rewinding, RewindingOptions),
}
"""Name → (function of what makes a network, data, seed, options and progress; the class of its options)."""

__all__ = ["BASELINES", "Trained", "best_temperature", "options_of"]
