"""The likelihood of counts whose variance is above their mean.

Owns `NegativeBinomial`. Next: `categorical.py`.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import pyro.distributions as dist
from torch import Tensor

from pyro_bmr.errors import ModelError
from pyro_bmr.likelihoods.counts import Counts, log_rate
from pyro_bmr.likelihoods.ignored import with_missing
from pyro_bmr.likelihoods.likelihood import Missing, check_missing, check_positive
from pyro_bmr.likelihoods.noise import positive_site


@dataclass(frozen=True)
class NegativeBinomial(Counts):
    r"""y has a negative binomial distribution with mean m = exposure · exp(output) and variance
    m + m²/c, where c is the concentration; for large c it is `Poisson(m)`. Shapes are those of
    `Poisson`.

    .. math:: p(y) = \frac{\Gamma(y + c)}{\Gamma(c)\, y!} \left(\frac{m}{m + c}\right)^y
        \left(\frac{c}{m + c}\right)^c

    Args:
        concentration: a number, or "learned": the site `concentration`, one number for all
            entries, with log c ~ N(0, 2²).
        size, exposure, missing: as for `Poisson`.

    Raises:
        ModelError: an argument is out of range.
    """

    concentration: float | Literal["learned"] = "learned"
    size: int | None = None
    _: KW_ONLY
    exposure: int | str | None = None
    missing: Missing = "refuse"

    def __post_init__(self) -> None:
        check_positive("NegativeBinomial", "learned", concentration=self.concentration)
        check_missing("NegativeBinomial", self.missing)

    @property
    def inferred(self) -> tuple[str, ...]:
        """The latent sites of the likelihood."""
        return ("concentration",) if self.concentration == "learned" else ()

    def log_prob(self, output: Tensor, y: Tensor, *, exposure: Tensor | None = None) -> Tensor:
        """Σ log p(y | output) over the rows of a batch, nats, if the concentration is a number."""
        if self.inferred:
            raise ModelError("NegativeBinomial.log_prob: expected a number as concentration")
        return self._rows(output, y, exposure).log_prob(y).sum()  # type: ignore[no-any-return]

    def _rows(self, output: Tensor, y: Tensor | None, exposure: Tensor | None) -> Any:
        """The distribution of the rows."""
        log_mean = log_rate("NegativeBinomial", output, y, exposure)
        c = (
            positive_site("concentration", log_mean, (), 0.0, 2.0)
            if self.concentration == "learned"
            else log_mean.new_tensor(self.concentration)
        )
        # in torch the mean is total_count · exp(logits)
        fn = dist.NegativeBinomial(c, logits=log_mean - c.log(), validate_args=False)
        return with_missing(fn, self.missing).to_event(log_mean.ndim - 1)
