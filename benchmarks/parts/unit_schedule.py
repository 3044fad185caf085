"""Reductions during a fit that prune units first and then weights, for `structured_pruning.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import pyro_bmr as bmr

# (layer, the layer that reads it, positions of a channel there)
Chain = tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class EveryUnit(bmr.Every):
    """`Every` over units, then weights: `size` is the target of the parameters after shrinking
    (None: the evidence decides), `kept` that of living weights.
    """

    chain: Chain = ()
    size: float | None = None

    def reduce(self, posterior: bmr.Posterior, done: float) -> bmr.Reduction:
        target = self.target(done)
        assert target is not None
        spikes = {
            n: s.spike_delta_f.nan_to_num(0.0)
            for n, s in bmr.reduce(posterior, self.to, threshold=math.inf).sites.items()
        }
        units = self._by_unit(spikes)
        alive = {
            layer: posterior[f"{layer}.weight"].kept.flatten(1).any(1) for layer, _, _ in self.chain
        }
        if self.size is not None:
            self._to_size(
                posterior, units, alive, replace(self, kept=self.size).target(done) or 0.0
            )
        else:
            alive = {
                layer: (a & (units[layer] <= 0)) if bool((a & (units[layer] <= 0)).any()) else a
                for layer, a in alive.items()
            }
        masks = dict(posterior.masks) or {
            name: torch.ones_like(spikes[name], dtype=torch.bool) for name in spikes
        }
        for layer, reader, positions in self.chain:
            for name in (f"{layer}.weight", f"{layer}.bias"):
                masks[name] = masks[name] & _rows(alive[layer], masks[name])
            read = alive[layer].repeat_interleave(positions)
            name = f"{reader}.weight"
            masks[name] = masks[name] & read.view(1, -1, *[1] * (masks[name].ndim - 2))
        alive_now = sum(int(m.sum()) for m in masks.values()) / sum(
            m.numel() for m in masks.values()
        )
        result = bmr.reduce(posterior.masked(masks), self.to, kept=min(target, alive_now))
        # that of units gone at this very reduction included
        everywhere = {n: replace(r, spike_delta_f=spikes[n]) for n, r in result.sites.items()}
        return bmr.Reduction(everywhere, result.posterior, posterior)

    def _by_unit(self, spikes: dict[str, Tensor]) -> dict[str, Tensor]:
        """ΔF of each unit; where a size is wanted, what reads the unit goes with it."""
        units = {
            layer: spikes[f"{layer}.weight"].flatten(1).sum(1) + spikes[f"{layer}.bias"]
            for layer, _, _ in self.chain
        }
        if self.size is not None:
            for layer, reader, positions in self.chain:
                read = (
                    spikes[f"{reader}.weight"].flatten(2).sum((0, 2))
                    if spikes[f"{reader}.weight"].ndim > 2
                    else spikes[f"{reader}.weight"].sum(0)
                )
                units[layer] = units[layer] + read.view(-1, positions).sum(1)
        return units

    def _to_size(
        self,
        posterior: bmr.Posterior,
        units: dict[str, Tensor],
        alive: dict[str, Tensor],
        target: float,
    ) -> None:
        total = sum(site.mean.numel() for site in posterior.sites.values())
        shapes = {
            layer: posterior[f"{layer}.weight"].mean.shape for layer in [*units, self.chain[-1][1]]
        }
        layers = list(shapes)
        while True:
            inputs = [
                shapes[layers[0]][1],
                *(int(alive[layer].sum()) * positions for layer, _, positions in self.chain),
            ]
            outputs = [*(int(alive[layer].sum()) for layer in units), shapes[layers[-1]][0]]
            kernels = [math.prod(shapes[layer][2:]) for layer in layers]
            if (
                sum(o * (i * k + 1) for i, o, k in zip(inputs, outputs, kernels, strict=True))
                <= target * total
            ):
                return
            best, where = -math.inf, ("", 0)
            for j, (layer, _, positions) in enumerate(self.chain):
                freed = inputs[j] * kernels[j] + 1 + outputs[j + 1] * kernels[j + 1] * positions
                score = (units[layer] / freed).masked_fill(~alive[layer], -math.inf)
                if outputs[j] > 1 and float(score.max()) > best:
                    best, where = float(score.max()), (layer, int(score.argmax()))
            alive[where[0]] = alive[where[0]].clone()
            alive[where[0]][where[1]] = False


def _rows(alive: Tensor, mask: Tensor) -> Tensor:
    return alive.view(-1, *[1] * (mask.ndim - 1))
