r"""`prune`: a trained network with most of its weights at zero, from some passes over data.

Owns `prune`. Next: `prediction/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_bmr.checks import check_arguments, is_whole
from pyro_bmr.curvatures.curvature import check_factors, check_likelihood, wanted_parameters
from pyro_bmr.curvatures.network_batches import evaluation
from pyro_bmr.curvatures.ranks import Ranks
from pyro_bmr.curvatures.scores import FISHERS, Loss
from pyro_bmr.errors import ModelError, described, holds
from pyro_bmr.isolation import isolated, seed_generators, seed_of
from pyro_bmr.likelihoods.likelihood import Likelihood
from pyro_bmr.networks.lifting import check_network
from pyro_bmr.networks.plain_module import module_copy, plain_copy
from pyro_bmr.post_training.calibration import calibration_rows
from pyro_bmr.post_training.measure import Measure
from pyro_bmr.post_training.pruned import Pruned
from pyro_bmr.post_training.rounds import Rounds, Settings
from pyro_bmr.reduction.attention_heads import Heads
from pyro_bmr.reduction.groups import NofM, check_labels

_ALL = 1 << 60  # rows
PATH = (0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.035, 0.025, 0.018, 0.012, 0.01)
"""The fractions of the rounds, down to the one that is asked for."""


@isolated()
def prune(
    net: nn.Module,
    data: Any,
    likelihood: Likelihood,
    kept: float | NofM,
    *,
    per: str | Heads | Mapping[str, Tensor] = "weight",
    heads: int | Mapping[str, int] | None = None,
    only: Collection[str] | None = None,
    path: Collection[float] | None = None,
    corrections: int = 100,
    last_corrections: int = 500,
    rate: float = 0.05,
    fisher: str = "true",
    draws: int = 1,
    temperature: float = 0.05,
    scale: float | Literal["empirical"] | None = None,
    floor: float = 0.1,
    rows: int = 10_000,
    size: int | None = None,
    values: Mapping[str, float | Tensor] | None = None,
    most_rise: float | None = None,
    validation: Any = None,
    batch_size: int = 128,
    seed: int = 0,
    after_round: Callable[[float, nn.Module], None] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Pruned:
    r"""A trained network with the fraction `kept` of the weights of its layers, and the rest at
    exactly zero; no labels and no training.

    In each round down `path`, the Kronecker posterior of each layer at the present weights ranks
    all weights by the evidence of being zero,

    .. math:: \Delta F_{ij} = \tfrac12 \log \frac{s^2}{R_{ii} C_{jj}} -
        \tfrac12 \frac{W_{ij}^2}{R_{ii} C_{jj}},

    those above one threshold over all layers are held at zero, and the others of their layer, with
    its bias, move to their mean given the zeros (`formulas.held_at_zero`). Then `corrections` steps
    of Adam, a batch each, bring the outputs nearer to those of the dense network
    (`post_training.corrections`). They move the weights that are kept, biases, norm layers,
    embeddings and all other parameters.

    Pruned are the weights of two or more dimensions that `curvature` finds factors for. Embeddings,
    norm layers and what else has a diagonal stay whole.

    In a process group of torch.distributed, every process calls it with the same arguments and
    measures its part of the rows. The layers are shared out: one process works out the posterior
    and the means of each, and gives them to the others.

    Args:
        net: any module; it is not changed.
        data, likelihood, fisher, draws, values, size: as for `curvature`.
        kept: the fraction of the weights, or a pattern `NofM(2, 4)`; with `per`, the fraction of
            the weights that are in groups.
        per: what is kept or pruned together, as for `reduce`. ``shrinking.reader_labels(net, x)``
            removes units by the weights that read them, which costs less accuracy than "unit", by
            those that lead to them (docs/results/pretrained.md). The units of the last layer and of
            recurrent layers are kept with "unit" and "channel".
        heads: for ``per="head"`` and `Heads`; by default as many as the modules of the network say.
        only: patterns of the names of the weights that may be pruned. By default all of those that
            require a gradient, or all if none does. Parameters that are frozen, beside others that
            are not, stay as they are. Entries that are zero already stay zero, and count as pruned.
        path: the fractions of the rounds; by default `PATH` down to `kept`. More rounds keep more
            accuracy.
        corrections, last_corrections: steps after each round, and after the last. More of them, and
            more `rows` for them, keep more accuracy (docs/results/pretrained.md).
        rate: c, how far the sum of a row of weights moves in one step at most, about, as a part of
            its size. Where the steps of a round lead away from the dense network, they are taken
            back and tried again at a third of the rate, twice.
        temperature: T of the posterior.
        scale: s of the prior; by default the root mean square of each layer's weights.
            "empirical": of each layer the s of the most evidence for its weights and bias at T, as
            the maximum of the likelihood (`formulas.LaplaceEvidence`; Immer et al. 2021, arXiv
            2104.04975).
        floor: each layer keeps at least this part of the fraction, of its weights or groups; of
            several groups one at least.
        rows: how many rows of `data` are used, the calibration rows. They are read once and held in
            memory.
        most_rise: nats per row. If a round raises the loss on `validation` rows by more, or without
            them the divergence from the dense network, the result is that of the round before.
        validation: rows (x, y) that are not among the data.
        after_round: called with the fraction and the network after each round, such as to score
            it. The network is the one that is pruned further: copy what is to be kept.
        checkpoint: a folder. The state after each round is saved there, and a call with the same
            arguments continues from it.

    Raises:
        ModelError: an argument is out of range, or as `curvature`.
        ReductionError: labels of `per` do not fit their weights, or put nothing into a group.

    Example:
        >>> pruned = prune(net, (x, y), Categorical(), kept=0.1)
        >>> pruned.table(), pruned.net
    """
    pattern = kept if isinstance(kept, NofM) else None
    fraction = kept.n / kept.m if isinstance(kept, NofM) else kept
    settings = Settings(
        _sizes(fraction, path), pattern, per, heads, _patterns(only), corrections,
        last_corrections, rate, temperature, scale, floor, most_rise, seed,
    )  # fmt: skip
    _check(net, likelihood, settings, fisher, draws, rows, batch_size)
    if isinstance(per, Mapping):
        check_labels(per)
    check_likelihood(likelihood, values)
    loss = Loss(likelihood, {name: torch.as_tensor(v) for name, v in (values or {}).items()})
    plain = plain_copy(net)
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    if trained:
        still = tuple(name for name, _ in plain.named_parameters() if name not in trained)
        settings = replace(settings, still=still, frozen=still if only is None else ())
    dense = plain.requires_grad_(False)
    working = module_copy(dense).eval()
    check_factors(dict(working.named_parameters()))
    ranks = Ranks.of_group(next(iter(working.parameters())).device)
    seed_generators(seed_of(seed, ranks.rank))
    own = fisher == "empirical"
    found = calibration_rows(dense, data, rows, own, batch_size, seed, size, ranks)
    held_out = None
    if validation is not None:
        held_out = calibration_rows(dense, validation, _ALL, True, batch_size, seed, None, ranks)
    shown = progress and ranks.rank == 0
    with evaluation(dense), tqdm(disable=not shown, unit="row", desc="prune") as bar:
        measure = Measure(dense, found, loss, fisher, draws, bar, ranks)
        folder = None if checkpoint is None else Path(checkpoint)
        pruned = Rounds(measure, working, settings, held_out, after_round).run(folder)
    for name, parameter in pruned.net.named_parameters():
        parameter.requires_grad_(name in trained)
    return pruned


def _sizes(kept: Any, path: Collection[float] | None) -> tuple[float, ...]:
    """The fractions of the rounds, the last of them `kept`."""
    if not holds(lambda k: 0 < k <= 1, kept):
        raise ModelError(
            f"kept={described(kept)}: expected a fraction > 0 and up to 1, or NofM(n, m)"
        )
    steps = PATH if path is None else tuple(path)
    if not all(holds(lambda k: 0 < k <= 1, step) for step in steps):
        raise ModelError(f"path={described(path)}: expected fractions > 0 and up to 1")
    return (*sorted({float(step) for step in steps if step > kept}, reverse=True), float(kept))


def _patterns(only: Collection[str] | None) -> tuple[str, ...]:
    return () if only is None else (only,) if isinstance(only, str) else tuple(only)


def _check(
    net: Any,
    likelihood: Any,
    settings: Settings,
    fisher: Any,
    draws: Any,
    rows: Any,
    batch_size: Any,
) -> None:
    check = check_arguments
    check("prune", isinstance(net, nn.Module), "a torch.nn.Module", net=net)
    check_network(net)
    wanted_parameters(net, settings.only or None)
    ok = not isinstance(likelihood, type) and hasattr(likelihood, "observe")
    check("prune", ok, "Categorical() or anything with its observe", likelihood=likelihood)
    check("prune", fisher in FISHERS, " or ".join(map(repr, FISHERS)), fisher=fisher)
    check("prune", is_whole(draws, 1), "a whole number > 0", draws=draws)
    check("prune", is_whole(rows, 1), "a whole number > 0", rows=rows)
    check("prune", is_whole(batch_size, 1), "a whole number > 0", batch_size=batch_size)
    for name in ("corrections", "last_corrections"):
        count = getattr(settings, name)
        check("prune", is_whole(count, 0), "a whole number >= 0", **{name: count})
    for name in ("rate", "temperature", "scale", "most_rise"):
        number = getattr(settings, name)
        named = name == "scale" and number == "empirical"
        left_out = number is None and name in ("scale", "most_rise")
        is_number = not isinstance(number, bool) and holds(lambda v: 0 < v < math.inf, number)
        positive = left_out or named or is_number
        or_named = ', or "empirical"' if name == "scale" else ""
        check("prune", positive, f"a finite number > 0{or_named}", **{name: number})
    floor = settings.floor
    check("prune", holds(lambda v: 0 <= v <= 1, floor), "from 0 up to 1", floor=floor)
    if settings.pattern is not None and settings.per != "weight":
        raise ModelError(
            f"per={described(settings.per)}: {settings.pattern} is a pattern of weights; leave per"
            " out"
        )
