"""The likelihood of class labels, one a row or one at each position.

Owns `Categorical`. Next: `ordinal.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyro_bmr.checks import check_arguments, is_whole
from pyro_bmr.errors import DataError, holds
from pyro_bmr.likelihoods.ignored import Ignoring
from pyro_bmr.likelihoods.likelihood import check_output, check_target, observed_rows


@dataclass(frozen=True)
class Categorical:
    """y ~ Categorical(softmax(output)): `output` is (rows, classes), `y` integers in 0 … classes −
    1.

    With a class at each position, such as the tokens of a text or the pixels of an image, `output`
    is (rows, ..., classes) and `y` (rows, ...). The positions of a row are independent given the
    weights.

    Args:
        size: N, for a hand-written loop over batches.
        class_axis: the axis of `output` with the classes: −1, the last, or 1, as torch's
            `cross_entropy` has it: (rows, classes, ...). By default it is the last, and an output
            whose shape allows both is refused.
        ignore_index: a label that is not observed, such as −100 of padding. By default there is
            none.
        weight: a number > 0 for each class, by which the log densities of its labels are
            multiplied.
        label_smoothing: the part of a label that is shared out over all classes, from 0 up to 1.

    The last three are those of `torch.nn.CrossEntropyLoss`; the loss is the sum over labels, not
    their mean. With the last two the fit has a weighted log likelihood, and ΔF is of that. A
    prediction scores labels by their plain probabilities.

    Raises:
        ModelError: an argument is out of range.
        DataError: the output has another shape.
    """

    size: int | None = None
    _: KW_ONLY
    class_axis: int | None = None
    ignore_index: int | None = None
    weight: Sequence[float] | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check = check_arguments
        axis, index, smoothing = self.class_axis, self.ignore_index, self.label_smoothing
        check("Categorical", axis in (None, -1, 1), "-1, 1 or None", class_axis=axis)
        ok = index is None or is_whole(index)
        check("Categorical", ok, "a whole number or None", ignore_index=index)
        ok = holds(lambda s: 0 <= s < 1, smoothing)
        check("Categorical", ok, "a number >= 0 and below 1", label_smoothing=smoothing)
        if self.weight is not None:
            weight = tuple(float(w) for w in self.weight)
            ok = all(0 < w < float("inf") for w in weight)
            check("Categorical", ok, "a finite number > 0 for each class", weight=weight)
            object.__setattr__(self, "weight", weight)

    def observe(self, output: Tensor, y: Tensor | None) -> Tensor:
        logits = self._logits(output, y)
        fn: Any = dist.Categorical(logits=logits, validate_args=False)
        if y is not None and (self.weight is not None or self.label_smoothing):
            fn = _Weighed(fn, self._class_weights(logits), self.label_smoothing)
        if self.ignore_index is not None:
            fn = Ignoring(fn, self.ignore_index)
        return observed_rows(fn.to_event(logits.ndim - 2), y, self.size, output.device)

    def log_prob(self, output: Tensor, y: Tensor) -> Tensor:
        """The log density of the observed site, summed over the rows of the batch, nats."""
        if output.ndim == 2 and self.ignore_index is None and self.weight is None:
            smoothing = self.label_smoothing  # the usual case, without the checks of `observe`
            return -cross_entropy(output, y.long(), reduction="sum", label_smoothing=smoothing)
        logits = self._logits(output, y)
        return -cross_entropy(
            logits.movedim(-1, 1),
            y.long(),
            self._class_weights(logits),
            ignore_index=-100 if self.ignore_index is None else self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def _class_weights(self, logits: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        if len(self.weight) != logits.shape[-1]:
            raise DataError(
                f"Categorical: expected a weight for each of the {logits.shape[-1]} classes of the"
                f" output, got {len(self.weight)}"
            )
        return logits.new_tensor(self.weight)

    def _logits(self, output: Any, y: Tensor | None) -> Tensor:
        """The output with the classes in the last axis.

        Raises:
            DataError: its shape does not go with that of y, or allows both axes.
        """
        check_output("Categorical", output, "(rows, classes)")
        if output.ndim < 2:
            raise DataError(
                "Categorical: expected an output of shape (rows, classes) from the network, got"
                f" shape {tuple(output.shape)}"
            )
        if output.ndim == 2:
            check_target(output, y)
            return output  # type: ignore[no-any-return]
        axis = -1 if self.class_axis is None else self.class_axis
        if y is None:
            return output.movedim(axis, -1)  # type: ignore[no-any-return]
        fits = {each: _labels(output, each) == y.shape for each in (-1, 1)}
        if self.class_axis is None and all(fits.values()):
            raise DataError(
                f"Categorical: in an output of shape {tuple(output.shape)} the classes may be axis"
                " 1 or the last; say which, class_axis=1 or class_axis=-1"
            )
        if not fits[axis]:
            other = f"; the shapes fit class_axis={-axis}" if fits[-axis] else ""
            raise DataError(
                "Categorical: expected an output of shape (rows, classes) from the network, or y of"
                f" shape {tuple(_labels(output, axis))}, a label at each position, got an output of"
                f" shape {tuple(output.shape)} and y of shape {tuple(y.shape)}{other}"
            )
        return output.movedim(axis, -1)  # type: ignore[no-any-return]


def _labels(output: Tensor, axis: int) -> torch.Size:
    """The shape of y for an output with the classes in `axis`."""
    return output.movedim(axis, -1).shape[:-1]


class _Weighed(dist.TorchDistribution):
    """Labels whose log density is that of torch's loss, with weights of classes and smoothing."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base_dist: Any, weight: Tensor | None, smoothing: float) -> None:
        self.base_dist, self.weight, self.smoothing = base_dist, weight, smoothing
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base_dist.support

    def log_prob(self, value: Tensor) -> Tensor:
        logits = self.base_dist.logits
        flat = logits.reshape(-1, logits.shape[-1])
        labels = value.long().reshape(-1)
        loss = cross_entropy(
            flat, labels, self.weight, reduction="none", label_smoothing=self.smoothing
        )
        return -loss.view(value.shape)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.base_dist.sample(sample_shape)  # type: ignore[no-any-return]

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Weighed:
        return _Weighed(self.base_dist.expand(batch_shape), self.weight, self.smoothing)
