r"""The posterior of one layer of a trained network, its weight and its bias together.

Owns `Layer`, `layers_of` and `precisions`. With the Kronecker factors G and A of the layer
(`curvatures.LayerCurvature`), at the temperature T and under the prior N(0, s²),

.. math:: W \sim \mathrm{MN}(M, R, C), \qquad R = (G/T + \tfrac{r}{s} I)^{-1}, \qquad
    C = (A + \tfrac{1}{rs} I)^{-1}

where r² is the ratio of the mean eigenvalues of G/T and A, as in `Posterior.from_curvature`. M has
a column for the bias. Next: `group_evidence.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.curvatures.factors import Curvature, LayerCurvature
from pyro_bmr.curvatures.ranks import Ranks
from pyro_bmr.errors import ReductionError, described
from pyro_bmr.formulas import held_at_zero
from pyro_bmr.formulas.factor_inverse import damped_inverse
from pyro_bmr.formulas.gaussian import total
from pyro_bmr.formulas.laplace_evidence import LaplaceEvidence
from pyro_bmr.formulas.structure import covariance_root

_TOLERANCE = 1e-2  # of the multipliers; the error of the mean is of second order in the loss


class Precisions(NamedTuple):
    """R⁻¹ and C⁻¹ of a layer."""

    rows: Tensor
    columns: Tensor


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

    __repr__ = described

    @property
    def columns(self) -> int:
        """How many columns belong to the weight."""
        return self.mean.shape[1] - (self.bias is not None)

    @property
    def var(self) -> Tensor:
        """R_ii C_jj, (n, m), before anything is held."""
        return self.row_cov.diagonal()[:, None] * self.col_cov.diagonal()

    @property
    def cost(self) -> float:
        """Of the work on it, relative to other layers."""
        return float(len(self.row_cov)) ** 3 + float(len(self.col_cov)) ** 3

    def delta_f(self) -> Tensor:
        r"""ΔF_ij = ½ log(s²/(R_ii C_jj)) − ½ W_ij²/(R_ii C_jj) of each entry, in the shape of the
        parameter; nats.
        """
        var = self.var
        each = self.mean.square().div_(var).add_(var.div_(self.scale**2).log_()).mul_(-0.5)
        return self.as_parameter(each[:, : self.columns])

    def as_parameter(self, matrix: Tensor) -> Tensor:
        """A matrix (n, columns) in the shape of the parameter."""
        return (matrix.mT if self.turned else matrix).reshape(self.shape)

    def as_matrix(self, parameter: Tensor) -> Tensor:
        """A tensor in the shape of the parameter as a matrix (n, columns)."""
        flat = parameter.flatten(1)
        return flat.mT if self.turned else flat

    def with_held(self, pruned: Tensor) -> Tensor:
        """`held` with the entries `pruned` of the weight as well."""
        held = self.held.clone()
        held[:, : self.columns] |= self.as_matrix(pruned)
        return held

    def holding(self, pruned: Tensor) -> tuple[Layer, float, float]:
        r"""The layer with the entries `pruned` of its weight at zero and the others at their
        conditional mean; ΔF of that, a lower bound, nats; and ½ M_Sᵀ Σ_SS⁻¹ M_S, which is 1/T
        times what the loss of all rows is predicted to rise by.

        By Hadamard's inequality log |Σ_SS| ≤ Σ log R_ii C_jj.
        """
        held = self.with_held(pruned)
        new = held & ~self.held
        if not bool(new.any()):
            return self, 0.0, 0.0
        found = held_at_zero(self.mean, self.row_cov, self.col_cov, held, tolerance=_TOLERANCE)
        energy = float(found.energy)
        logs = total(self.var.div_(self.scale**2).log_(), new)
        after = replace(self, mean=found.mean, held=held)
        return after, -0.5 * (logs + energy), 0.5 * energy

    def values(self) -> dict[str, Tensor]:
        """Parameter → its value."""
        values = {self.name: self.as_parameter(self.mean[:, : self.columns])}
        if self.bias is not None:
            values[self.bias] = self.mean[:, -1]
        return values

    def draws(self, count: int, widening: float, generator: torch.Generator) -> Iterator[Layer]:
        """The layer with each draw of its posterior given the zeros, with `widening` times the
        covariance, in the place of its mean: M + Z − R Λ(Z) C for a draw Z of MN(0, R, C)
        (Matheron's rule).
        """
        rows, columns = covariance_root(self.row_cov), covariance_root(self.col_cov)
        rows = rows * widening**0.5
        for _ in range(count):
            noise = torch.randn(
                self.mean.shape, generator=generator, dtype=self.mean.dtype, device="cpu"
            )
            error = rows @ noise.to(rows.device) @ columns.mT
            given = held_at_zero(
                error, self.row_cov, self.col_cov, self.held, tolerance=_TOLERANCE
            ).mean
            yield replace(self, mean=self.mean + given)


def layers_of(
    found: Curvature,
    parameters: Mapping[str, Tensor],
    scales: Mapping[str, float],
    held: Mapping[str, Tensor],
    temperature: float,
    ranks: Ranks | None = None,
) -> dict[str, Layer]:
    """Weight → its layer, of all weights with a scale.

    Args:
        held: weight → the entries of its matrix that are zero, if any are yet.
        ranks: the processes that share out the layers; each then has all of them.
    """

    def covariances(name: str) -> tuple[Tensor, Tensor]:
        return _covariances(found.layers[name], scales[name], temperature)

    sides = {name: found.layers[name] for name in scales}
    costs = {n: float(len(f.outputs)) ** 3 + float(len(f.inputs)) ** 3 for n, f in sides.items()}
    every = (ranks or Ranks()).shared_out(costs, covariances)
    return {
        name: _layer(found.layers[name], parameters, scale, held.get(name), *every[name])
        for name, scale in scales.items()
    }


def prior_scale(
    curved: LayerCurvature,
    parameters: Mapping[str, Tensor],
    given: float | str | None,
    temperature: float,
) -> float:
    """s of a layer: the number that is given; for "empirical" that of the most evidence of the
    weight and its bias, as the maximum of the likelihood: what the training has left where the data
    say nothing does not count; else, or where the evidence has no maximum, the root mean square of
    the weight.
    """
    if not (given is None or isinstance(given, str)):
        return float(given)
    if given == "empirical":
        values = _values(curved, parameters)
        factors = curved.outputs, curved.inputs
        evidence = LaplaceEvidence.of(values, *factors, temperature, penalised=False)
        best = evidence.best_scale()
        if 0 < best < math.inf:
            return best
    weight = parameters[curved.weight].detach()
    return max(float(weight.double().square().mean().sqrt()), 1e-12)


def _layer(
    curved: LayerCurvature,
    parameters: Mapping[str, Tensor],
    scale: float,
    held: Tensor | None,
    rows: Tensor,
    columns: Tensor,
) -> Layer:
    weight = parameters[curved.weight].detach()
    matrix = weight.flatten(1).mT if curved.turned else weight.flatten(1)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    mean = matrix.to(dtype)
    if curved.bias is not None:
        mean = torch.cat([mean, parameters[curved.bias].detach().to(dtype)[:, None]], 1)
    return Layer(
        curved.weight,
        curved.bias,
        mean.contiguous(),
        rows,
        columns,
        torch.zeros_like(mean, dtype=torch.bool) if held is None else held,
        scale,
        tuple(parameters[curved.weight].shape),
        curved.turned,
    )


def _values(curved: LayerCurvature, parameters: Mapping[str, Tensor]) -> Tensor:
    """The weight as a matrix, with the bias as its last column."""
    weight = parameters[curved.weight].detach()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    matrix = (weight.flatten(1).mT if curved.turned else weight.flatten(1)).to(dtype)
    if curved.bias is None:
        return matrix
    return torch.cat([matrix, parameters[curved.bias].detach().to(dtype)[:, None]], 1)


def _covariances(curved: LayerCurvature, scale: float, temperature: float) -> tuple[Tensor, Tensor]:
    """R and C."""
    g, a = curved.outputs, curved.inputs
    if curved.is_zero:
        return scale * torch.eye(len(g)).to(g), scale * torch.eye(len(a)).to(a)
    of_rows, of_columns = _dampings(curved, scale, temperature)
    # (G/T + εI)⁻¹ = T(G + TεI)⁻¹
    rows = _damped_inverse(curved.weight, g, temperature * of_rows)
    return rows.mul_(temperature), _damped_inverse(curved.weight, a, of_columns)


def precisions(curved: LayerCurvature, scale: float, temperature: float) -> Precisions:
    """R⁻¹ and C⁻¹ in float64. They are not inverses of R and C, which have lost what is precise."""
    g, a = curved.outputs.double(), curved.inputs.double()
    if curved.is_zero:
        return Precisions(torch.eye(len(g)).to(g) / scale, torch.eye(len(a)).to(a) / scale)
    of_rows, of_columns = _dampings(curved, scale, temperature)
    rows, columns = g / temperature, a.clone()
    rows.diagonal().add_(of_rows)
    columns.diagonal().add_(of_columns)
    return Precisions(rows, columns)


def _dampings(curved: LayerCurvature, scale: float, temperature: float) -> tuple[float, float]:
    """r/s and 1/(rs)."""
    of_rows, of_columns = _mean_eigenvalue(curved.outputs), _mean_eigenvalue(curved.inputs)
    ratio = math.sqrt((of_rows / temperature) / of_columns)
    return ratio / scale, 1 / (ratio * scale)


def _mean_eigenvalue(factor: Tensor) -> float:
    return float(factor.diagonal().double().mean())


def _damped_inverse(name: str, factor: Tensor, ridge: float) -> Tensor:
    """(factor + ridge I)⁻¹."""
    found = damped_inverse(factor, ridge)
    if found is None:
        raise ReductionError(
            f"'{name}': its curvature with the prior is not positive definite in float64; raise"
            " temperature=, or give a smaller prior scale="
        )
    return found
