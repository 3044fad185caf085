"""The likelihood of real targets, with a noise that is inferred, fixed, or given by the network.

Owns `Normal`. Next: `student_t.py`.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import pyro.distributions as dist
from torch import Tensor

from pyro_bmr.errors import DataError, ModelError
from pyro_bmr.likelihoods.ignored import with_missing
from pyro_bmr.likelihoods.likelihood import (
    Missing,
    check_missing,
    check_output,
    check_positive,
    entries,
    observed_rows,
)
from pyro_bmr.likelihoods.noise import noise_site

Noise = float | Literal["learned", "per output", "network"]
LEARNED = ("learned", "per output")


@dataclass(frozen=True)
class Normal:
    """y ~ N(output, noise²), the entries of a row independent given the weights.

    `output` has the shape (rows,) or (rows, 1) and `y` (rows,). Or both have one shape (rows, ...),
    such as several targets, a forecast or an image.

    Args:
        noise_scale: the prior of a learned noise is HalfNormal(`noise_scale`), in the units of y.
            By default it is log noise ~ N(0, 10²), which suits targets in any units.
        size: N, for a hand-written loop over batches.
        noise: "learned", one noise scale for all entries, the site `noise`; "per output", one for
            each entry of a row; a number, the noise scale in the units of y; or "network", the
            second half of the network's last axis, as log noise (Nix & Weigend 1994). A fit at a
            temperature other than 1 needs a number, since the noise of a network that interpolates
            goes to 0.
        missing: "ignore" leaves targets that are NaN out of the likelihood. By default they are an
            error.

    Raises:
        ModelError: an argument is out of range.
        DataError: the output has another shape.
    """

    noise_scale: float | None = None
    size: int | None = None
    _: KW_ONLY
    noise: Noise = "learned"
    missing: Missing = "refuse"

    def __post_init__(self) -> None:
        check_positive("Normal", *LEARNED, "network", noise=self.noise)
        if self.noise_scale is not None:
            check_positive("Normal", noise_scale=self.noise_scale)
            if self.noise not in LEARNED:
                raise ModelError(
                    f"Normal(noise_scale={self.noise_scale!r}, noise={self.noise!r}): the scale of"
                    " a prior goes with a learned noise alone; leave one of them out"
                )
        check_missing("Normal", self.missing)

    @property
    def inferred(self) -> tuple[str, ...]:
        """The latent sites of the likelihood."""
        return ("noise",) if self.noise in LEARNED else ()

    def observe(self, output: Tensor, y: Tensor | None) -> Tensor:
        return observed_rows(self._rows(output, y), y, self.size, output.device)

    def log_prob(self, output: Tensor, y: Tensor) -> Tensor:
        """Σ log p(y | output) over the rows of a batch, nats, if the noise is no latent site."""
        if self.inferred:
            raise ModelError("Normal.log_prob: the noise is a latent site; trace observe instead")
        return self._rows(output, y).log_prob(y).sum()  # type: ignore[no-any-return]

    def _rows(self, output: Tensor, y: Tensor | None) -> Any:
        """The distribution of the rows."""
        if self.noise == "network":
            output, noise = _halves(output, y)
        else:
            output = entries("Normal", output, y)
            noise = noise_of(self.noise, output, self.noise_scale, y)
        fn = dist.Normal(output, noise, validate_args=False)
        return with_missing(fn, self.missing).to_event(output.ndim - 1)


def noise_of(noise: Any, output: Tensor, scale: float | None, y: Tensor | None) -> Tensor:
    """The noise scale, a number or of the shape of a row: fixed, or the site `noise`."""
    if noise not in LEARNED:
        return output.new_tensor(noise)
    shape = output.shape[1:] if noise == "per output" else ()
    return noise_site(output, shape, scale, y)


def _halves(output: Any, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and noise scale of each entry of y, from the halves of the network's last axis."""
    check_output("Normal", output, "with means and log noise scales in its last axis")
    if output.ndim < 2 or output.shape[-1] % 2:
        raise DataError(
            "Normal: expected an output of shape (rows, ..., 2 times the outputs) from the network,"
            " with the means first and then the logarithms of the noise scales, got shape"
            f" {tuple(output.shape)}"
        )
    loc, log_noise = output.chunk(2, -1)
    loc, log_noise = (entries("Normal", half, y) for half in (loc, log_noise))
    return loc, log_noise.exp()
