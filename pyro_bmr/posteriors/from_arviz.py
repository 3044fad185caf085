"""The draws of a posterior that ArviZ has: of PyMC, Stan, NumPyro or Pyro.

Owns `samples_of_arviz`; `Posterior.from_arviz` says what it takes. Imports neither ArviZ nor
xarray. Next: `from_draws.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.errors import ModelError, described


def samples_of_arviz(tree: Any, names: Collection[str] | None) -> dict[str, Tensor]:
    """Variable → draws of shape (chains, draws, …), of the group "posterior" of a DataTree or
    InferenceData, or of a Dataset; all variables, or those of `names`.
    """
    group = tree
    if not hasattr(tree, "data_vars") or "posterior" in getattr(tree, "children", {}):
        try:
            group = tree["posterior"]
        except (KeyError, TypeError, IndexError) as error:
            raise ModelError(
                "tree: expected a DataTree or InferenceData with a group 'posterior', or its"
                f" Dataset, got {described(tree)}"
            ) from error
    found = {str(name): variable for name, variable in group.data_vars.items()}
    if unknown := sorted(set(names or ()) - set(found)):
        raise ModelError(
            f"var_names: expected some of {', '.join(found)}, got {unknown[0]!r}, which is not in"
            " the group posterior"
        )
    samples = {}
    for name in found if names is None else names:
        variable = found[name]
        if not {"chain", "draw"} <= set(variable.dims):
            raise ModelError(
                f"variable '{name}': expected the dimensions chain and draw, got"
                f" {', '.join(map(str, variable.dims))}"
            )
        values = np.asarray(variable.transpose("chain", "draw", ...).values)
        if values.dtype.kind not in "fiub":
            raise ModelError(f"variable '{name}': expected real numbers, got {values.dtype}")
        samples[name] = torch.as_tensor(values.astype(np.float64))
    return samples
