"""What the likelihoods of counts share: a log rate for each entry of y, and the exposure of a row.

Owns `Counts` and `log_rate`. Next: `poisson.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_bmr.checks import check_shape
from pyro_bmr.likelihoods.likelihood import entries, observed_rows


class Counts:
    """A likelihood of counts with an exposure. A subclass has `_rows`, the distribution of the
    rows.
    """

    size: int | None
    exposure: int | str | None

    @property
    def reads(self) -> Mapping[str, int | str]:
        """What the likelihood takes out of x."""
        return {} if self.exposure is None else {"exposure": self.exposure}

    def observe(
        self, output: Tensor, y: Tensor | None, *, exposure: Tensor | None = None
    ) -> Tensor:
        return observed_rows(self._rows(output, y, exposure), y, self.size, output.device)

    def _rows(self, output: Tensor, y: Tensor | None, exposure: Tensor | None) -> Any:
        raise NotImplementedError


def log_rate(name: str, output: Tensor, y: Tensor | None, exposure: Tensor | None) -> Tensor:
    """The logarithm of the mean of each entry of y: the output, and the logarithm of the exposure
    of its row.
    """
    output = entries(name, output, y)
    if exposure is None:
        return output
    check_shape(exposure, "exposure", output.shape[:1], "one number > 0 for each row")
    log_exposure = exposure.to(output.dtype).log()
    return output + log_exposure.view(-1, *[1] * (output.ndim - 1))
