"""x and y in a batch as users have it: a pair, a longer tuple, or a dict with its targets.

Owns `pair_in`, `first_rows`, `rows_at`, and `BatchChecks`, which holds each batch against the
first. Next: `row_sources.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pyro_bmr.checks import check_tensor
from pyro_bmr.data.inputs import Inputs, of_each, parts_of, rows_in
from pyro_bmr.data.tables import tensors_of
from pyro_bmr.errors import DataError, PyroBMRError
from pyro_bmr.likelihoods.likelihood import check_read

LABELS = ("labels", "label")  # the keys of the targets in a dict, as Hugging Face has them
Batch = tuple[Inputs, Tensor]


def pair_in(batch: Any, where: str, targets: bool = True) -> tuple[Any, Any]:
    """x and y of a batch. y is the last of a tuple, or the value of ``labels`` (or ``label``) in a
    dict; without `targets` a batch may have none, and y is then None.

    Raises:
        DataError: there are no targets, or it is no batch.
    """
    x: Any
    if isinstance(batch, Mapping):
        x = {key: value for key, value in batch.items() if key not in LABELS}
        y = next((batch[key] for key in LABELS if key in batch), None)
        found = f"a dict with the keys {', '.join(map(repr, batch))}"
    elif isinstance(batch, (tuple, list)) and batch:
        *inputs, y = batch if len(batch) > 1 else (*batch, None)
        x = inputs[0] if len(inputs) == 1 else tuple(inputs)
        found = f"a {type(batch).__name__} of {len(batch)}"
    elif isinstance(batch, (tuple, list, str)) or not hasattr(batch, "shape"):
        raise DataError(
            f"{where}: expected a pair (x, y), or a dict with its targets under 'labels', got"
            f" {type(batch).__name__}; give such batches, with a collate_fn if need be"
        )
    else:
        x, y, found = batch, None, f"one {type(batch).__name__}"
    if y is None and targets:
        raise DataError(
            f"{where}: expected a pair (x, y), or a dict with its targets under 'labels', got"
            f" {found}; rename the key of the targets, or give pairs"
        )
    return x, y


def first_rows(batch: Batch, count: int) -> Batch:
    """The first `count` rows of a batch; copies, since a program may write into its rows."""
    x, y = batch
    return of_each(lambda part: part[:count].clone(), x), y[:count].clone()


def rows_at(batch: Batch, rows: Tensor | slice) -> Batch:
    """Some rows of a batch."""
    x, y = batch
    return of_each(lambda part: part[_on(rows, part)], x), y[_on(rows, y)]


def _on(rows: Tensor | slice, part: Tensor) -> Tensor | slice:
    return rows if isinstance(rows, slice) else rows.to(part.device)


class BatchChecks:
    """What batches that are read one by one have to be: of one kind, finite, and with targets in
    the support of the observed site.

    `check_target(y)` raises a DataError for a y outside the support, and `try_on(batch)` one for a
    batch on which the program does not run; a fit sets both once its program has run. With
    `missing`, targets may be NaN. `likelihood`: of the program, for what it reads from x.
    """

    def __init__(self, missing: bool = False, likelihood: Any = None) -> None:
        self.likelihood = likelihood
        self.missing, self.kinds = missing, dict[str, tuple[Any, ...]]()
        self.shapes = set[Any]()
        self.check_target: Callable[[Tensor], None] = lambda y: None
        self.try_on: Callable[[Batch], None] = lambda batch: None

    def of_tensors(self, batch: Any, where: str, targets: bool = True) -> tuple[Inputs, Any]:
        """x and y of a batch as tensors, held against the batches before.

        Raises:
            DataError: it has no rows, or is not like the first.
        """
        x, y = pair_in(batch, where, targets)
        x, y = tensors_of(x, "x"), None if y is None else tensors_of(y, "y")
        parts = {**parts_of(x), **({} if y is None else {"y": y})}
        if not parts_of(x):
            raise DataError(f"{where}: expected inputs beside the targets, got none")
        kinds = {}
        for name, part in parts.items():
            check_tensor(part, f"{where}: {name}")
            if part.ndim < 1 or len(part) != rows_in(x) or len(part) == 0:
                shapes = ", ".join(
                    f"{other} {tuple(getattr(t, 'shape', ()))}" for other, t in parts.items()
                )
                raise DataError(
                    f"{where}: expected the same number of rows everywhere, at least one, got"
                    f" {shapes}"
                )
            kinds[name] = (tuple(part.shape[1:]), part.dtype)
        self._hold_against_first(kinds, where)
        return x, y

    def _hold_against_first(self, kinds: dict[str, tuple[Any, ...]], where: str) -> None:
        """Raises DataError unless a batch has the tensors of the first, of the same number of axes
        and dtype. The length of an axis may differ, as where texts are padded batch by batch.
        """
        first = self.kinds = self.kinds or kinds
        if set(kinds) != set(first):
            raise DataError(
                f"{where}: expected {', '.join(first)} as in the first batch, got"
                f" {', '.join(kinds)}"
            )
        for name, (shape, dtype) in kinds.items():
            if len(shape) != len(first[name][0]) or dtype != first[name][1]:
                raise DataError(
                    f"{where}: {name}: expected rows of shape {first[name][0]} and"
                    f" {first[name][1]} as in the first batch, got shape {shape} and {dtype}"
                )

    def check_values(
        self, batch: Batch, where: str, row_of: Callable[[int], str], first_epoch: bool
    ) -> None:
        """Raises DataError unless all values are finite, which is looked at in the first epoch, and
        the targets in the support of the observed site; and the program runs on rows of a shape
        that is new. `row_of` names a row in the message.
        """
        x, y = batch
        shapes = tuple(tuple(part.shape[1:]) for part in (*parts_of(x).values(), y))
        if shapes not in self.shapes:
            try:
                self.try_on(batch)
            except PyroBMRError as error:
                raise DataError(f"{where}: {error}") from None
            self.shapes.add(shapes)
        for name, part in {**parts_of(x), "y": y}.items() if first_epoch else ():
            # a sum is finite only if all numbers are, and costs a twentieth of their check
            if part.is_floating_point() and not bool(part.sum().isfinite()):
                also_nan = self.missing and name == "y"
                good = part.isinf().logical_not() if also_nan else part.isfinite()
                if not bool(good.all()):
                    row = int((~good.reshape(len(part), -1).all(1)).nonzero()[0])
                    raise DataError(
                        f"{where}, {row_of(row)}: {name} is NaN or infinite; drop or impute such"
                        " rows"
                    )
        check_read(self.likelihood, x, where)
        try:
            self.check_target(y)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
