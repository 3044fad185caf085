"""Posterior predictive distributions, averaged over draws of the weights.

Owns `predict`; the classes of predictions are in `predictive.py`. Next: `calibration.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmr.checks import check_arguments, check_rows, is_whole
from pyro_bmr.data.batch import BatchChecks
from pyro_bmr.data.given import columns_in, source_of
from pyro_bmr.data.inputs import Inputs, of_each, parts_of, pieces, rows_in
from pyro_bmr.data.loaders import in_order
from pyro_bmr.data.row_sources import chunks
from pyro_bmr.errors import DataError, ModelError
from pyro_bmr.isolation import isolated, plain, seed_generators
from pyro_bmr.likelihoods.likelihood import check_read
from pyro_bmr.memory import check_memory
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.site import rows_digest
from pyro_bmr.prediction.observed_site import (
    ObservedSite,
    another_distribution,
    check_callable_without_y,
    marker_of,
    observed_site,
)
from pyro_bmr.prediction.predictive import (
    ChunkedPrediction,
    ClassPrediction,
    MixturePrediction,
    Parameters,
    Prediction,
    RealPrediction,
    prediction_of,
    rows_joined,
)
from pyro_bmr.prediction.shared_products import parameters_of_draws, shares_products

_KEPT = 1 << 28  # bytes of all draws that a prediction keeps

__all__ = [
    "ChunkedPrediction",
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
    x: Any,
    *,
    draws: int = 32,
    seed: int = 0,
    batch_size: int = 10_000,
    site: str | None = None,
) -> Prediction:
    """The posterior predictive of the observed site of `program(x)` at every row of `x`.

    It is a `ClassPrediction` for a Categorical site, a `RealPrediction` for a Normal one, and a
    `MixturePrediction` for any other distribution, all with the rows first. Where draws times rows
    would take more than 256 MiB, it is a `ChunkedPrediction` in the place of the last two: some
    rows at a time are computed for each question. The rows of the site are in its plate of as many
    entries as `x` has rows, or, without such a plate, in its first dimension.

    Args:
        x: the inputs of all rows, a tensor, an array, a table, or a tuple or dict of such; or a
            data set, a loader or an iterable of batches, whose targets are left out. These are read
            once, and never in memory as a whole (docs/bring_your_data.md).
        draws: how many draws of the latent sites, the same ones for all rows, in antithetic pairs
            (`Posterior.draws`). 0 is one run at the point of the posterior (means, medians of
            scales).
        batch_size: rows times draws at once, which bounds the memory. A Categorical or Normal site
            is computed for several draws at once: of a `BayesianNetwork` at many rows, the products
            of the inputs with the weights of eight draws are one product; else, if there are fewer
            rows, by `torch.func.vmap` if the program allows it.
        site: the name of the observed site, if the program has several.

    Raises:
        DataError: `x` has no rows, is not finite, comes from a loader that mixes its rows, or is a
            table with other columns than that of the fit.
        ModelError: an argument is out of range, or the prediction is more than the memory that is
            free.
        ModelError: the program has no such observed site, or several and no `site` is given, its
            rows are not independent of each other, or a latent site has another shape at these
            rows.
    """
    _check_predict(posterior, draws=draws, batch_size=batch_size, seed=seed)
    _check_columns(program, x)
    read = chunks(in_order(source_of(x, targets=False)), batch_size, BatchChecks(), targets=False)
    question = _Question(program, posterior, draws, seed, batch_size, site)
    parts, sizes = list[Prediction](), list[int]()
    for part, _ in read:
        where = "the rows to predict" + (f" from row {sum(sizes)} on" if sizes else "")
        parts.append(_of_rows(question, part, where))
        sizes.append(rows_in(part))
    return rows_joined(parts, sizes)


def _of_rows(question: _Question, x: Any, where: str) -> Prediction:
    """The prediction at rows in memory."""
    for name, part in parts_of(x).items() if isinstance(x, (tuple, dict)) else (("x", x),):
        check_rows(part, part, where if name == "x" else f"{where}, {name}")
    check_read(getattr(question.program, "likelihood", None), x, where)
    check_callable_without_y(question.program, x)
    like = next(iter(question.posterior.sites.values())).mean
    x = of_each(
        lambda part: plain(part).to(
            like.device, like.dtype if part.is_floating_point() else part.dtype
        ),
        x,
    )
    _check_sites_of_rows(question.posterior, x)
    return question.answer(x)


def _check_predict(
    posterior: Any,
    *,
    draws: Any,
    batch_size: Any,
    seed: Any,
) -> None:
    """Raises ModelError or DataError unless the arguments of `predict` are what they should be."""
    check_arguments("predict", is_whole(draws, 0), "a whole number >= 0", draws=draws)
    check_arguments(
        "predict", is_whole(batch_size, 1), "a whole number >= 1", batch_size=batch_size
    )
    check_arguments("predict", is_whole(seed), "a whole number", seed=seed)
    if not isinstance(posterior, Posterior):
        raise ModelError(
            f"predict: expected a Posterior, such as fit.posterior, got {type(posterior).__name__}"
        )


def _check_columns(program: Any, x: Any) -> None:
    """Raises DataError if x is a table, and its columns are not those of the table of the fit."""
    fitted, given = getattr(program, "columns", None), columns_in(x)
    if fitted is None or given is None or fitted == given:
        return
    missing, new = ([n for n in a if n not in b] for a, b in ((fitted, given), (given, fitted)))
    said = "; ".join(
        f"{word} {', '.join(map(repr, names[:5]))}{' …' * (len(names) > 5)}"
        for word, names in (("without", missing), ("with", new))
        if names
    )
    raise DataError(
        f"x: expected the columns of the table that was fitted, in their order, got a table"
        f" {said or 'with them in another order'}; give x[[{', '.join(map(repr, fitted[:5]))}"
        f"{', …' * (len(fitted) > 5)}]]"
    )


def _check_sites_of_rows(posterior: Posterior, x: Inputs) -> None:
    """Raises ModelError if a site has an entry for each row of the fit, and `x` are other rows."""
    for name, site in posterior.sites.items():
        if site.of_rows is not None and site.of_rows != rows_digest(x):
            raise ModelError(
                f"site '{name}' has shape {tuple(site.mean.shape)} in the posterior, an entry for"
                " each row of the fit; predict those rows, all of them"
            )


@contextmanager
def _in_evaluation(program: object) -> Iterator[None]:
    """The modules of a program in evaluation mode, and in their own modes afterwards."""
    modules = list(program.modules()) if isinstance(program, nn.Module) else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class _Question:
    """What is predicted, for any rows."""

    program: Callable[..., Any]
    posterior: Posterior
    draws: int
    seed: int
    batch_size: int
    site: str | None

    @isolated(autocast=True)
    @torch.no_grad()
    def answer(self, x: Inputs) -> Prediction:
        """The prediction at the rows x."""
        like = next(iter(self.posterior.sites.values())).mean
        generator = torch.Generator(device=like.device).manual_seed(self.seed)
        values = (
            self.posterior.draws(self.draws, generator)
            if self.draws
            else iter([self.posterior.point()])
        )
        seed_generators(self.seed)  # of what the program draws itself
        with _in_evaluation(self.program):
            return self._over_draws(x, values)

    def _over_draws(self, x: Inputs, values: Iterator[dict[str, Tensor]]) -> Prediction:
        """The prediction averaged over the draws `values`."""
        first, draws, rows = next(values), max(self.draws, 1), rows_in(x)
        site, fns = observed_site(self.program, x, self.batch_size, first, self.site)
        alone = site.parameters(fns)
        if alone is None or len(alone) > 1:  # class probabilities are averaged as they come
            needed = 2 * draws * _bytes(alone, fns)
            if needed > _KEPT and rows > 1:
                return self._in_chunks(x, max(rows * _KEPT // needed, 1))
            check_memory(
                f"a prediction of {draws} draws at {rows} rows",
                needed,
                next(iter(parts_of(x).values())).device,
                "predict fewer rows at a time, or with fewer draws",
            )
        if alone is None:
            others = ([site.reached(value, batch) for batch in site.batches()] for value in values)
            return MixturePrediction([fns, *others], site.dim)
        parameters = _parameters(site, alone, values, draws)
        return prediction_of(parameters, draws, marker_of(fns[0]))

    def _in_chunks(self, x: Inputs, size: int) -> ChunkedPrediction:
        """The prediction of `size` rows at a time."""
        parts = list(pieces(x, size))
        chunks: list[Any] = [partial(self.answer, part) for part in parts]
        return ChunkedPrediction(chunks, [rows_in(part) for part in parts])


def _bytes(alone: Parameters | None, fns: list[Any]) -> int:
    """What the parameters of one draw take."""
    if alone is None:
        return sum(2 * fn.shape().numel() * 8 for fn in fns)
    return sum(t.numel() * t.element_size() for t in alone)


def _parameters(
    site: ObservedSite, alone: Parameters, values: Iterator[dict[str, Tensor]], draws: int
) -> Iterator[Parameters]:
    """The parameters of the observed site at the first draw, `alone`, and at the other `values`,
    draws first: one draw at a time, or several if the program can be vectorised.
    """
    yield tuple(t[None] for t in alone)
    if shares_products(site):
        yield from parameters_of_draws(site, values, alone)
        return
    at_once = max(min(site.batch_size // max(rows_in(site.x), 1), draws), 1)
    while group := list(islice(values, at_once)):
        stacked = site.together(group, alone) if len(group) > 1 else None
        if stacked is not None:
            yield stacked
            continue
        for value in group:
            found = site.parameters([site.reached(value, batch) for batch in site.batches()])
            if found is None:
                raise another_distribution(site.name)
            yield tuple(t[None] for t in found)
