r"""The evidence of a Laplace approximation as a function of the scale of its prior.

Owns `LaplaceEvidence`. With the curvature H of −log p(data | w) at ŵ, its eigenvalues h_k, the
temperature T and the prior N(η, s²),

.. math:: \log p(D \mid s) - \log p(D \mid \hat w) = -\frac{\lVert \hat w - \eta \rVert^2}{2 s^2} -
    \tfrac12 \log \Big| I + \frac{s^2}{T} H \Big|
    = -\frac{\lVert \hat w - \eta \rVert^2}{2 s^2} - \tfrac12 \sum_k \log(1 + s^2 h_k / T)

The eigenvalues of Kronecker factors are all products of one of the rows and one of the columns, so
the prior is added exactly here, in contrast to the posterior. T cannot be found in this way: at T ≠
1 the likelihood does not integrate to 1 over the data. Sources: MacKay 1992; Immer et al. 2021,
arXiv 2104.04975, for networks. Imports torch only. Next: `log_gamma.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST = 100  # steps; some six are taken
_CLOSE = 1e-12  # of log s²
_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class LaplaceEvidence:
    """`square`: ‖ŵ − η‖². `rows`, `columns`: eigenvalues in float64, h_ij/T their products."""

    square: float
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(
        cls, distance: Tensor, rows: Tensor, columns: Tensor | None, temperature: float
    ) -> LaplaceEvidence:
        """Of ŵ − η and Kronecker factors (n, n) and (m, m); or of all of H, (d, d), or its
        diagonal, with None for the columns. Eigenvalues below 0 are taken for 0.
        """
        each = [rows.flatten()] if rows.shape == distance.shape else [rows]
        if columns is not None:
            each.append(columns)
        values = [_eigenvalues(factor) for factor in each]
        last = values[1] if columns is not None else values[0].new_ones(1)
        return cls(float(distance.double().square().sum()), values[0] / temperature, last)

    def at(self, scale: float) -> float:
        """log p(D | s) − log p(D | ŵ), nats."""
        logs = sum(float(part.mul_(scale**2).log1p_().sum()) for part in self._products())
        return -0.5 * (self.square / scale**2 + logs)

    def best_scale(self) -> float:
        r"""The s of the most evidence; 0 where ŵ = η, infinite where there is no curvature.

        There s² is ‖ŵ − η‖² over the effective number of weights,

        .. math:: \gamma(s) = \sum_k \frac{s^2 h_k}{T + s^2 h_k}

        log s² + log γ increases and is concave in log s², so that Newton's method reaches its value
        from below.
        """
        if not self.square:
            return 0.0
        if not float(self.rows.max()) * float(self.columns.max()) > 0:
            return math.inf
        place = math.log(self.square / (len(self.rows) * len(self.columns)))
        for _ in range(_MOST):
            count = slope = 0.0
            for part in self._products():
                share = part.mul_(math.exp(place))
                share /= 1 + share
                count += float(share.sum())
                slope += float((share - share.square()).sum())
            step = (place + math.log(count) - math.log(self.square)) / (1 + slope / count)
            place -= step
            if abs(step) <= _CLOSE * max(1.0, abs(place)):
                break
        return math.exp(0.5 * place)

    def _products(self) -> Iterator[Tensor]:
        """h/T, some rows at a time."""
        for rows in self.rows.split(max(1, _AT_ONCE // len(self.columns))):
            yield rows[:, None] * self.columns


def _eigenvalues(factor: Tensor) -> Tensor:
    values = factor.double() if factor.ndim == 1 else torch.linalg.eigvalsh(factor.double())
    return values.clamp_min(0)
