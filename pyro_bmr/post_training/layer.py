r"""The posterior of one layer of a trained network, its weight and its bias together.

Owns `Layer` and `layers_of`. With the Kronecker factors G and A of the layer
(`curvatures.LayerCurvature`), at the temperature T and under the prior N(0, s²),

.. math:: W \sim \mathrm{MN}(M, R, C), \qquad R = (G/T + \tfrac{r}{s} I)^{-1}, \qquad
    C = (A + \tfrac{1}{rs} I)^{-1}

where r² is the ratio of the mean eigenvalues of G/T and A, as in `Posterior.from_curvature`. M has
a column for the bias. Next: `masks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_bmr.curvatures.factors import Curvature, LayerCurvature
from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas import held_at_zero

_TOLERANCE = 1e-2  # of the multipliers; the error of the mean is of second order in the loss


@dataclass(frozen=True)
class Layer:
    """W ~ MN(`mean`, `row_cov`, `col_cov`) of the weight `name` and, in the last column, its
    `bias`. `held`: True where an entry is zero. `scale`: s. `turned`: the parameter is the
    transpose of W.
    """

    name: str
    bias: str | None
    mean: Tensor
    row_cov: Tensor
    col_cov: Tensor
    held: Tensor
    scale: float
    shape: tuple[int, ...]
    turned: bool

    @property
    def columns(self) -> int:
        """How many columns belong to the weight."""
        return self.mean.shape[1] - (self.bias is not None)

    @property
    def var(self) -> Tensor:
        """R_ii C_jj, (n, m), before anything is held."""
        return self.row_cov.diagonal()[:, None] * self.col_cov.diagonal()

    def delta_f(self) -> Tensor:
        r"""ΔF_ij = ½ log(s²/(R_ii C_jj)) − ½ W_ij²/(R_ii C_jj) of each entry, in the shape of the
        parameter; nats.
        """
        var = self.var
        each = 0.5 * torch.log(self.scale**2 / var) - 0.5 * self.mean.square() / var
        return self.as_parameter(each[:, : self.columns])

    def as_parameter(self, matrix: Tensor) -> Tensor:
        """A matrix (n, columns) in the shape of the parameter."""
        return (matrix.mT if self.turned else matrix).reshape(self.shape)

    def as_matrix(self, parameter: Tensor) -> Tensor:
        """A tensor in the shape of the parameter as a matrix (n, columns)."""
        flat = parameter.flatten(1)
        return flat.mT if self.turned else flat

    def holding(self, pruned: Tensor) -> tuple[Layer, float, float]:
        r"""The layer with the entries `pruned` of its weight at zero and the others at their
        conditional mean; ΔF of that, a lower bound, nats; and ½ M_Sᵀ Σ_SS⁻¹ M_S, which is 1/T
        times what the loss of all rows is predicted to rise by.

        By Hadamard's inequality log |Σ_SS| ≤ Σ log R_ii C_jj.
        """
        held = self.held.clone()
        held[:, : self.columns] |= self.as_matrix(pruned)
        new = held & ~self.held
        if not bool(new.any()):
            return self, 0.0, 0.0
        found = held_at_zero(self.mean, self.row_cov, self.col_cov, held, tolerance=_TOLERANCE)
        energy = float(found.energy)
        occam = 0.5 * float(torch.log(self.scale**2 / self.var[new].double()).sum())
        after = replace(self, mean=found.mean, held=held)
        return after, occam - 0.5 * energy, 0.5 * energy

    def moved(self, gradient: Tensor, temperature: float) -> Tensor:
        """The step −R D C/T for the gradient D, given that the held entries do not move."""
        step = -(self.row_cov @ gradient @ self.col_cov) / temperature
        held = self.held
        return held_at_zero(step, self.row_cov, self.col_cov, held, tolerance=_TOLERANCE).mean


def layers_of(
    found: Curvature,
    parameters: Mapping[str, Tensor],
    scales: Mapping[str, float],
    held: Mapping[str, Tensor],
    temperature: float,
) -> dict[str, Layer]:
    """Weight → its layer, of all weights with a scale.

    Args:
        held: weight → the entries of its matrix that are zero, if any are yet.
    """
    return {
        name: _layer(found.layers[name], parameters, scale, held.get(name), temperature)
        for name, scale in scales.items()
    }


def _layer(
    curved: LayerCurvature,
    parameters: Mapping[str, Tensor],
    scale: float,
    held: Tensor | None,
    temperature: float,
) -> Layer:
    weight = parameters[curved.weight].detach()
    matrix = weight.flatten(1).mT if curved.turned else weight.flatten(1)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    mean = matrix.to(dtype)
    if curved.bias is not None:
        mean = torch.cat([mean, parameters[curved.bias].detach().to(dtype)[:, None]], 1)
    rows, columns = (
        _covariances(curved, scale, temperature)
        if not curved.is_zero
        else tuple(scale * torch.eye(k).to(mean) for k in mean.shape)
    )
    return Layer(
        curved.weight,
        curved.bias,
        mean.contiguous(),
        rows,
        columns,
        torch.zeros_like(mean, dtype=torch.bool) if held is None else held,
        scale,
        tuple(weight.shape),
        curved.turned,
    )


def _covariances(curved: LayerCurvature, scale: float, temperature: float) -> tuple[Tensor, Tensor]:
    """R and C."""
    g, a = curved.outputs.double() / temperature, curved.inputs.double()
    ratio = float(((g.trace() / len(g)) / (a.trace() / len(a))).sqrt())
    damping = ratio / scale, 1 / (ratio * scale)
    dtype = curved.outputs.dtype
    found = []
    for factor, ridge in zip((g, a), damping, strict=True):
        damped = factor + ridge * torch.eye(len(factor)).to(factor)
        chol, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            raise ReductionError(
                f"'{curved.weight}': its curvature with the prior is not positive definite in"
                " float64; raise temperature=, or give a smaller prior scale="
            )
        found.append(torch.cholesky_inverse(chol).to(dtype))
    return found[0], found[1]
