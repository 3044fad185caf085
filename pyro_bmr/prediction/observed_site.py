"""The observed site of a program at given rows: its name, its distribution, and the dimension of a
draw that has the rows.

Owns `ObservedSite` and `observed_site`. Next: `predict.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_bmr.data.inputs import Inputs, described, of_each, parts_of, pieces, rows_in
from pyro_bmr.errors import ModelError
from pyro_bmr.guides.latent_sites import base_distribution
from pyro_bmr.likelihoods.ignored import Ignoring
from pyro_bmr.prediction.predictive import Parameters
from pyro_bmr.tracing import Values


@dataclass(frozen=True)
class ObservedSite:
    """The observed site of `program` at the rows `x`: its `name`, the (negative) dimension `dim` of
    a draw that has the rows, and whether the program `writes` into its rows.
    """

    program: Callable[..., Any]
    x: Inputs
    batch_size: int
    name: str
    dim: int
    writes: bool

    def batches(self) -> Iterator[Inputs]:
        """The batches of rows; copies if the program writes into them."""
        for batch in pieces(self.x, self.batch_size):
            yield of_each(Tensor.clone, batch) if self.writes else batch

    def reached(
        self,
        values: Mapping[str, Tensor],
        batch: Inputs,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The distribution of the observed site for a batch of rows, given the latent values; of a
        `BayesianNetwork`, also with `weights` that are known.
        """
        try:
            with _Until(self.name), Values(values):
                self.program(batch, **({"weights": weights} if weights else {}))
        except _Until.Reached as reached:
            return reached.args[0]
        raise ModelError(
            f"site '{self.name}' of the program is reached for some draws only; prediction needs it"
            " in every run"
        )

    def parameters(self, fns: list[Any]) -> Parameters | None:
        """The parameters of a Categorical or a Normal, with the rows of all batches first; None for
        other distributions.
        """
        bases = [unmarked(base_distribution(fn)) for fn in fns]
        if all(isinstance(base, torch.distributions.Categorical) for base in bases):
            return (torch.cat([base.probs.movedim(self.dim - 1, 0) for base in bases]),)
        if all(isinstance(base, torch.distributions.Normal) for base in bases):
            return tuple(
                torch.cat([t.movedim(self.dim, 0) for t in tensors])
                for tensors in zip(*((base.loc, base.scale) for base in bases), strict=True)
            )
        return None

    def together(self, group: list[dict[str, Tensor]], alone: Parameters) -> Parameters | None:
        """The parameters for several draws at once; None if the program cannot be vectorised, as
        with branches that depend on a value.
        """

        def one(values: dict[str, Tensor]) -> Parameters:
            found = self.parameters([self.reached(values, next(self.batches()))])
            if found is None:
                raise another_distribution(self.name)
            return found

        try:
            values = {site: torch.stack([draw[site] for draw in group]) for site in group[0]}
            stacked = torch.func.vmap(one, randomness="different")(values)
        except (RuntimeError, NotImplementedError, ValueError):
            return None
        return (
            stacked
            if all(t.shape[1:] == a.shape for t, a in zip(stacked, alone, strict=True))
            else None
        )


def observed_site(
    program: Callable[..., Any],
    x: Inputs,
    batch_size: int,
    values: Mapping[str, Tensor],
    asked: str | None = None,
) -> tuple[ObservedSite, list[Any]]:
    """The observed site of a program, the only one unless its name is `asked`, and its distribution
    for each batch of rows, given the latent `values`.

    Raises:
        ModelError: the program does not run on `x`, has no such observed site or, without a name,
            several, or its rows depend on each other.
    """
    name, dim, writes = "", 0, False
    fns: list[Any] = []
    for batch in pieces(x, batch_size):
        own, rows = of_each(Tensor.clone, batch), rows_in(batch)
        version = _version(own)
        msg = _observed(program, own, values, asked)
        name, fn = msg["name"], msg["fn"]
        dim = dim or _rows_dim(msg, rows)
        if fns and (len(fns[0].shape()) != len(fn.shape()) or fn.shape()[dim] != rows):
            raise ModelError(
                f"observed site '{name}': shapes {tuple(fns[0].shape())} and"
                f" {tuple(fn.shape())} for batches of rows do not go together"
            )
        fns.append(fn)
        writes = writes or _version(own) != version
    return ObservedSite(program, x, batch_size, name, dim, writes), fns


def _version(x: Inputs) -> int:
    """How often the tensors were written into."""
    return sum(part._version for part in parts_of(x).values())


def _observed(
    program: Callable[..., Any], batch: Inputs, values: Mapping[str, Tensor], asked: str | None
) -> Any:
    """The message of the observed site in a run of the program on a batch of rows."""
    try:
        with Values(values) as run:
            program(batch)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        IndexError,
        KeyError,
        AttributeError,
    ) as error:
        raise ModelError(
            f"the program does not run on x of {described(batch)}:"
            f" {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    if asked in run.observed or (asked is None and len(run.observed) == 1):
        return run.observed[asked or next(iter(run.observed))]
    found = ", ".join(
        f"{name} ({type(base_distribution(msg['fn'])).__name__})"
        for name, msg in run.observed.items()
    )
    mend = "; say which, site='...'" if asked is None and found else ""
    raise ModelError(
        "predict: expected one observed site that is drawn when the program is called as"
        f" program(x){f', {asked!r}' if asked is not None else ''}, got: {found or 'none'}{mend}"
    )


def _rows_dim(msg: Any, rows: int) -> int:
    """The dimension of the rows in a draw of an observed site, counted from the right."""
    name, fn = msg["name"], msg["fn"]
    shape, base = fn.shape(), base_distribution(fn)
    plates = [frame for frame in msg["cond_indep_stack"] if frame.vectorized and frame.size == rows]
    if len(plates) > 1:
        raise ModelError(
            f"observed site '{name}': plates {', '.join(repr(f.name) for f in plates)} all have"
            f" {rows} entries; predict another number of rows"
        )
    dim = plates[0].dim - len(fn.event_shape) if plates else -len(shape)
    if not shape or shape[dim] != rows:
        raise ModelError(
            f"observed site '{name}': expected {rows} rows, first or in a plate, got shape"
            f' {tuple(shape)}; put it in pyro.plate("data", len(x)), or the rows first'
        )
    if -dim <= len(base.event_shape):
        raise ModelError(
            f"observed site '{name}': its {type(base).__name__} is one density for all rows, which"
            " depend on each other; only rows that are independent given the latent sites can be"
            " predicted one by one: run the program at posterior.draw()"
        )
    return int(dim)


def unmarked(fn: Any) -> Any:
    """The distribution whose marked values `likelihoods.Ignoring` ignores; others as they are."""
    return fn.base_dist if isinstance(fn, Ignoring) else fn


def marker_of(fn: Any) -> float | None:
    """The value that is ignored in targets, if there is one."""
    base = base_distribution(fn)
    return base.marker if isinstance(base, Ignoring) else None


def another_distribution(name: str) -> ModelError:
    """The error of an observed site whose kind of distribution depends on the draw."""
    return ModelError(
        f"observed site '{name}': expected one kind of distribution for all draws, got several"
    )


def check_callable_without_y(program: Callable[..., Any], x: Inputs) -> None:
    """Raises ModelError unless `program(x)` can be called without targets."""
    try:
        inspect.signature(program).bind(x)
    except TypeError:
        raise ModelError(
            "predict: expected a program that can be called as program(x); give the targets a"
            " default: def program(x, y=None)"
        ) from None


class _Until(Messenger):
    """Ends the run at the site `name` with its distribution, before it is drawn."""

    class Reached(Exception):
        """Carries the distribution of the site."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            raise self.Reached(msg["fn"])
