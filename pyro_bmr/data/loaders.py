"""The rows of a `DataLoader`: how many there are, and in what order they come.

Owns `of_loader` and `in_order`. Next: `mapped_rows.py`.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from pyro_bmr.data.row_sources import Held, Order, Source, Stream
from pyro_bmr.errors import DataError


def of_loader(loader: DataLoader[Any], size: int | None) -> Source:
    """The rows of a loader: read from its tensors if that comes to the same, else its batches."""
    order = _plain_order(loader)
    data = loader.dataset
    if order is not None and type(data) is TensorDataset and size is None:
        if len(data) == 0:
            raise DataError("the loader: expected at least one batch, got none")
        *inputs, y = data.tensors if len(data.tensors) > 1 else (*data.tensors, None)
        return Held(inputs[0] if len(inputs) == 1 else tuple(inputs), y, order)
    steps = len(loader) if _has_length(loader) else None
    shuffled = not isinstance(loader.sampler, SequentialSampler)
    own = isinstance(data, IterableDataset)
    return Stream(
        loader,
        _rows_of_loader(loader) if size is None else size,
        steps,
        f"a DataLoader over {type(data).__name__}",
        shuffled=shuffled and not own,
        copies=True,
    )


def in_order(source: Source) -> Source:
    """The source, if its rows come in an order that the caller knows.

    Raises:
        DataError: its loader mixes the rows.
    """
    mixed = (isinstance(source, Stream) and source.shuffled) or (
        isinstance(source, Held) and source.order is not None and source.order.shuffle
    )
    if mixed:
        raise DataError(
            "x: the loader mixes its rows, so that nobody knows which prediction is of which row;"
            " make it with shuffle=False"
        )
    return source


def _plain_order(loader: DataLoader[Any]) -> Order | None:
    """How the loader makes batches, if it does so with torch's own parts and without a generator of
    its own.
    """
    sampler, batches = loader.sampler, loader.batch_sampler
    random = (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler._num_samples is None
        and sampler.generator is None
    )
    if type(batches) is not BatchSampler or not (random or type(sampler) is SequentialSampler):
        return None
    if loader.collate_fn is not default_collate or loader.generator is not None:
        return None
    return Order(batches.batch_size, random, batches.drop_last)


def _has_length(data: Any) -> bool:
    try:
        len(data)
    except (TypeError, NotImplementedError):
        return False
    return True


def _rows_of_loader(loader: DataLoader[Any]) -> int | None:
    """N of a loader, if there is no doubt: the rows of its data set, or of the subset that its
    sampler draws from.
    """
    batched = loader.batch_sampler is not None
    if not _has_length(loader.dataset) or not batched:
        return None
    rows = len(loader.dataset)  # type: ignore[arg-type]
    if isinstance(loader.sampler, SubsetRandomSampler):
        return len(loader.sampler)
    if isinstance(loader.dataset, IterableDataset) or not _has_length(loader.sampler):
        return rows
    return rows if len(loader.sampler) == rows else None  # type: ignore[arg-type]
