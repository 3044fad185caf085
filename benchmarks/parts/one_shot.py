"""Baselines that prune a trained network without training it, in plain torch: magnitude, Wanda (Sun
et al. 2023), SparseGPT (Frantar & Alistarh 2023), optimal brain compression (Frantar & Alistarh
2022), and the rule of The LLM Surgeon (van der Ouderaa et al. 2024). All read the factors that the
library collects (`factors`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.curvatures import Curvature
from pyro_bmr.curvatures.passes import Pass
from pyro_bmr.curvatures.scores import Loss
from pyro_bmr.formulas import held_at_zero
from pyro_bmr.post_training.layer import layers_of

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.parts.obc import obc_layer, removal_order

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


def obc_orders(net: nn.Module, found: Curvature) -> dict[str, Tensor]:
    """Name → the order in which the entries of each row go."""
    return {
        name: removal_order(net.get_parameter(name).detach().flatten(1), _inputs(found, name))
        for name in weights_of(found)
    }


def obc(
    net: nn.Module,
    found: Curvature,
    orders: Mapping[str, Tensor],
    kept: float | Mapping[str, float],
) -> nn.Module:
    """Optimal brain compression: the rows of a layer share its size, and each makes up by itself
    for what goes.
    """
    out = copy.deepcopy(net)
    for name, order in orders.items():
        weight = out.get_parameter(name)
        fraction = kept[name] if isinstance(kept, Mapping) else kept
        pruned = obc_layer(weight.detach().flatten(1), _inputs(found, name), order, fraction)
        weight.data.copy_(pruned.view(weight.shape))
    return out


@dataclass(frozen=True)
class Surgeon:
    """The rule of The LLM Surgeon, and what differs from it.

    `fisher`: "empirical" in the publication, or "true". `whole`: the weights that stay move by the
    correlations of the whole layer, or else by those of their row. `scales`: weight → s of the
    prior that damps the curvature at the `temperature`; else 1 % of the mean diagonal.
    """

    fisher: str = "empirical"
    whole: bool = True
    scales: Mapping[str, float] | None = None
    temperature: float = 1.0

    def path(
        self,
        net: nn.Module,
        data: tuple[Tensor, Tensor],
        path: Sequence[float],
        scored: Sequence[float],
        likelihood: Any = _CLASSES,
    ) -> dict[float, nn.Module]:
        """Fraction → network, of those in `scored`; the curvature is taken again before each
        shot.
        """
        held: Masks = {}
        found: dict[float, nn.Module] = {}
        for kept in path:
            net = self.next(net, data, held, kept, likelihood)
            if kept in scored:
                found[kept] = net
        return found

    def next(
        self,
        net: nn.Module,
        data: tuple[Tensor, Tensor],
        held: Masks,
        kept: float,
        likelihood: Any = _CLASSES,
    ) -> nn.Module:
        """The network after one shot with its own curvature."""
        return self.shot(net, factors(net, data, self.fisher, likelihood), held, kept)

    def shot(self, net: nn.Module, found: Curvature, held: Masks, kept: float) -> nn.Module:
        """The least ½ w²/[F⁻¹] of all layers go, and the others of their layer move, with F the
        damped Kronecker curvature. `held` is brought up to date.
        """
        out, scores, parts = copy.deepcopy(net), {}, {}
        covariances = self._covariances(net, found)
        for name, (rows, columns) in covariances.items():
            layer = found.layers[name]
            w = net.get_parameter(name).detach().flatten(1)
            if layer.bias is not None:
                w = torch.cat([w, net.get_parameter(layer.bias).detach()[:, None]], 1)
            width = w.shape[1] - (layer.bias is not None)
            cost = 0.5 * w.square() / (rows.diagonal()[:, None] * columns.diagonal())
            before = held.setdefault(name, torch.zeros_like(w, dtype=torch.bool))
            scores[name] = cost[:, :width].masked_fill(before[:, :width], -torch.inf)
            parts[name] = w, width
        masks = by_scores(scores, kept, uniform=False)
        for name, (w, width) in parts.items():
            held[name][:, :width] = ~masks[name]
            rows, columns = covariances[name]
            if not self.whole:
                rows = rows.diagonal().diag()
            mean = held_at_zero(w, rows, columns, held[name], tolerance=1e-3).mean
            parameter, layer = out.get_parameter(name), found.layers[name]
            parameter.data.copy_(mean[:, :width].reshape(parameter.shape))
            if layer.bias is not None:
                out.get_parameter(layer.bias).data.copy_(mean[:, -1])
        return out

    def _covariances(self, net: nn.Module, found: Curvature) -> dict[str, tuple[Tensor, Tensor]]:
        if self.scales is None:
            return {
                name: (
                    _damped_inverse(found.layers[name].outputs),
                    _damped_inverse(found.layers[name].inputs),
                )
                for name in weights_of(found)
            }
        layers = layers_of(found, dict(net.named_parameters()), self.scales, {}, self.temperature)
        return {name: (layer.row_cov, layer.col_cov) for name, layer in layers.items()}


def _damped_inverse(factor: Tensor) -> Tensor:
    ridge = SURGEON_DAMPING * factor.diagonal().mean() + 1e-12
    return torch.cholesky_inverse(
        torch.linalg.cholesky(factor.double() + ridge * torch.eye(len(factor)).double())
    ).to(factor.dtype)


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
