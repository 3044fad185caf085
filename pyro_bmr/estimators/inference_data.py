"""The draws of a fitted estimator as ArviZ has them.

Owns `data_tree`. arviz-base and xarray are imported when it is called. Next: `table_model.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_bmr.data.table_encoding import TableError

_CHAINS = 4


def data_tree(model: Any, X: Any, y: Any) -> Any:
    """A `DataTree` with the group `posterior`, and, for rows `X` and `y`, `posterior_predictive`,
    `log_likelihood` and `observed_data`. The draws are shared out among four chains if their
    number allows, so that ArviZ can compare them.
    """
    try:
        from arviz_base import from_dict
    except ImportError as error:
        raise TableError(
            "to_arviz: expected arviz-base, which is not installed; pip install 'pyro_bmr[arviz]'"
        ) from error
    if (X is None) != (y is None):
        raise TableError("to_arviz: expected X and y together, got one of them")
    posterior = {"coefficients": model.coef_draws_, "intercept": model.intercept_draws_}
    classes = getattr(model, "classes_", None)
    if classes is None and model.family_ is None:
        posterior["noise_sd"] = np.sqrt(model.noise_draws_)
    several = model.coef_draws_.ndim == 3
    groups: dict[str, Any] = {"posterior": posterior}
    if X is not None:
        log_likelihood, new, observed = model._pointwise(X, y)
        groups["posterior_predictive"] = {"y": new}
        groups["log_likelihood"] = {"y": log_likelihood}
    chained = {
        group: {name: _chained(np.asarray(values)) for name, values in parts.items()}
        for group, parts in groups.items()
    }
    if X is not None:
        chained["observed_data"] = {"y": observed}
    names = ["class", "coefficient"] if several else ["coefficient"]
    coords: dict[str, Any] = {"coefficient": model.coefficient_names_}
    dims = {"coefficients": names, "y": ["row"]}
    if several:
        coords["class"], dims["intercept"] = [str(name) for name in model.classes_], ["class"]
    return from_dict(chained, dims=dims, coords=coords)


def _chained(draws: np.ndarray) -> np.ndarray:
    """(chains, draws, …) of (draws, …)."""
    chains = _CHAINS if len(draws) % _CHAINS == 0 else 1
    return draws.reshape(chains, len(draws) // chains, *draws.shape[1:])
