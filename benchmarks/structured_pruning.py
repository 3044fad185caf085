"""Networks that are really smaller: structured reductions of three LeNets on MNIST and
Fashion-MNIST, then shrunk, exported and timed.

    python benchmarks/structured_pruning.py
    python benchmarks/structured_pruning.py --only mlp --validation --seeds 1 --epochs 5

The first runs what is not yet in results/structured-pruning and prints the table of the results
page. The second runs one task on held-out training rows.

The ΔF of a unit (or channel) is the sum of the point spike's ΔF over its row of its layer and its
bias. Where a size is wanted (LeNet-5, LeNet), the weights that read the unit are counted with it,
and the units with the most nats per parameter are removed until the parameters left are the wanted
fraction; otherwise units whose ΔF is positive go. Then the weights with the largest ΔF follow until
the wanted fraction of weights is left.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.experiments.models import load_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.unit_schedule import Chain, EveryUnit

PAGE = Path("docs/results/structured_pruning.md")
LABELS = {
    "mlp": "LeNet-300-100, MNIST",
    "lenet_caffe": "LeNet-5, MNIST",
    "lenet_caffe_half": "LeNet-5 for half precision, MNIST",
    "lenet": "LeNet 6-16-120-84, Fashion-MNIST",
}


@dataclass(frozen=True)
class Task:
    """A network, its data, and the settings of its fit."""

    data: str
    model: str
    chain: Chain
    size: float | None
    kept: float
    temperature: float
    epochs: int
    learning_rate: float = 4e-3
    batch_size: int = 128
    estimator: str = "weight"


TASKS = {
    "mlp": Task("mnist", "mlp:300-100", (("1", "3", 1), ("3", "5", 1)), None, 0.0195, 0.2, 40),
    "lenet_caffe": Task(
        "mnist",
        "lenet_caffe",
        (("0", "2", 1), ("2", "5", 16), ("5", "7", 1)),
        0.0225,
        0.0145,
        0.07,
        20,
        2e-3,
    ),
    "lenet_caffe_half": Task(
        "mnist",
        "lenet_caffe",
        (("0", "2", 1), ("2", "5", 16), ("5", "7", 1)),
        0.045,
        0.0145,
        0.4,
        20,
    ),
    "lenet": Task(
        "fashion-mnist",
        "lenet",
        (("1", "4", 1), ("4", "8", 25), ("8", "10", 1), ("10", "12", 1)),
        0.148,
        0.148,
        0.1,
        15,
    ),
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
    schedule = EveryUnit(0.5, kept=task.kept, start=0.1, stop=0.7, chain=task.chain, size=task.size)
    fit = bmr.fit(
        program,
        (x, y),
        guide=partial(bmr.MeanField, estimator=task.estimator),
        epochs=task.epochs,
        batch_size=task.batch_size,
        optimizer=bmr.adam(task.learning_rate),
        temperature=task.temperature,
        seed=seed,
        reduce=schedule,
        progress=False,
    )
    net = bmr.export(fit.program, fit.posterior)
    mean = bmr.metrics.accuracy(bmr.predict(fit.program, fit.posterior, x_test).probs, y_test)
    units = {
        layer: int(fit.masks[f"{layer}.weight"].flatten(1).any(1).sum())
        for layer, _, _ in task.chain
    }
    figures = {
        "accuracy": accuracy(net, x_test, y_test),
        "accuracy of 32 draws": mean,
        "kept": float(fit.history["kept"].iloc[-1]),
        "units": units,
        "seconds": fit.seconds,
    }
    fit.posterior.save(folder / "posterior.safetensors")
    bmr.save(net, folder, {**vars(task), **figures, "seed": seed, "validation": validation})
    print(json.dumps({"task": task.model, "seed": seed, **figures}), flush=True)


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return bmr.metrics.accuracy(torch.cat([net(part) for part in x.split(2000)]).softmax(1), y)


def measured(task: Task, folder: Path) -> dict[str, float | str]:
    """The figures of a finished seed, and those of its shrunk network, deployed beside it."""
    report = json.loads((folder / "report.json").read_text())
    data = bmr.load(task.data)
    program = load_model(task.model)(data, bmr.Gaussian())
    net = program.net.eval()
    net.load_state_dict(load_file(folder / "model.safetensors"))
    x = data.x_test[:1000]
    plan = bmr.shrinking.shrink_plan(net, {}, x)
    small = plan.apply()
    with torch.no_grad():
        error = float((small(x) - net(x)).abs().max())
    assert error <= 1e-4, f"the shrunk network differs by {error}"
    told = {"before": net, "report": report, "seconds": 1.0}
    table = bmr.deploy(small, folder / "deployed", x, formats=("half", "program"), **told)
    table = table.set_index("format")
    (folder / "plan.txt").write_text(f"{plan}\n")
    before, after = table.loc["before"], table.loc["safetensors"]
    latency = {batch: f"ms at batch {batch}" for batch in (1, 128)}
    # as the file in half precision is read
    small.load_state_dict(
        {key: tensor.half().float() for key, tensor in small.state_dict().items()}
    )
    half = accuracy(small, data.x_test, data.y_test)
    return {
        "accuracy": report["accuracy"],
        "accuracy, half": half,
        "accuracy of 32 draws": report["accuracy of 32 draws"],
        "weights kept": float(after["nonzero"] / before["parameters"]),
        "parameters removed": 1 - float(after["parameters"] / before["parameters"]),
        "units": "-".join(str(layer.split("×")[0]) for layer in list(plan.layers["after"])[:-1]),
        "kB": float(after["bytes"]) / 1000,
        "kB, half": float(table.loc["half", "bytes"]) / 1000,
        "kB, dense": float(before["bytes"]) / 1000,
        "FLOPs": float(after["FLOPs"] / before["FLOPs"]),
        "largest difference": error,
        **{f"speed-up at {n}": float(before[at] / after[at]) for n, at in latency.items()},
        **{f"ms at {n}": float(after[at]) for n, at in latency.items()},
    }


def fill_page(rows: dict[str, list[dict[str, float | str]]]) -> None:
    """Writes the table of the results page: mean ± standard deviation over seeds; of a task without
    results here, the figures that it has.
    """
    digits = {
        "accuracy": 4,
        "accuracy, half": 4,
        "accuracy of 32 draws": 4,
        "weights kept": 4,
        "parameters removed": 4,
        "largest difference": 7,
        "FLOPs": 3,
        "ms at 1": 3,
        "ms at 128": 2,
    }
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split("<!-- table -->\n")
    old, after = rest.split("<!-- end of table -->")
    heads, _, *lines = [
        [word.strip() for word in line.split("|")[1:-1]] for line in old.strip().splitlines()
    ]
    figures = {label: {line[0]: line[k] for line in lines} for k, label in enumerate(heads) if k}
    for name, seeds in rows.items():
        figures[LABELS[name]] = {
            column: _cell([row[column] for row in seeds], digits.get(column, 1))
            for column in seeds[0]
        }
    shown = [label for label in LABELS.values() if label in figures]
    columns = list(dict.fromkeys(column for label in shown for column in figures[label]))
    table = ["| | " + " | ".join(shown) + " |", "|" + "---|" * (len(shown) + 1)]
    table += [
        "| " + " | ".join([column, *(figures[label].get(column, "") for label in shown)]) + " |"
        for column in columns
    ]
    PAGE.write_text(
        before + "\n".join(["<!-- table -->", *table, "<!-- end of table -->"]) + after,
        encoding="utf-8",
    )


def _cell(values: list[float | str], digits: int) -> str:
    if any(isinstance(value, str) for value in values):
        return ", ".join(map(str, values))
    numbers = torch.tensor(values, dtype=torch.float64)
    return f"{numbers.mean():.{digits}f}" + (
        f" ± {numbers.std():.{digits}f}" if len(values) > 1 else ""
    )


def finished(out: Path, seeds: int) -> dict[str, list[dict[str, float | str]]]:
    """Task → the figures of its seeds, if all of them are done."""
    folders = {name: [out / name / str(seed) for seed in range(seeds)] for name in TASKS}
    return {
        name: [measured(TASKS[name], seed) for seed in of_task]
        for name, of_task in folders.items()
        if all((seed / "report.json").exists() for seed in of_task)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--validation",
        action="store_true",
        help="fit on 5/6 of the training rows and score the rest",
    )
    parser.add_argument("--out", type=Path, default=Path("results/structured-pruning"))
    for name in ("kept", "size", "temperature", "learning_rate"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float)
    for name in ("epochs", "batch_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--estimator")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    changes = {
        field.name: value
        for field in fields(Task)
        if (value := getattr(arguments, field.name, None)) is not None
    }
    for name, task in TASKS.items():
        if arguments.only in (None, name):
            for seed in range(arguments.seeds):
                folder = arguments.out / name / str(seed)
                if not (folder / "report.json").exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    run(replace(task, **changes), seed, arguments.validation, folder)
    if not arguments.validation:
        fill_page(finished(arguments.out, arguments.seeds))


if __name__ == "__main__":
    main()
