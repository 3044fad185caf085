r"""The rounds in which a trained network is pruned.

Owns `Settings` and `Rounds`. Next: `prune.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmr.curvatures.factors import Curvature
from pyro_bmr.errors import ModelError, warn
from pyro_bmr.isolation import seed_generators, seed_of
from pyro_bmr.post_training.calibration import Calibration
from pyro_bmr.post_training.corrections import corrected
from pyro_bmr.post_training.groups import FEW, groups_of, warn_of_others
from pyro_bmr.post_training.layer import Layer, Precisions, layers_of, precisions, prior_scale
from pyro_bmr.post_training.masks import pruned_at
from pyro_bmr.post_training.measure import Measure, curvature_at, write
from pyro_bmr.post_training.pruned import Pruned, reduction_of
from pyro_bmr.post_training.rounds_file import about_call, read_round, write_round
from pyro_bmr.reduction.attention_heads import Heads
from pyro_bmr.reduction.groups import NofM

FAR = 1e-3  # nats per row: nearer to the dense network, nothing is said of steps


@dataclass(frozen=True)
class Settings:
    """The arguments of `prune` that its rounds need. `sizes`: the fraction of each round; `frozen`:
    parameters that are not pruned; `still`: those that the steps do not move.
    """

    sizes: tuple[float, ...]
    pattern: NofM | None
    per: str | Heads | Mapping[str, Tensor]
    heads: int | Mapping[str, int] | None
    only: tuple[str, ...]
    corrections: int
    last_corrections: int
    rate: float
    temperature: float
    scale: float | str | None
    floor: float
    most_rise: float | None
    seed: int
    frozen: tuple[str, ...] = ()
    still: tuple[str, ...] = ()


@dataclass
class Rounds:
    """A network as it is pruned, in place.

    `held`: weight → the entries of its layer's matrix that are zero. `gains`, `rises`: weight → its
    ΔF, nats, and what the loss was predicted to rise by for it, nats per row. `wanted`, `moved`:
    the weights that may be pruned, with their biases, and what the steps move. `labels`, `factors`:
    the groups that are pruned whole, and the curvature that their evidence needs, else None.
    """

    measure: Measure
    net: nn.Module
    settings: Settings
    held_out: Calibration | None
    after_round: Callable[[float, nn.Module], None] | None = None
    held: dict[str, Tensor] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    rises: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)
    wanted: dict[str, nn.Parameter] = field(default_factory=dict)
    moved: dict[str, nn.Parameter] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    divergence: float = 0.0
    labels: Mapping[str, Tensor] | None = None
    factors: Curvature | None = None

    def run(self, folder: Path | None) -> Pruned:
        """All rounds, or those until the loss has risen too much."""
        ranks = self.measure.ranks
        arguments = vars(self.settings) | self.measure.about(read=folder is not None)
        about = about_call(dict(self.net.named_parameters()), arguments)
        ranks.check_same(
            about, "calls prune with another network or other arguments than process 0"
        )
        layers = self._begin()
        first, stopped = layers, None
        if folder is not None and self._resume(folder, about):
            layers = self._layers(self._curvature(len(self.rounds)))
        held_out = self.held_out
        base = None if held_out is None else self.measure.loss_on(held_out, self.measure.dense)
        for number, size in enumerate(self.settings.sizes):
            if number < len(self.rounds):
                continue
            before = self._state(), layers
            layers = self._corrected(self._holding(layers, size), number)
            self._note(size, base)
            if stopped := self._too_much():
                self._restore(before[0])
                layers = before[1]
                break
            if self.after_round is not None:
                self.after_round(size, self.net)
            if folder is not None and ranks.rank == 0:
                write_round(folder, about, *self._state())
        gains = dict(self.gains)
        rows = self.measure.rows.size
        reduction = reduction_of(first, layers, gains, self.settings.temperature, rows)
        rises, rounds = dict(self.rises), tuple(self.rounds)
        return Pruned(self.net, reduction, rounds, rises, layers, stopped)

    def _begin(self) -> dict[str, Layer]:
        """The layers of the dense network; which they are, and what the groups are."""
        named = {
            name: p
            for name, p in self.net.named_parameters()
            if p.is_floating_point() and name not in self.settings.frozen
        }
        self.wanted = named
        found = self._curvature(0)
        patterns = self.settings.only or ("*",)
        names = [
            name
            for name, layer in found.layers.items()
            if layer.inputs.ndim == 2 and any(fnmatchcase(name, each) for each in patterns)
        ]
        if not names:
            raise ModelError(
                f"prune: expected layers with Kronecker factors, got none; {', '.join(named)} are"
                " used in other ways, or left out by only="
            )
        # embeddings, which have factors, stay whole as in other methods
        others = {name: p for name, p in named.items() if name not in found.layers}
        warn_of_others(others, {name: named[name] for name in names}, patterns)
        biases = [found.layers[name].bias for name in names]
        self.wanted = {name: named[name] for name in (*names, *biases) if name is not None}
        self.moved = {
            name: p
            for name, p in self.net.named_parameters()
            if name in self.wanted or (p.is_floating_point() and name not in self.settings.still)
        }
        for name in names:
            self.scales[name] = prior_scale(
                found.layers[name], named, self.settings.scale, self.settings.temperature
            )
            self.gains[name] = self.rises[name] = 0.0
        self.labels = groups_of(
            self.net,
            {name: tuple(named[name].shape) for name in names},
            self.settings.per,
            self.settings.heads,
            self.settings.frozen,
        )
        return self._with_zeros(self._layers(found))

    def _with_zeros(self, layers: dict[str, Layer]) -> dict[str, Layer]:
        """The layers with the entries held that are zero in the network already, such as those
        under a mask of `torch.nn.utils.prune`.
        """
        parameters = dict(self.net.named_parameters())
        self.held = {n: layer.with_held(parameters[n].detach() == 0) for n, layer in layers.items()}
        for name, layer in layers.items():
            if layer.bias is not None and bool((bias := parameters[layer.bias].detach()).any()):
                self.held[name][:, -1] = bias == 0
        zeros, kept = self._pruned_fraction(), self.settings.sizes[-1]
        if zeros > FEW and 1 - zeros < kept:
            warn(
                f"prune: {zeros:.1%} of the weights are zero already and stay so, which is more"
                f" than kept={kept:g} asks for"
            )
        return {name: replace(layer, held=self.held[name]) for name, layer in layers.items()}

    def _curvature(self, done: int) -> Curvature:
        """At the weights after so many rounds, with targets drawn alike in a call that resumes."""
        seed_generators(seed_of(self.settings.seed + done, self.measure.ranks.rank))
        return curvature_at(self.measure, self.net, self.wanted)

    def _layers(self, found: Curvature) -> dict[str, Layer]:
        parameters = dict(self.net.named_parameters())
        temperature = self.settings.temperature
        ranks = self.measure.ranks
        if self.labels is not None:
            self.factors = found
        return layers_of(found, parameters, self.scales, self.held, temperature, ranks)

    def _inverse(self, layer: Layer) -> Precisions:
        assert self.factors is not None
        return precisions(self.factors.layers[layer.name], layer.scale, self.settings.temperature)

    def _holding(self, layers: Mapping[str, Layer], size: float) -> dict[str, Layer]:
        """The layers with more entries held at zero, and the network with their means."""
        settings = self.settings
        pruned = pruned_at(
            layers, size, settings.floor, self.labels, settings.pattern, self._inverse
        )

        def held_of(name: str) -> list[Tensor]:
            after, gain, energy = layers[name].holding(pruned[name])
            return [after.mean, torch.tensor([gain, energy], dtype=torch.float64)]

        costs = {name: layer.cost for name, layer in layers.items()}
        found, out = self.measure.ranks.shared_out(costs, held_of), {}
        for name, layer in layers.items():
            (mean, numbers), held = found[name], layer.with_held(pruned[name])
            gain, energy = numbers.tolist()
            out[name], self.held[name] = replace(layer, mean=mean, held=held), held
            self.gains[name] += gain
            self.rises[name] += settings.temperature * energy / self.measure.rows.size
            write(self.net, out[name].values())
        return out

    def _corrected(self, layers: dict[str, Layer], number: int) -> dict[str, Layer]:
        """The layers after the steps of the round of that number."""
        settings = self.settings
        is_last = number == len(settings.sizes) - 1
        steps = settings.last_corrections if is_last else settings.corrections
        if steps:
            given = self.measure, self.net, layers, self.moved
            found = corrected(*given, steps, settings.rate, settings.seed + number)
            self.divergence = found.divergence
            if is_last and not found.nearer and found.divergence / self.measure.rows.size > FAR:
                warn(
                    f"prune: no steps after the last round, at rate={settings.rate:g} and less,"
                    " brought the outputs nearer to those of the dense network; give more rows=, a"
                    " lower rate=, or corrections=0"
                )
        else:
            self.divergence = self.measure.divergence(self.net)
        return layers if is_last and not steps else self._layers(self._curvature(number + 1))

    def _note(self, size: float, base: float | None) -> None:
        """Adds the row of a round."""
        row = {
            "kept": 1 - self._pruned_fraction(),
            "delta_f": sum(self.gains.values()),
            "predicted_rise": sum(self.rises.values()),
            "divergence": self.divergence / self.measure.rows.size,
        }
        if base is not None and self.held_out is not None:
            row["held_out_rise"] = self.measure.loss_on(self.held_out, self.net) - base
        self.rounds.append(row)
        self.measure.bar.set_postfix(kept=f"{size:.3g}", divergence=f"{row['divergence']:.3g}")

    def _pruned_fraction(self) -> float:
        parameters = dict(self.net.named_parameters())
        gone = sum(
            int(held[:, : parameters[name].numel() // len(held)].count_nonzero())
            for name, held in self.held.items()
        )
        return gone / sum(parameters[name].numel() for name in self.held)

    def _too_much(self) -> str | None:
        """Why the last round is not kept, if it is not."""
        limit, row = self.settings.most_rise, self.rounds[-1]
        name = "held_out_rise" if "held_out_rise" in row else "divergence"
        if limit is None or row[name] <= limit:
            return None
        rise = name.replace("_", " ")
        return (
            f"at {row['kept']:.1%} kept the {rise} is {row[name]:.3g} nats per row, more than"
            f" {limit:g}"
        )

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"value {name}": p.detach().clone() for name, p in self.moved.items()}
        tensors |= {f"held {name}": held.clone() for name, held in self.held.items()}
        numbers = {"gains": self.gains, "rises": self.rises, "rounds": self.rounds}
        return tensors, copy.deepcopy(numbers)

    def _restore(self, state: tuple[Mapping[str, Tensor], Mapping[str, Any]]) -> None:
        tensors, numbers = state
        for name, parameter in self.moved.items():
            parameter.data.copy_(tensors[f"value {name}"])
        self.held = {
            name: tensors[f"held {name}"] for name in self.gains if f"held {name}" in tensors
        }
        self.gains, self.rises = dict(numbers["gains"]), dict(numbers["rises"])
        self.rounds = list(numbers["rounds"])

    def _resume(self, folder: Path, about: str) -> bool:
        """Whether there was a state to continue from."""
        found = read_round(folder, about)
        self.measure.ranks.check_same(
            found is None or len(found[1]["rounds"]),
            f"sees another state in checkpoint='{folder}' than process 0; give a folder that all of"
            " them see",
        )
        if found is None:
            return False
        device = next(iter(self.wanted.values())).device
        self._restore(({name: t.to(device) for name, t in found[0].items()}, found[1]))
        return True
