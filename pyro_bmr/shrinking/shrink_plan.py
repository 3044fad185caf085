"""What would be removed from a network, as a table that can be applied.

Owns `ShrinkPlan`. Next: `plan.py`.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_bmr.data.given import example_of
from pyro_bmr.data.inputs import device_of, of_each
from pyro_bmr.shrinking.latency import milliseconds

if TYPE_CHECKING:
    import pandas as pd

_TURNS = 4  # of the two networks whose latencies are measured


@dataclass(frozen=True)
class ShrinkPlan:
    """What would be removed from a network, before anything is: print it, then `apply()`.

    `layers`: one row for each layer with weights: layer, type, before and after (the shape of its
    weight), parameters and FLOPs per row of the input, each before and after. FLOPs count a
    multiplication and an addition as two, and only layers that weight their inputs. `kept`: layer →
    why channels of it are kept that could otherwise be pruned. `unread_inputs`: flat indices,
    within one row of the input, that the smaller network does not read; those of several inputs
    follow one another. `parameters` and `flops`: of the whole network, before and after.
    `own_class`: whether the smaller network is of the class of the original; else it is the graph
    of its operations as an `fx.GraphModule`, for the reason `why_a_graph`. `config`: the entries
    that were changed in the configuration of a Hugging Face model; None if no configuration has its
    sizes, since layers differ: `from_pretrained` then cannot load it.
    """

    layers: pd.DataFrame
    kept: Mapping[str, str]
    unread_inputs: Tensor
    parameters: tuple[int, int]
    flops: tuple[int, int]
    own_class: bool
    why_a_graph: str
    config: Mapping[str, int] | None
    _small: nn.Module
    _masked: nn.Module

    def __str__(self) -> str:
        (before, after), (flops, fewer) = self.parameters, self.flops
        form = type(self._small).__name__ if self.own_class else "a graph of operations"
        why = f" ({self.why_a_graph})" if self.why_a_graph else ""
        lines = [
            self.layers.to_string(index=False),
            f"parameters {before:,} → {after:,} ({1 - after / max(before, 1):.1%} removed)",
            f"FLOPs {flops:,} → {fewer:,} ({1 - fewer / max(flops, 1):.1%} removed)",
            f"result: {form}{why}",
        ]
        if self.config is None:
            lines.append("no configuration has these sizes: from_pretrained cannot load it")
        elif self.config:
            entries = ", ".join(f"{key} = {value}" for key, value in self.config.items())
            lines.append(f"configuration: {entries}")
        lines += [f"kept: {name}: {why}" for name, why in self.kept.items()]
        if len(self.unread_inputs):
            lines.append(f"inputs no longer read: {len(self.unread_inputs)}")
        return "\n".join(lines)

    @torch.no_grad()
    def apply(self) -> nn.Module:
        """The smaller network, in evaluation mode.

        It is of the class of the original, with smaller tensors, if that computes the same
        (`own_class`); else an `fx.GraphModule`, whose tensors have the names of the original's.
        """
        return copy.deepcopy(self._small)

    def latency(
        self, example: Any, batches: Sequence[int] = (1, 32), seconds: float = 0.3
    ) -> pd.DataFrame:
        """The time of one call before and after: one row for each of `batches`, with the median in
        milliseconds of the masked and of the smaller network, on one thread, and their ratio.

        The two take turns. `example`: rows of the input, as in `shrink_plan`; `seconds`: for each
        network and batch.
        """
        import pandas as pd

        example = example_of(example, self._masked)
        rows, tensors = [], (*self._masked.parameters(), *self._masked.buffers())
        where = next((t.device for t in tensors), device_of(example))
        example = of_each(lambda t: t.to(where), example)
        for batch in batches:
            turns = [
                [
                    milliseconds(n, example, batch, seconds / _TURNS)
                    for n in (self._masked, self._small)
                ]
                for _ in range(_TURNS)
            ]
            before, after = (
                statistics.median(t for turn in turns for t in turn[k]) for k in (0, 1)
            )
            row = {"batch": batch, "ms before": before, "ms after": after, "ratio": after / before}
            rows.append(row)
        return pd.DataFrame(rows)
