r"""The evidence of a Laplace approximation as a function of the scale of its prior.

Owns `LaplaceEvidence`. With the curvature H of −log p(data | w) at ŵ, its eigenvalues h_k, the
temperature T, the prior N(η, s²), and ŵ the maximum of the likelihood,

.. math:: \log p(D \mid s) - \log p(D \mid \hat w) = -\tfrac12 \sum_k \Big[\frac{c_k^2 h_k}
    {T + s^2 h_k} + \log(1 + s^2 h_k / T)\Big]

with c = ŵ − η in the basis of the eigenvectors. If ŵ is the maximum of the posterior, for each s
anew, the first terms are ‖ŵ − η‖²/s² instead. For linear regression both are exact.

The eigenvalues of Kronecker factors are all products of one of the rows and one of the columns, so
the prior is added exactly here, in contrast to the posterior. T cannot be found in this way: at T ≠
1 the likelihood does not integrate to 1 over the data. Sources: MacKay 1992; Immer et al. 2021,
arXiv 2104.04975, for networks. Imports torch only. Next: `mixture_nodes.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.formulas.line_search import line_maximum

_MOST = 100  # steps; some six are taken
_CLOSE = 1e-12  # of log s²
_FLAT = 1e-3  # s² h/T, below which the data say nothing of any weight
_TOLERANCE = 1e-4  # of log s²
_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class LaplaceEvidence:
    """`rows`, `columns`: eigenvalues in float64, h_ij/T their products. `squares`: c_ij², or
    ‖ŵ − η‖² as one number if ŵ is `penalised`, the maximum of the posterior.
    """

    squares: Tensor
    rows: Tensor
    columns: Tensor
    penalised: bool

    @classmethod
    def of(
        cls,
        distance: Tensor,
        rows: Tensor,
        columns: Tensor | None,
        temperature: float,
        penalised: bool,
    ) -> LaplaceEvidence:
        """Of ŵ − η and Kronecker factors (n, n) and (m, m); or of all of H, (d, d), or its
        diagonal in the shape of ŵ, with None for the columns. Eigenvalues below 0 are taken for 0.
        """
        turned = distance.double()
        turned = (
            turned.flatten(1) if columns is not None and turned.ndim > 1 else turned.reshape(-1, 1)
        )
        one = rows.flatten() if columns is None and rows.shape == distance.shape else rows
        values, basis = _eigen(one, not penalised)
        if basis is not None:
            turned = basis.mT @ turned
        last = values.new_ones(1)
        if columns is not None:
            last, basis = _eigen(columns, not penalised)
            turned = turned if basis is None else turned @ basis
        squares = turned.square().sum() if penalised else turned.square()
        return cls(squares, values / temperature, last, penalised)

    def at(self, scale: float) -> float:
        """log p(D | s) − log p(D | ŵ), nats."""
        total = float(self.squares) / scale**2 if self.penalised else 0.0
        for product, squares in self._parts():
            if not self.penalised:
                total += float((squares * product / (1 + scale**2 * product)).sum())
            total += float(product.mul_(scale**2).log1p_().sum())
        return -0.5 * total

    def best_scale(self) -> float:
        """The s of the most evidence, where it is more than at the ends: 0 where ŵ = η, or if no
        weights are better, and infinite where there is no curvature.
        """
        most = float(self.rows.max()) * float(self.columns.max())
        if not most > 0:
            return math.inf
        if not bool(self.squares.any()):
            return 0.0
        if self.penalised:
            return self._where_it_turns()
        # s² = Σ c²p²/Σ p with p = s²h/(T + s²h) is no more than the largest c²
        ends = math.log(_FLAT / most), math.log(float(self.squares.max()))
        low, high = (torch.tensor(end, dtype=torch.float64) for end in (min(ends), max(ends)))
        found = line_maximum(
            lambda place: low.new_tensor(self.at(math.exp(0.5 * float(place)))),
            low,
            high,
            points=2 + math.ceil(float(high - low)),
            tolerance=_TOLERANCE,
        )
        scale = math.exp(0.5 * float(found))
        none = -0.5 * sum(float((h * squares).sum()) for h, squares in self._parts())
        return scale if self.at(scale) > none else 0.0

    def _where_it_turns(self) -> float:
        r"""The maximum with a penalised ŵ.

        There s² is ‖ŵ − η‖² over the effective number of weights,

        .. math:: \gamma(s) = \sum_k \frac{s^2 h_k}{T + s^2 h_k}

        log s² + log γ increases and is concave in log s², so that Newton's method reaches its value
        from below.
        """
        aim = math.log(float(self.squares))
        place = aim - math.log(len(self.rows) * len(self.columns))
        for _ in range(_MOST):
            count = slope = 0.0
            for product, _ in self._parts():
                share = product.mul_(math.exp(place))
                share /= 1 + share
                count += float(share.sum())
                slope += float((share - share.square()).sum())
            step = (place + math.log(count) - aim) / (1 + slope / count)
            place -= step
            if abs(step) <= _CLOSE * max(1.0, abs(place)):
                break
        return math.exp(0.5 * place)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """h/T and c² of some rows at a time."""
        count = max(1, _AT_ONCE // len(self.columns))
        for first in range(0, len(self.rows), count):
            rows = self.rows[first : first + count, None]
            squares = self.squares if self.penalised else self.squares[first : first + count]
            yield rows * self.columns, squares


def _eigen(factor: Tensor, vectors: bool) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and, if they are asked for and no diagonal has them, eigenvectors."""
    wide = factor.double()
    if wide.ndim == 1:
        return wide.clamp_min(0), None
    if not vectors:
        return torch.linalg.eigvalsh(wide).clamp_min(0), None
    values, basis = torch.linalg.eigh(wide)
    return values.clamp_min(0), basis
