"""A posterior from a MATLAB file of prior and posterior moments, as dynamic causal models have
them.

Owns `read_mat` and `MatPosterior`. Next: `reduction/programs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_bmr.errors import ModelError
from pyro_bmr.files import reading
from pyro_bmr.formulas.dense import Dense
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.site import Site

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MatPosterior:
    """`posterior` has one site, "theta", with a full covariance; `names` has the name of each of
    its entries, such as "A(2,1)".
    """

    posterior: Posterior
    names: tuple[str, ...]


def read_mat(path: str | Path, variable: str | None = None) -> MatPosterior:
    """The posterior in a .mat file: the struct `variable` with the fields Ep and Cp, and M.pE and
    M.pC, or pE and pC beside them, as SPM writes its DCM. Ep and pE may be structs, which are read
    field by field and column by column, as by ``spm_vec``.

    Parameters whose prior variance is 0 are fixed, and left out. All moments are float64.

    Args:
        variable: by default the only one of the file with a field Ep, or the file itself.

    Raises:
        ModelError: the file is not readable (files of version 7.3 are HDF5: save with ``-v7``), a
            field is missing, shapes differ, a moment is not finite, the covariance is not
            symmetric, or the prior has correlations.

    Example:
        >>> found = read_mat("DCM_attention.mat")
        >>> reduction = reduce(found.posterior, to=Gaussian(scale=0), search=greedy_search)
    """
    import scipy.io

    path = Path(path)
    mend = "save it from MATLAB with save('-v7'), since 7.3 is another format"
    with reading(f"'{path}' is not a readable .mat file", ModelError, mend):
        content = scipy.io.loadmat(path, struct_as_record=False)
    fields = _fields(path, content, variable)
    names, mean = _vector(fields["Ep"])
    prior_mean = _vector(fields["pE"])[1]
    cov, prior_var = _matrix(fields["Cp"]), _prior_variance(path, fields["pC"])
    size = len(mean)
    shapes = {"pE": prior_mean.shape, "pC": prior_var.shape, "Cp": cov.shape}
    for name, shape in shapes.items():
        if set(shape) != {size}:
            raise ModelError(f"'{path}': {name}: expected {size} parameters as in Ep, got {shape}")
    for name, values in {"Ep": mean, "pE": prior_mean, "pC": prior_var, "Cp": cov}.items():
        if not np.isfinite(values).all():
            raise ModelError(f"'{path}': {name}: expected finite numbers, got NaN or infinity")
    if np.abs(cov - cov.T).max(initial=0) > 1e-6 * np.abs(cov).max(initial=0):
        raise ModelError(f"'{path}': Cp: expected a symmetric matrix")
    free = prior_var > 0
    m, c, p, v = (
        torch.from_numpy(np.ascontiguousarray(t))
        for t in (mean[free], cov[np.ix_(free, free)], prior_mean[free], prior_var[free])
    )
    c = (c + c.mT) / 2
    site = Site(m, c.diagonal().clone(), prior=Diagonal(p, v), joint=Dense(m, c))
    kept = tuple(name for name, used in zip(names, free, strict=True) if used)
    return MatPosterior(Posterior({"theta": site}), kept)


def _fields(path: Path, content: dict[str, Any], variable: str | None) -> dict[str, Any]:
    """Ep, Cp, pE and pC."""
    structs = {
        name: value.flat[0]
        for name, value in content.items()
        if isinstance(value, np.ndarray) and value.size == 1 and hasattr(value.flat[0], "Ep")
    }
    if variable is not None and variable not in structs:
        raise ModelError(
            f"'{path}': expected a struct '{variable}' with a field Ep; those with one are:"
            f" {', '.join(structs) or 'none'}"
        )
    if variable is None and len(structs) > 1:
        raise ModelError(f"'{path}': variable: expected one of {', '.join(structs)}, got none")
    found = content
    if structs:
        found = vars(structs[variable or next(iter(structs))])
        if "M" in found and found["M"].size:
            found = {**vars(found["M"].flat[0]), **found}
    if missing := [name for name in ("Ep", "Cp", "pE", "pC") if name not in found]:
        raise ModelError(
            f"'{path}': it has no {' and no '.join(missing)}; expected the posterior moments Ep"
            " and Cp, and the prior moments M.pE and M.pC, or pE and pC"
        )
    return found


def _vector(value: Any, name: str = "") -> tuple[list[str], Array]:
    """The names and the numbers in a value, depth first, arrays column by column."""
    if hasattr(value, "_fieldnames"):
        parts = [
            _vector(getattr(value, field), f"{name}.{field}" if name else field)
            for field in value._fieldnames
        ]
    elif isinstance(value, np.ndarray) and value.dtype == object:
        flat = value.ravel(order="F")
        parts = [
            _vector(part, name if len(flat) == 1 else f"{name}{{{k}}}")
            for k, part in enumerate(flat, 1)
        ]
    else:
        matrix = _matrix(value)
        numbers = matrix.ravel(order="F")
        if len(numbers) == 1:
            return [name or "theta"], numbers
        places = [np.unravel_index(k, matrix.shape, order="F") for k in range(len(numbers))]
        return [f"{name}({','.join(str(i + 1) for i in place)})" for place in places], numbers
    names = [label for part in parts for label in part[0]]
    return names, np.concatenate([np.empty(0), *(numbers for _, numbers in parts)])


def _matrix(value: Any) -> Array:
    """A dense or sparse array, or the only one in a cell, as float64."""
    while isinstance(value, np.ndarray) and value.dtype == object and value.size == 1:
        value = value.flat[0]
    dense = value.toarray() if hasattr(value, "toarray") else np.asarray(value)
    if dense.dtype.kind not in "fiub":
        raise ModelError(f"expected real numbers in the moments, got {dense.dtype}")
    return dense.astype(np.float64)


def _prior_variance(path: Path, value: Any) -> Array:
    """The prior variances: of a struct or vector of variances, or of a diagonal covariance."""
    inner = value.flat[0] if isinstance(value, np.ndarray) and value.dtype == object else value
    if hasattr(inner, "_fieldnames"):
        return _vector(inner)[1]
    matrix = _matrix(value)
    if 1 in matrix.shape:
        return matrix.ravel()
    if matrix.shape[0] != matrix.shape[1] or (matrix != np.diag(matrix.diagonal())).any():
        raise ModelError(
            f"'{path}': pC: expected variances or a diagonal covariance, got a matrix with"
            " correlations; a reduction needs an independent prior of each parameter"
        )
    return matrix.diagonal().copy()
