"""Which engine fits a table under which prior.

Owns `ENGINES`, `engine_of` and `fitted`. Next: `pictures.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_bmr.data.table_encoding import TableError, refused
from pyro_bmr.estimators.engines import Options, gaussian, spike_and_slab
from pyro_bmr.estimators.generalised_subsets import GeneralisedLinear
from pyro_bmr.estimators.horseshoe_chain import horseshoe
from pyro_bmr.estimators.mean_field_subsets import mean_field
from pyro_bmr.estimators.model_average import Average
from pyro_bmr.estimators.subset_evidence import Regression

ENGINES = {
    "spike-and-slab": ("search", "mean-field"),
    "horseshoe": ("gibbs",),
    "gaussian": ("search", "nuts"),
}
"""Prior → its engines; the first is the default."""
WIDEST_SEARCH = {True: 20_000, False: 5_000}
"""Columns of a linear model, and of others, beyond which the default is mean field."""
_WIDEST_GAUSSIAN = 2_000
_STEPS = {
    "search": (1000, 200),
    "mean-field": (4, 4),
    "gibbs": (2000, 4000),
    "nuts": (500, 500),
}
"""By default: of a linear model, of another."""


def engine_of(prior: str, engine: Any, columns: int, linear: bool) -> str:
    """The engine that is asked for, or the default one for the size.

    Raises:
        TableError: the prior has no such engine, or there are too many columns for it.
    """
    if prior not in ENGINES:
        raise refused("prior", f"one of {', '.join(ENGINES)}", prior)
    known = ENGINES[prior]
    if engine is not None and engine not in known:
        rule = f"None or one of {', '.join(known)} for prior={prior!r}"
        raise refused("engine", rule, engine)
    if prior == "gaussian" and columns > _WIDEST_GAUSSIAN:
        raise TableError(
            f"prior='gaussian': expected at most {_WIDEST_GAUSSIAN} columns, got {columns}; take"
            " prior='spike-and-slab'"
        )
    if engine is not None:
        return str(engine)
    wide = prior == "spike-and-slab" and columns > WIDEST_SEARCH[linear]
    return known[1] if wide else known[0]


def fitted(
    of: Regression | GeneralisedLinear,
    prior: str,
    engine: str,
    steps: int | None,
    draws: int,
    rng: np.random.Generator,
) -> tuple[Average, Regression | GeneralisedLinear]:
    """The posterior, and the model with the parameters of its family."""
    usual = _STEPS[engine][not isinstance(of, Regression)]
    options = Options(usual if steps is None else steps, draws)
    if not len(of.groups):  # the intercept alone
        return spike_and_slab(of, options, rng), of
    if engine == "nuts":
        from pyro_bmr.estimators.nuts_chain import nuts

        return nuts(of, options, rng)
    if engine == "mean-field":
        return mean_field(of, options, rng), of
    if engine == "gibbs":
        return horseshoe(of, options, rng), of
    return (gaussian if prior == "gaussian" else spike_and_slab)(of, options, rng), of
