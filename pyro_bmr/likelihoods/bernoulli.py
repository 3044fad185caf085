"""The likelihood of yes or no, once or many times a row.

Owns `Bernoulli`. Next: `weighted.py`.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import pyro.distributions as dist
from torch import Tensor

from pyro_bmr.likelihoods.ignored import with_missing
from pyro_bmr.likelihoods.likelihood import Missing, check_missing, entries, observed_rows


@dataclass(frozen=True)
class Bernoulli:
    """y ~ Bernoulli(sigmoid(output)): `output` is a logit for each entry of y, which is 0 or 1.

    `output` has the shape (rows,) or (rows, 1) and `y` (rows,). Or both have one shape (rows, ...),
    such as many labels a row (multi-label) or a mask of pixels; the entries of a row are
    independent given the weights.

    Args:
        size: N, for a hand-written loop over batches.
        missing: "ignore" leaves targets that are NaN out of the likelihood. By default they are an
            error.

    Raises:
        DataError: the output has another shape.
    """

    size: int | None = None
    _: KW_ONLY
    missing: Missing = "refuse"

    def __post_init__(self) -> None:
        check_missing("Bernoulli", self.missing)

    def observe(self, output: Tensor, y: Tensor | None) -> Tensor:
        fn, y = self._rows(output, y), _floating(output, y)
        return observed_rows(fn, y, self.size, output.device)

    def log_prob(self, output: Tensor, y: Tensor) -> Tensor:
        """Σ log p(y | output) over the rows of a batch, nats."""
        return self._rows(output, y).log_prob(_floating(output, y)).sum()  # type: ignore[no-any-return]

    def _rows(self, output: Tensor, y: Tensor | None) -> Any:
        """The distribution of the rows."""
        output = entries("Bernoulli", output, y)
        fn = dist.Bernoulli(logits=output, validate_args=False)
        return with_missing(fn, self.missing).to_event(output.ndim - 1)


def _floating(output: Tensor, y: Tensor | None) -> Any:
    """y in the dtype of the output, which the density needs."""
    return None if y is None else y.to(output.dtype)
