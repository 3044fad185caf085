"""Baselines that prune a trained network without training it, in plain torch: magnitude, Wanda (Sun
et al. 2023), SparseGPT (Frantar & Alistarh 2023), and the rule of The LLM Surgeon (van der Ouderaa
et al. 2024). All read the factors that the library collects (`factors`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.curvatures import Curvature
from pyro_bmr.curvatures.passes import Pass
from pyro_bmr.curvatures.scores import Loss
from pyro_bmr.formulas import held_at_zero

SURGEON_DAMPING = 0.01  # of the mean diagonal of each factor
_CLASSES = bmr.Categorical()
BLOCK = 128  # columns that SparseGPT takes at once
Masks = dict[str, Tensor]


def weights_of(found: Curvature) -> list[str]:
    """The weights that all methods prune."""
    return [name for name, layer in found.layers.items() if layer.inputs.ndim == 2]


def by_scores(scores: Mapping[str, Tensor], kept: float, uniform: bool) -> Masks:
    """The highest scores, of all layers together, or of each row or layer the same fraction."""
    if uniform:
        return {name: _top(score, kept) for name, score in scores.items()}
    pooled = torch.cat([score.flatten() for score in scores.values()])
    limit = pooled.sort(descending=True).values[round(kept * len(pooled)) - 1]
    return {name: score >= limit for name, score in scores.items()}


def _top(score: Tensor, kept: float) -> Tensor:
    limit = score.flatten().sort(descending=True).values[round(kept * score.numel()) - 1]
    return score >= limit


def masked(net: nn.Module, masks: Masks) -> nn.Module:
    """A copy with zeros."""
    out = copy.deepcopy(net)
    for name, mask in masks.items():
        out.get_parameter(name).data *= mask
    return out


def magnitude(net: nn.Module, found: Curvature, kept: float, uniform: bool) -> nn.Module:
    scores = {name: net.get_parameter(name).abs() for name in weights_of(found)}
    return masked(net, by_scores(scores, kept, uniform))


def wanda(net: nn.Module, found: Curvature, kept: float) -> nn.Module:
    """|W| times the norm of the input, of each row the same fraction."""
    masks = {}
    for name in weights_of(found):
        weight = net.get_parameter(name)
        norm = _inputs(found, name).diagonal().sqrt()
        score = weight.flatten(1).abs() * norm
        count = max(round(kept * score.shape[1]), 1)
        limit = score.sort(1, descending=True).values[:, count - 1 : count]
        masks[name] = (score >= limit).view(weight.shape)
    return masked(net, masks)


def _inputs(found: Curvature, name: str) -> Tensor:
    layer = found.layers[name]
    return layer.inputs[:-1, :-1] if layer.bias is not None else layer.inputs


def sparsegpt(
    net: nn.Module, found: Curvature, kept: float | Mapping[str, float], damping: float = 0.01
) -> nn.Module:
    """Columns from left to right: of each block those with the least w²/d² go, and the columns to
    the right make up for them.
    """
    out = copy.deepcopy(net)
    for name in weights_of(found):
        weight = out.get_parameter(name)
        fraction = kept[name] if isinstance(kept, Mapping) else kept
        pruned = sparsegpt_layer(weight.flatten(1), _inputs(found, name), fraction, damping)
        weight.data.copy_(pruned.view(weight.shape))
    return out


def sparsegpt_layer(weight: Tensor, inputs: Tensor, kept: float, damping: float = 0.01) -> Tensor:
    w, h = weight.detach().clone(), inputs.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(damping * h.diagonal().mean())
    root = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for first in range(0, w.shape[1], BLOCK):
        last = min(first + BLOCK, w.shape[1])
        part, errors = w[:, first:last], torch.zeros_like(w[:, first:last])
        within = root[first:last, first:last]
        score = part.square() / within.diagonal().square()
        count = round((1 - kept) * score.numel())
        gone = torch.zeros_like(score, dtype=torch.bool)
        if count:
            gone = score <= score.flatten().kthvalue(count).values
        for k in range(last - first):
            column = part[:, k].clone()
            error = torch.where(gone[:, k], column, 0) / within[k, k]
            part[:, k:] -= error[:, None] * within[k, k:]
            part[:, k] = torch.where(gone[:, k], 0, column)
            errors[:, k] = error
        w[:, last:] -= errors @ root[first:last, last:]
    return w


def surgeon_round(net: nn.Module, found: Curvature, held: Masks, kept: float) -> nn.Module:
    """One shot of The LLM Surgeon: the least ½ w²/[F⁻¹] of all layers go, and the others of their
    layer move, with F the damped Kronecker curvature. `held` is brought up to date.
    """
    out, scores, parts = copy.deepcopy(net), {}, {}
    for name in weights_of(found):
        layer = found.layers[name]
        w = net.get_parameter(name).detach().flatten(1)
        if layer.bias is not None:
            w = torch.cat([w, net.get_parameter(layer.bias).detach()[:, None]], 1)
        rows, columns = (_damped_inverse(f) for f in (layer.outputs, layer.inputs))
        var = rows.diagonal()[:, None] * columns.diagonal()
        width = w.shape[1] - (layer.bias is not None)
        cost = 0.5 * w.square() / var
        before = held.setdefault(name, torch.zeros_like(w, dtype=torch.bool))
        scores[name] = cost[:, :width].masked_fill(before[:, :width], -torch.inf)
        parts[name] = w, rows, columns, width
    masks = by_scores(scores, kept, uniform=False)
    for name, (w, rows, columns, width) in parts.items():
        held[name][:, :width] = ~masks[name]
        mean = held_at_zero(w, rows, columns, held[name], tolerance=1e-3).mean
        parameter, layer = out.get_parameter(name), found.layers[name]
        parameter.data.copy_(mean[:, :width].reshape(parameter.shape))
        if layer.bias is not None:
            out.get_parameter(layer.bias).data.copy_(mean[:, -1])
    return out


def _damped_inverse(factor: Tensor) -> Tensor:
    ridge = SURGEON_DAMPING * factor.diagonal().mean() + 1e-12
    return torch.cholesky_inverse(
        torch.linalg.cholesky(factor.double() + ridge * torch.eye(len(factor)).double())
    ).to(factor.dtype)


def surgeon(
    net: nn.Module,
    data: tuple[Tensor, Tensor],
    path: Sequence[float],
    scored: Sequence[float],
    fisher: str = "empirical",
    likelihood: Any = _CLASSES,
) -> dict[float, nn.Module]:
    """Fraction → network, of those in `scored`; the curvature is taken again before each shot."""
    held: Masks = {}
    found: dict[float, nn.Module] = {}
    for kept in path:
        curved = factors(net, data, fisher, likelihood)
        net = surgeon_round(net, curved, held, kept)
        if kept in scored:
            found[kept] = net
    return found


def factors(
    net: nn.Module,
    data: tuple[Tensor, Tensor],
    fisher: str,
    likelihood: Any = _CLASSES,
    batch_size: int = 256,
    only: Collection[str] | None = None,
) -> Curvature:
    """The Kronecker factors of the layers, without the diagonals of other parameters."""
    wanted = {n: p for n, p in net.named_parameters() if only is None or n in only}
    one = Pass(net, Loss(likelihood, {}), fisher, 1, wanted, True, False)
    for x, y in zip(data[0].split(batch_size), data[1].split(batch_size), strict=True):
        one.add(x, y)
    return one.result(len(data[0]), len(data[0]))
