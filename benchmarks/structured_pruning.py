"""Networks that are really smaller: structured reductions of three LeNets on MNIST and Fashion-MNIST, then shrunk, exported and timed.

    python benchmarks/structured_pruning.py            # what is not in results/structured-pruning yet, then the table of the results page
    python benchmarks/structured_pruning.py --only mlp --validation --seeds 1 --epochs 5    # one task on held-out training rows

The ΔF of a unit (or channel) is the sum of the point spike's ΔF over its row of its layer and its bias. In the task with a structured target the weights
that read the unit are counted with it, and the units with the most nats per parameter are removed until the parameters left are the wanted fraction;
in the other two the evidence removes units whose ΔF is positive, and the weights with the largest ΔF follow until the wanted fraction of weights is left.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

import pyro_bmr as bmr
from pyro_bmr.comparison import load_model

Chain = tuple[tuple[str, str, int], ...]  # (layer, the layer that reads it, positions of a channel there)


@dataclass(frozen=True)
class EveryUnit(bmr.Every):
    """`Every` over units: `kept` counts parameters after shrinking if `structured`, living weights otherwise."""

    chain: Chain = ()
    structured: bool = field(default=True, kw_only=True)

    def reduce(self, posterior: bmr.Posterior, done: float) -> bmr.Reduction:
        target = self.target(done)
        assert target is not None
        spikes = {n: s.spike_delta_f.nan_to_num(0.0) for n, s in bmr.reduce(posterior, self.to, threshold=math.inf).sites.items()}
        units = {layer: (spikes[f"{layer}.weight"].flatten(1).sum(1) + spikes[f"{layer}.bias"]) for layer, _, _ in self.chain}
        if self.structured:  # what reads the unit goes with it
            for layer, reader, positions in self.chain:
                read = spikes[f"{reader}.weight"].flatten(2).sum((0, 2)) if spikes[f"{reader}.weight"].ndim > 2 else spikes[f"{reader}.weight"].sum(0)
                units[layer] = units[layer] + read.view(-1, positions).sum(1)
        alive = {layer: posterior[f"{layer}.weight"].alive.flatten(1).any(1) for layer, _, _ in self.chain}
        if self.structured:
            self._to_size(posterior, units, alive, target)
        else:
            alive = {layer: (a & (units[layer] <= 0)) if bool((a & (units[layer] <= 0)).any()) else a for layer, a in alive.items()}
        masks = dict(posterior.masks) or {name: torch.ones_like(spikes[name], dtype=torch.bool) for name in spikes}
        for layer, reader, positions in self.chain:
            for name in (f"{layer}.weight", f"{layer}.bias"):
                masks[name] = masks[name] & _rows(alive[layer], masks[name])
            read = alive[layer].repeat_interleave(positions)
            name = f"{reader}.weight"
            masks[name] = masks[name] & read.view(1, -1, *[1] * (masks[name].ndim - 2))
        if self.structured:
            reduction = bmr.reduce(posterior, self.to, threshold=math.inf)
            sites = {n: replace(r, site=posterior.masked(masks)[n]) for n, r in reduction.sites.items()}
            return bmr.Reduction(sites, posterior.masked(masks))
        alive_now = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
        result = bmr.reduce(posterior.masked(masks), self.to, kept=min(target, alive_now))
        everywhere = {n: replace(r, spike_delta_f=spikes[n]) for n, r in result.sites.items()}  # that of units gone at this very reduction included
        return bmr.Reduction(everywhere, result.posterior)

    def _to_size(self, posterior: bmr.Posterior, units: dict[str, Tensor], alive: dict[str, Tensor], target: float) -> None:
        total = sum(site.mean.numel() for site in posterior.sites.values())
        shapes = {layer: posterior[f"{layer}.weight"].mean.shape for layer in [*units, self.chain[-1][1]]}
        layers = list(shapes)
        while True:
            inputs = [shapes[layers[0]][1], *(int(alive[layer].sum()) * positions for layer, _, positions in self.chain)]
            outputs = [*(int(alive[layer].sum()) for layer in units), shapes[layers[-1]][0]]
            kernels = [math.prod(shapes[layer][2:]) for layer in layers]
            if sum(o * (i * k + 1) for i, o, k in zip(inputs, outputs, kernels, strict=True)) <= target * total:
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


@dataclass(frozen=True)
class Task:
    """A network, its data, and the settings of its fit."""

    data: str
    model: str
    chain: Chain
    structured: bool
    kept: float
    temperature: float
    epochs: int
    learning_rate: float = 4e-3
    batch_size: int = 128


TASKS = {
    "mlp": Task("mnist", "mlp:300-100", (("1", "3", 1), ("3", "5", 1)), False, 0.0195, 0.07, 20),
    "lenet_caffe": Task("mnist", "lenet_caffe", (("0", "2", 1), ("2", "5", 16), ("5", "7", 1)), False, 0.0145, 0.07, 10),
    "lenet": Task("fashion-mnist", "lenet", (("1", "4", 1), ("4", "8", 25), ("8", "10", 1), ("10", "12", 1)), True, 0.148, 0.1, 15),
}


def run(task: Task, seed: int, validation: bool, folder: Path) -> None:
    """Fits one seed and saves its posterior, its network and its figures."""
    data = bmr.load(task.data)
    x, y, x_test, y_test = data.x_train, data.y_train, data.x_test, data.y_test
    if validation:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        held, rest = order[: len(x) // 6], order[len(x) // 6 :]
        x, y, x_test, y_test = x[rest], y[rest], x[held], y[held]
    torch.manual_seed(seed)
    program = load_model(task.model)(data, bmr.Gaussian())
    schedule = EveryUnit(0.5, kept=task.kept, start=0.1, stop=0.7, chain=task.chain, structured=task.structured)
    fit = bmr.fit(
        program,
        (x, y),
        epochs=task.epochs,
        batch_size=task.batch_size,
        optimizer=bmr.adam(task.learning_rate),
        temperature=task.temperature,
        seed=seed,
        reduce=schedule,
        progress=False,
    )
    net = bmr.export(fit.program, fit.posterior)
    with torch.no_grad():
        accuracy = bmr.metrics.accuracy(torch.cat([net(part) for part in x_test.split(2000)]).softmax(1), y_test)
    mean = bmr.metrics.accuracy(bmr.predict(fit.program, fit.posterior, x_test).probs, y_test)
    units = {layer: int(fit.masks[f"{layer}.weight"].flatten(1).any(1).sum()) for layer, _, _ in task.chain}
    figures = {"accuracy": accuracy, "accuracy of 32 draws": mean, "kept": float(fit.history["kept"].iloc[-1]), "units": units, "seconds": fit.seconds}
    fit.posterior.save(folder / "posterior.safetensors")
    bmr.save(net, folder, {**vars(task), **figures, "seed": seed, "validation": validation})
    print(json.dumps({"task": task.model, "seed": seed, **figures}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validation", action="store_true", help="fit on 5/6 of the training rows and score the rest")
    parser.add_argument("--out", type=Path, default=Path("results/structured-pruning"))
    for name in ("kept", "temperature", "learning_rate"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float)
    parser.add_argument("--epochs", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    changes = {name: getattr(arguments, name) for name in ("kept", "temperature", "learning_rate", "epochs") if getattr(arguments, name) is not None}
    for name, task in TASKS.items():
        if arguments.only in (None, name):
            for seed in range(arguments.seeds):
                folder = arguments.out / name / str(seed)
                if not (folder / "report.json").exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    run(replace(task, **changes), seed, arguments.validation, folder)


if __name__ == "__main__":
    main()
