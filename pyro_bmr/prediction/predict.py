"""Posterior predictive distributions, averaged over draws of the weights.

Owns `predict`; what it gives is in `predictive.py`. Next: `calibration.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_bmr.checks import check_rows
from pyro_bmr.errors import ModelError, described
from pyro_bmr.guides.mean_field import base_distribution
from pyro_bmr.isolation import isolated
from pyro_bmr.memory import check_memory
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.site import rows_digest
from pyro_bmr.prediction.predictive import (
    ClassPrediction,
    MixturePrediction,
    Parameters,
    Prediction,
    RealPrediction,
    prediction_of,
)
from pyro_bmr.tracing import Values

__all__ = [
    "ClassPrediction",
    "MixturePrediction",
    "Prediction",
    "RealPrediction",
    "check_callable_without_y",
    "predict",
    "prediction_of",
]


@isolated(autocast=True)
@torch.no_grad()
def predict(
    program: Callable[..., Any],
    posterior: Posterior,
    x: Tensor,
    *,
    draws: int = 32,
    seed: int = 0,
    batch_size: int = 10_000,
) -> Prediction:
    """The posterior predictive of the observed site of `program(x)` at every row of `x`.

    A `ClassPrediction` of a Categorical site, a `RealPrediction` of a Normal one, and of any other
    distribution a `MixturePrediction`, all with the rows first. The site's rows are in its plate of
    as many entries as `x` has rows, or without one in its first dimension.

    Args:
        draws: of the latent sites; the same ones for all rows. 0 stands for one run at the
            posterior's point (means, medians of scales).
        batch_size: rows times draws at once, which bounds the memory. With fewer rows than that,
            several draws of a Categorical or Normal site go through the program at once, by
            `torch.func.vmap` if the program allows it.

    Raises:
        DataError: `x` has no rows, or is not finite.
        ModelError: an argument is out of range, or draws times rows of a real target are more than
            the memory that is free.
        ModelError: the program has no single observed site, its rows are not independent of each
            other, or a latent site has another shape at these rows.
    """
    for name, value, least in (
        ("draws", draws, 0),
        ("batch_size", batch_size, 1),
        ("seed", seed, None),
    ):
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or (least is not None and value < least)
        ):
            raise ModelError(
                f"predict({name}={described(value)}): expected a whole"
                f" number{'' if least is None else f' >= {least}'}"
            )
    if not isinstance(posterior, Posterior):
        raise ModelError(
            f"predict: expected a Posterior, such as fit.posterior, got {type(posterior).__name__}"
        )
    check_rows(x, x, "the rows to predict")
    check_callable_without_y(program, x)
    like = next(iter(posterior.sites.values())).mean
    x = x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)
    for name, site in posterior.sites.items():
        if site.of_rows is not None and site.of_rows != rows_digest(x):
            raise ModelError(
                f"site '{name}' has shape {tuple(site.mean.shape)} in the posterior, an entry for"
                " each row of the fit; predict those rows, all of them"
            )
    generator = torch.Generator(device=like.device).manual_seed(seed)
    modules = list(program.modules()) if isinstance(program, nn.Module) else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        values = (
            (posterior.draw(generator) for _ in range(draws))
            if draws
            else iter([posterior.point()])
        )
        return _over_draws(_Program(program, x, batch_size), values, max(draws, 1))
    finally:
        for module in training:
            module.training = True


def _over_draws(program: _Program, values: Iterator[dict[str, Tensor]], draws: int) -> Prediction:
    """One draw, or several at a time where the program can be vectorised."""
    first = next(values)
    program, fns = program.observed(first)  # raises what is wrong with the program
    alone = program.parameters(fns)
    if alone is None or len(alone) > 1:  # those of classes are averaged as they come
        numbers = (
            sum(t.numel() * t.element_size() for t in alone)
            if alone
            else sum(2 * fn.shape().numel() * 8 for fn in fns)
        )
        needed = 2 * draws * numbers
        check_memory(
            f"a prediction of {draws} draws at {len(program.x)} rows",
            needed,
            program.x.device,
            "predict fewer rows at a time, or with fewer draws",
        )
    if alone is None:
        return MixturePrediction(
            [
                fns,
                *(
                    [program.reached(value, batch) for batch in program.batches()]
                    for value in values
                ),
            ],
            program.dim,
        )
    return prediction_of(_parameters(program, alone, values, draws), draws)


def _parameters(
    program: _Program, alone: Parameters, values: Iterator[dict[str, Tensor]], draws: int
) -> Iterator[Parameters]:
    yield tuple(t[None] for t in alone)
    at_once = max(min(program.batch_size // max(len(program.x), 1), draws), 1)
    while group := list(islice(values, at_once)):
        stacked = program.together(group, alone) if len(group) > 1 else None
        if stacked is not None:
            yield stacked
            continue
        for value in group:
            found = program.parameters(
                [program.reached(value, batch) for batch in program.batches()]
            )
            if found is None:
                raise _changed(program.name)
            yield tuple(t[None] for t in found)


@dataclass(frozen=True)
class _Program:
    """A program at the rows `x`: the name of its observed site, the dimension of its rows, and
    whether it writes into its rows.
    """

    program: Callable[..., Any]
    x: Tensor
    batch_size: int
    name: str = ""
    dim: int = 0
    writes: bool = False

    def batches(self) -> Iterator[Tensor]:
        """Of the rows; copies for a program that writes into them."""
        yield from (
            batch.clone() if self.writes else batch for batch in self.x.split(self.batch_size)
        )

    def observed(self, values: Mapping[str, Tensor]) -> tuple[_Program, list[Any]]:
        """The one observed site, and its distribution batch by batch, given the latent values."""
        name, dim, writes = "", 0, False
        fns: list[Any] = []
        for batch in self.x.split(self.batch_size):
            own = batch.clone()
            version = own._version
            try:
                with Values(values) as run:
                    self.program(own)
            except (
                RuntimeError,
                TypeError,
                ValueError,
                IndexError,
                KeyError,
                AttributeError,
            ) as error:
                raise ModelError(
                    f"the program does not run on x of shape {tuple(batch.shape)} and"
                    f" {batch.dtype}: {(str(error).splitlines() or [type(error).__name__])[0]}"
                ) from error
            if len(run.observed) != 1:
                found = (
                    ", ".join(
                        f"{name} ({type(base_distribution(msg['fn'])).__name__})"
                        for name, msg in run.observed.items()
                    )
                    or "none"
                )
                raise ModelError(
                    "prediction needs one observed site that is drawn when the program is called"
                    f" as program(x); found: {found}"
                )
            name, msg = next(iter(run.observed.items()))
            dim = dim or _rows_dim(msg, len(batch))
            if fns and (
                len(fns[0].shape()) != len(msg["fn"].shape())
                or msg["fn"].shape()[dim] != len(batch)
            ):
                raise ModelError(
                    f"observed site '{name}': shapes {tuple(fns[0].shape())} and"
                    f" {tuple(msg['fn'].shape())} for batches of rows do not go together"
                )
            fns.append(msg["fn"])
            writes = writes or own._version != version
        return replace(self, name=name, dim=dim, writes=writes), fns

    def reached(self, values: Mapping[str, Tensor], batch: Tensor) -> Any:
        """The distribution of the observed site, given the latent values."""
        try:
            with _Until(self.name), Values(values):
                self.program(batch)
        except _Until.Reached as reached:
            return reached.args[0]
        raise ModelError(
            f"site '{self.name}' of the program is reached for some draws only; prediction needs it"
            " in every run"
        )

    def parameters(self, fns: list[Any]) -> Parameters | None:
        """Those of a Categorical or a Normal, the rows of all batches first; None for other
        distributions.
        """
        bases = [base_distribution(fn) for fn in fns]
        if all(isinstance(base, torch.distributions.Categorical) for base in bases):
            return (torch.cat([base.probs.movedim(self.dim - 1, 0) for base in bases]),)
        if all(isinstance(base, torch.distributions.Normal) for base in bases):
            return tuple(
                torch.cat([t.movedim(self.dim, 0) for t in tensors])
                for tensors in zip(*((base.loc, base.scale) for base in bases), strict=True)
            )
        return None

    def together(self, group: list[dict[str, Tensor]], alone: Parameters) -> Parameters | None:
        """Several draws at once; None where the program cannot be vectorised, as with branches that
        depend on a value.
        """

        def one(values: dict[str, Tensor]) -> Parameters:
            found = self.parameters([self.reached(values, next(self.batches()))])
            if found is None:
                raise _changed(self.name)
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
            f"observed site '{name}': it has shape {tuple(shape)} for {rows} rows; put it in"
            ' pyro.plate("data", len(x)), or the rows first'
        )
    if -dim <= len(base.event_shape):
        raise ModelError(
            f"observed site '{name}': its {type(base).__name__} is one density for all rows, which"
            " depend on each other; only rows that are independent given the latent sites can be"
            " predicted one by one: run the program at posterior.draw()"
        )
    return int(dim)


def _changed(name: str) -> ModelError:
    return ModelError(
        f"observed site '{name}' has another distribution for other draws; prediction needs one"
        " kind"
    )


def check_callable_without_y(program: Callable[..., Any], x: Tensor) -> None:
    """Raises a ModelError unless `program(x)` can be called: its targets need a default."""
    try:
        inspect.signature(program).bind(x)
    except TypeError:
        raise ModelError(
            "prediction calls program(x); give the targets a default: def program(x, y=None)"
        ) from None


class _Until(Messenger):
    """Ends the run at the site `name`, whose draw would be for nothing."""

    class Reached(Exception):
        """Carries the distribution of the site."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            raise self.Reached(msg["fn"])
