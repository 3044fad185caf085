"""The likelihood of real targets with outliers.

Owns `StudentT`. Next: `counts.py`.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import pyro.distributions as dist
from torch import Tensor

from pyro_bmr.errors import ModelError
from pyro_bmr.likelihoods.ignored import with_missing
from pyro_bmr.likelihoods.likelihood import (
    Missing,
    check_missing,
    check_positive,
    entries,
    observed_rows,
)
from pyro_bmr.likelihoods.noise import positive_site
from pyro_bmr.likelihoods.normal import LEARNED, noise_of

_TYPICAL_DF = 10.0


@dataclass(frozen=True)
class StudentT:
    """y = output + noise · t, where t has Student's distribution with `df` degrees of freedom: few
    rows far from the output count little. Shapes are those of `Normal`.

    Args:
        df: a number, or "learned": the site `df`, with log df ~ N(log 10, 1). 4 is a usual choice;
            at 1 there is no mean.
        noise: the scale: "learned" (the site `noise`), "per output", or a number. The standard
            deviation is noise · √(df / (df − 2)).
        noise_scale, size, missing: as for `Normal`.

    Raises:
        ModelError: an argument is out of range.
    """

    df: float | Literal["learned"] = "learned"
    size: int | None = None
    _: KW_ONLY
    noise: float | Literal["learned", "per output"] = "learned"
    noise_scale: float | None = None
    missing: Missing = "refuse"

    def __post_init__(self) -> None:
        check_positive("StudentT", "learned", df=self.df)
        check_positive("StudentT", *LEARNED, noise=self.noise)
        if self.noise_scale is not None:
            check_positive("StudentT", noise_scale=self.noise_scale)
        check_missing("StudentT", self.missing)

    @property
    def inferred(self) -> tuple[str, ...]:
        """The latent sites of the likelihood."""
        noise = ("noise",) if self.noise in LEARNED else ()
        return (*noise, "df") if self.df == "learned" else noise

    def observe(self, output: Tensor, y: Tensor | None) -> Tensor:
        return observed_rows(self._rows(output, y), y, self.size, output.device)

    def log_prob(self, output: Tensor, y: Tensor) -> Tensor:
        """Σ log p(y | output) over the rows of a batch, nats, if both parameters are numbers."""
        if self.inferred:
            raise ModelError("StudentT.log_prob: expected numbers as df and noise; trace observe")
        return self._rows(output, y).log_prob(y).sum()  # type: ignore[no-any-return]

    def _rows(self, output: Tensor, y: Tensor | None) -> Any:
        """The distribution of the rows."""
        output = entries("StudentT", output, y)
        noise = noise_of(self.noise, output, self.noise_scale, y)
        df = (
            positive_site("df", output, (), math.log(_TYPICAL_DF), 1.0)
            if self.df == "learned"
            else output.new_tensor(self.df)
        )
        fn = dist.StudentT(df, output, noise, validate_args=False)
        return with_missing(fn, self.missing).to_event(output.ndim - 1)
