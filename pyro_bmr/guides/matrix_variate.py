r"""The matrix-variate guide: a covariance over the rows of a weight and one over its columns,
instead of one over all entries.

Owns `MatrixVariate`. Next: `scale_coupled.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from pyro_bmr.errors import ModelError
from pyro_bmr.formulas.matrix_normal import MatrixNormal
from pyro_bmr.guides.full_rank import unit_lower
from pyro_bmr.guides.latent_sites import Latent
from pyro_bmr.guides.site_normal import masked
from pyro_bmr.guides.site_wise import SiteWise
from pyro_bmr.memory import training_bytes


class MatrixVariate(SiteWise):
    r"""q(W) = MN(M, AAᵀ, BBᵀ) for each site of two or more dimensions, Cov(W_ij, W_kl) = (AAᵀ)_ik
    (BBᵀ)_jl (Louizos & Welling 2016, arXiv 1603.04733).

    The rows are the first dimension (the outputs of a layer), the columns all others. A, B lower
    triangular of sizes n × n and m × m: n² + m² numbers beside the n m of the mean. Sites of fewer
    than two rows or columns are independent Normals.

    Args:
        limit: the most rows or columns a site may have.
        others: as in `SiteWise`.

    Raises:
        ModelError: a site has more rows or columns than `limit`; the message says what they would
            take.
    """

    def __init__(
        self, program: Callable[..., Any], *args: Any, limit: int = 4096, **kwargs: Any
    ) -> None:
        self.limit = limit
        super().__init__(program, *args, **kwargs)

    def site(self, latent: Latent, scale: Tensor) -> nn.Module | None:
        if len(latent.shape) < 2 or latent.start.numel() == 0:
            return None
        rows, columns = latent.shape[0], latent.start.numel() // latent.shape[0]
        if max(rows, columns) > self.limit:
            gigabytes = training_bytes(max(rows, columns) ** 2, latent.start) / 1e9
            which, most = ("rows", rows) if rows > columns else ("columns", columns)
            raise ModelError(
                f"site '{latent.name}': a covariance over its {most} {which} takes {gigabytes:.3g}"
                f" GB with its gradient and Adam's moments, more than the limit of {self.limit}"
                " allows; use LowRankPlusDiagonal, name smaller sites in `sites`, or raise `limit`"
            )
        return MatrixSite(latent, scale, rows, columns) if min(rows, columns) > 1 else None


class MatrixSite(nn.Module):
    """A = diag(exp(row_log_scale)) (I + strictly lower part of `row_tril`), and B likewise."""

    structure = "rows × columns"

    def __init__(self, latent: Latent, scale: Tensor, rows: int, columns: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(latent.start.clone())
        self.row_log_scale = nn.Parameter((0.5 * scale.log()).expand(rows).clone())
        self.column_log_scale = nn.Parameter((0.5 * scale.log()).expand(columns).clone())
        self.row_tril = nn.Parameter(latent.start.new_zeros(rows, rows))
        self.column_tril = nn.Parameter(latent.start.new_zeros(columns, columns))

    def forward(self, values: Mapping[str, Tensor], mask: Tensor | None) -> Matrix:
        row = self.row_log_scale.exp()[:, None] * unit_lower(self.row_tril)
        column = self.column_log_scale.exp()[:, None] * unit_lower(self.column_tril)
        log_scale = self.row_log_scale[:, None] + self.column_log_scale
        return Matrix(masked(self.loc, mask), row, column, log_scale, mask)


class Matrix(NamedTuple):
    """A matrix normal with the root A ⊗ B, whose rows and columns of masked entries are zero.

    The root is lower triangular, so under any mask the log determinant is the sum of the logs of
    its diagonal.
    """

    mean: Tensor
    row: Tensor  # A
    column: Tensor  # B
    log_scale: Tensor  # log A_ii B_jj, (n, m)
    mask: Tensor | None

    def matrix(self, values: Tensor) -> Tensor:
        """`values` as rows and columns, zero where masked."""
        return masked(values.view(self.mean.shape), self.mask).reshape(self.log_scale.shape)

    @property
    def var(self) -> Tensor:
        kept = self.matrix(self.mean.new_ones(self.mean.shape))
        return (kept * (self.row.square() @ kept @ self.column.square().mT)).view(self.mean.shape)

    @property
    def log_det(self) -> Tensor:
        return 2 * self.matrix(self.log_scale).sum()

    @property
    def noise_size(self) -> int:
        return self.mean.numel()

    def draw(self, noise: Tensor) -> Tensor:
        return self.mean + masked(
            (self.row @ self.matrix(noise) @ self.column.mT).view(self.mean.shape), self.mask
        )

    def squared_distance(self, z: Tensor, noise: Tensor) -> Tensor:
        return self.matrix(noise).square().sum()

    def joint(self) -> MatrixNormal | None:
        """The matrix normal of the kept rows and columns; None if the mask prunes anything but
        whole rows and columns, since the rest is then no matrix normal.
        """
        row, column = self.row, self.column
        if self.mask is not None:
            kept = self.mask.reshape(self.log_scale.shape)
            rows, columns = kept.any(1), kept.any(0)
            if not bool((kept == rows[:, None] & columns).all()):
                return None
            row, column = row * (rows[:, None] & rows), column * (columns[:, None] & columns)
        return MatrixNormal(self.matrix(self.mean), row @ row.mT, column @ column.mT)
