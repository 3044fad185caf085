"""What a prediction is: averaged class probabilities, or a mixture over draws, with its epistemic
and aleatoric parts apart.

Owns `ClassPrediction`, `RealPrediction` and `MixturePrediction`, and `prediction_of`, which
averages over draws or over the members of an ensemble. In all of them the rows come first. Next:
`observed_site.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.checks import check_labels, check_shape
from pyro_bmr.errors import DataError, ModelError, warn


@dataclass(frozen=True)
class ClassPrediction:
    """Class probabilities `probs` (n, ..., classes), the average over draws.

    In nats, (n, ...): `aleatoric` is the mean entropy of the draws, and `epistemic` the mutual
    information of label and draw. Their sum is the entropy of `probs`.
    """

    probs: Tensor
    aleatoric: Tensor
    epistemic: Tensor

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y | x, data), (n, ...), nats, for each label of a row by itself.

        A probability below the smallest normal number of its dtype counts as that number, and a
        `PyroBMRWarning` says how many do.
        """
        if self.probs.ndim > 2:
            _check_targets(y, self.probs.shape[:-1])
        flat, labels = self.probs.flatten(0, -2), y.flatten() if self.probs.ndim > 2 else y
        check_labels(flat, labels)
        picked = flat.gather(1, labels.to(flat.device).long()[:, None])[:, 0]
        least = torch.finfo(flat.dtype).tiny
        if below := int((picked < least).sum()):
            warn(
                f"log_prob: {below} of {len(picked)} labels have a probability of 0 in"
                f" {flat.dtype}; each counts as {least:.3g}, {math.log(least):.1f} nats, which is"
                " too good: average over more draws, or widen the posterior"
            )
        return picked.clamp_min(least).log().view(self.probs.shape[:-1])


@dataclass(frozen=True)
class RealPrediction:
    """A mixture of Normals over draws: `locs` and `scales` (draws, n, ...), in the units of y; the
    entries of a row are independent in each draw.
    """

    locs: Tensor
    scales: Tensor

    @property
    def mean(self) -> Tensor:
        return self.locs.mean(0)

    @property
    def aleatoric(self) -> Tensor:
        """The mean noise variance, (n, ...), squared units of y."""
        return self.scales.square().mean(0)

    @property
    def epistemic(self) -> Tensor:
        """The variance of the draws' means, (n, ...), squared units of y."""
        return self.locs.var(0, correction=0)

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y | x, data) of each row, (n,), nats."""
        _check_targets(y, self.locs.shape[1:])
        log_p = torch.distributions.Normal(self.locs, self.scales).log_prob(y.to(self.locs.device))
        return _mixed(log_p.flatten(2).sum(2) if log_p.ndim > 2 else log_p)


@dataclass(frozen=True)
class MixturePrediction:
    """A mixture over draws of any distribution. `parts` has for each draw the distribution of each
    batch of rows; the rows are in the (negative) dimension `dim` of a draw from it.
    """

    parts: Sequence[Sequence[Any]]
    dim: int

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
        shape, rows = first[0].shape(), sum(fn.shape()[self.dim] for fn in first)
        _check_targets(
            y, (rows, *(size for k, size in enumerate(shape) if k != len(shape) + self.dim))
        )
        batches = (
            y.to(self.device)
            .movedim(0, self.dim)
            .split([fn.shape()[self.dim] for fn in first], self.dim)
        )
        return _mixed(
            torch.stack(
                [
                    torch.cat(
                        [self._of_rows(fn, batch) for fn, batch in zip(part, batches, strict=True)]
                    )
                    for part in self.parts
                ]
            )
        )

    @property
    def device(self) -> torch.device:
        """The device of the distributions."""
        return next(
            t.device for t in vars(_innermost(self.parts[0][0])).values() if isinstance(t, Tensor)
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


Prediction = ClassPrediction | RealPrediction | MixturePrediction
# (probs,) of a Categorical, (loc, scale) of a Normal; draws are stacked in front
Parameters = tuple[Tensor, ...]


def prediction_of(parts: Iterable[Parameters], draws: int) -> ClassPrediction | RealPrediction:
    """The prediction of `draws` whose parameters come in `parts`, one or several draws at a time.
    The class probabilities of all draws are never in memory at once.
    """
    kept: list[Parameters] = []
    probs: Tensor | None = None
    aleatoric: Tensor | None = None
    for part in parts:
        if len(part) > 1:
            kept.append(part)
            continue
        total, entropy = part[0].sum(0), _entropy(part[0]).sum(0)
        probs, aleatoric = (
            (total, entropy)
            if probs is None or aleatoric is None
            else (probs.add_(total), aleatoric.add_(entropy))
        )
    if probs is None or aleatoric is None:
        locs, scales = (torch.cat(tensors) for tensors in zip(*kept, strict=True))
        return RealPrediction(locs, scales)
    mean, aleatoric = probs / draws, aleatoric / draws
    return ClassPrediction(mean, aleatoric, (_entropy(mean) - aleatoric).clamp_min(0))


def rows_joined(parts: Sequence[Prediction]) -> Prediction:
    """The prediction of the rows of all `parts`, one after the other; all have the same draws.

    Raises:
        ModelError: they are of several kinds.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(type(part) is not type(first) for part in parts):
        raise ModelError(
            "predict: expected one kind of distribution for all rows, got"
            f" {', '.join(sorted({type(part).__name__ for part in parts}))}"
        )
    if isinstance(first, MixturePrediction):
        mixtures = [part for part in parts if isinstance(part, MixturePrediction)]
        draws = zip(*(part.parts for part in mixtures), strict=True)
        return MixturePrediction([[fn for fns in draw for fn in fns] for draw in draws], first.dim)
    axis = 0 if isinstance(first, ClassPrediction) else 1
    names = [field.name for field in fields(first)]
    return type(first)(*(torch.cat([getattr(p, name) for p in parts], axis) for name in names))


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(-1)


def _mixed(log_p: Tensor) -> Tensor:
    """The log of the mean over draws, (draws, n) → (n,)."""
    return log_p.logsumexp(0) - math.log(len(log_p))


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _check_targets(y: Tensor, shape: Sequence[int]) -> None:
    """Raises DataError unless y has the shape of the prediction, and no NaN."""
    check_shape(y, "y", shape, "one value for each entry of the prediction")
    if bad := int(y.isnan().sum()):
        raise DataError(f"y is NaN in {bad} of {y.numel()} entries; leave these rows out")
