"""The likelihood of counts whose variance is their mean.

Owns `Poisson`. Next: `negative_binomial.py`.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import pyro.distributions as dist
from torch import Tensor

from pyro_bmr.likelihoods.counts import Counts, log_rate
from pyro_bmr.likelihoods.ignored import with_missing
from pyro_bmr.likelihoods.likelihood import Missing, check_missing


@dataclass(frozen=True)
class Poisson(Counts):
    """y ~ Poisson(exposure · exp(output)): `output` is a log rate for each entry of y, a count.

    `output` has the shape (rows,) or (rows, 1) and `y` (rows,), or both have one shape (rows, ...).

    Args:
        size: N, for a hand-written loop over batches.
        exposure: where x has the exposure of each row, > 0, such as the time under observation:
            the column of a tensor x (rows, columns), or the key of a dict x. The network does not
            see it. In a program of your own, give it as `observe(output, y, exposure=...)`.
        missing: "ignore" leaves targets that are NaN out of the likelihood. By default they are an
            error.

    Raises:
        DataError: the output has another shape, or x no such column.
    """

    size: int | None = None
    _: KW_ONLY
    exposure: int | str | None = None
    missing: Missing = "refuse"

    def __post_init__(self) -> None:
        check_missing("Poisson", self.missing)

    def log_prob(self, output: Tensor, y: Tensor, *, exposure: Tensor | None = None) -> Tensor:
        """Σ log p(y | output) over the rows of a batch, nats."""
        return self._rows(output, y, exposure).log_prob(y).sum()  # type: ignore[no-any-return]

    def _rows(self, output: Tensor, y: Tensor | None, exposure: Tensor | None) -> Any:
        """The distribution of the rows."""
        rate = log_rate("Poisson", output, y, exposure).exp()
        fn = dist.Poisson(rate, validate_args=False)
        return with_missing(fn, self.missing).to_event(rate.ndim - 1)
