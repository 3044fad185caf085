"""The prediction of any other distribution: its mixture over draws.

Owns `MixturePrediction`. Next: `chunked.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmr.errors import ModelError, described
from pyro_bmr.isolation import seed_generators
from pyro_bmr.prediction.crps import crps_of_draws
from pyro_bmr.prediction.distribution_functions import cdf, is_discrete
from pyro_bmr.prediction.moments import Moments, check_targets, components, mixed, noise_seed
from pyro_bmr.prediction.quantiles import Probabilities, probabilities, quantiles

_SAMPLES = 2_000  # draws of y where there is no closed form


@dataclass(frozen=True)
class MixturePrediction(Moments):
    """A mixture over draws of any distribution. `parts` has for each draw the distribution of each
    batch of rows; the rows are in the (negative) dimension `dim` of a draw from it.
    """

    parts: Sequence[Sequence[Any]]
    dim: int

    __repr__ = described

    @property
    def mean(self) -> Tensor:
        """(n, ...), in the units of y."""
        return self._each("mean").mean(0)

    @property
    def aleatoric(self) -> Tensor:
        """The mean variance of the draws, (n, ...), squared units of y."""
        return self._each("variance").mean(0)

    @property
    def epistemic(self) -> Tensor:
        """The variance of the draws' means, (n, ...), squared units of y."""
        return self._each("mean").var(0, correction=0)

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y | x, data) of each row, (n,), nats."""
        first = self.parts[0]
        check_targets(y, self._shape, _ignores_nan(first[0]))
        batches = (
            self._targets(y)
            .movedim(0, self.dim)
            .split([fn.shape()[self.dim] for fn in first], self.dim)
        )
        return mixed(
            torch.stack(
                [
                    torch.cat(
                        [self._of_rows(fn, batch) for fn, batch in zip(part, batches, strict=True)]
                    )
                    for part in self.parts
                ]
            )
        )

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y ≤ y) of each entry, (n, ...).

        Raises:
            ModelError: torch and SciPy know no distribution function of the distribution.
        """
        try:
            return self._cdf(self._targets(torch.as_tensor(y)).expand(self._shape))
        except NotImplementedError as error:
            name = type(_innermost(self.parts[0][0])).__name__
            raise ModelError(
                f"no distribution function of a {name} is known; compare samples(...) with y"
            ) from error

    def _cdf(self, y: Tensor) -> Tensor:
        sizes = [fn.shape()[self.dim] for fn in self.parts[0]]
        total: Any = 0.0
        for part in self.parts:
            batches = y.movedim(0, self.dim).split(sizes, self.dim)
            pairs = zip(part, batches, strict=True)
            total = total + torch.cat([cdf(fn, b).movedim(self.dim, 0) for fn, b in pairs])
        return total / len(self.parts)  # type: ignore[no-any-return]

    def quantile(self, q: Probabilities) -> Tensor:
        """The quantiles of each entry, (n, ...) for a number, (len(q), n, ...) for several. Where
        the distribution has no distribution function, those of 2,000 draws.
        """
        at, discrete = probabilities(q), is_discrete(self.parts[0][0])
        try:
            try:
                mean, variance = self.mean, self.variance
            except ModelError:  # they are not needed, but shorten the search
                mean = torch.zeros(self._shape, device=self.device)
                variance = torch.full_like(mean, torch.inf)
            found = quantiles(at, self._cdf, mean, variance, discrete)
        except NotImplementedError:
            each = (drawn.sort(0).values for drawn in self._drawn())
            places = [math.ceil(p * _SAMPLES) - 1 for p in at]
            found = torch.cat([ordered[places] for ordered in each], 1)
        return found if isinstance(q, Sequence) else found[0]

    def crps(self, y: Tensor) -> Tensor:
        """The continuous ranked probability score of each entry, (n, ...), units of y, from 2,000
        draws.
        """
        check_targets(y, self._shape, _ignores_nan(self.parts[0][0]))
        sizes = [fn.shape()[self.dim] for fn in self.parts[0]]
        pairs = zip(self._drawn(), self._targets(y).split(sizes), strict=True)
        return torch.cat([crps_of_draws(drawn, own) for drawn, own in pairs])

    def _drawn(self) -> Iterator[Tensor]:
        """Draws of y of one batch of rows after the other, which bounds their memory."""
        for k in range(len(self.parts[0])):
            batch = MixturePrediction([[part[k]] for part in self.parts], self.dim)
            yield batch.samples(_SAMPLES, stretch=k)

    def samples(self, count: int, seed: int = 0, *, stretch: int = 0) -> Tensor:
        """Draws of y, (count, n, ...); all rows of one draw have the same draw of the weights.
        Each `stretch` of rows has noise of its own.
        """
        which = components(len(self.parts), count, seed)
        drawn = {}
        with torch.random.fork_rng():
            seed_generators(noise_seed(seed, stretch))
            for k, n in enumerate(which.bincount(minlength=len(self.parts)).tolist()):
                batches = [fn.sample((n,)).movedim(self.dim, 1) for fn in self.parts[k]]
                drawn[k] = iter(torch.cat(batches, 1))
        return torch.stack([next(drawn[k]) for k in which.tolist()])

    @property
    def _shape(self) -> tuple[int, ...]:
        """(n, ...), the shape of y."""
        first = self.parts[0]
        shape, rows = first[0].shape(), sum(fn.shape()[self.dim] for fn in first)
        return rows, *(size for k, size in enumerate(shape) if k != len(shape) + self.dim)

    @property
    def device(self) -> torch.device:
        """The device of the distributions."""
        return self._like.device

    @property
    def _like(self) -> Tensor:
        """A tensor on the device and in the dtype of the distributions."""
        found = _parameter(self.parts[0][0])
        return torch.empty(0) if found is None else found

    def _targets(self, y: Tensor) -> Tensor:
        """y on the device; bits and counts of a whole-number type in the dtype of the parameters,
        which densities need.
        """
        like = self._like
        return (
            y.to(like)
            if like.is_floating_point() and not y.is_floating_point()
            else y.to(like.device)
        )

    def _of_rows(self, fn: Any, y: Tensor) -> Tensor:
        log_p = fn.log_prob(y).movedim(self.dim + len(fn.event_shape), 0)
        return log_p.flatten(1).sum(1) if log_p.ndim > 1 else log_p

    def _each(self, moment: str) -> Tensor:
        try:
            return torch.stack(
                [
                    torch.cat([getattr(fn, moment).movedim(self.dim, 0) for fn in part])
                    for part in self.parts
                ]
            )
        except (NotImplementedError, AttributeError) as error:
            raise ModelError(
                f"the {moment} of a {type(_innermost(self.parts[0][0])).__name__} has no closed"
                " form; log_prob(y) scores it"
            ) from error


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _ignores_nan(fn: Any) -> bool:
    """Whether a target that is NaN has the log density 0."""
    while not hasattr(fn, "marker"):
        if not hasattr(fn, "base_dist"):
            return False
        fn = fn.base_dist
    return bool(fn.marker != fn.marker)


def _parameter(fn: Any) -> Tensor | None:
    """The first tensor in a distribution, or in those that it is made of."""
    for value in vars(fn).values():
        if isinstance(value, Tensor):
            return value
        if isinstance(value, Distribution) and (found := _parameter(value)) is not None:
            return found
    return None
