"""A network trained in plain torch, pruned by the evidence of a Laplace posterior, against
magnitude: `python benchmarks/laplace_pruning.py`.

Fashion-MNIST, 784-300-100-10, no training after pruning. One pass over the training rows gives the
diagonal of the Gauss–Newton matrix; a second or less gives every mask. With --validation, the
scores are those of 10,000 training rows held out (for choosing settings); without it, the network
is trained on all rows and the test rows are scored.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.models.mlp import network

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.pages import fill, table

Pair = tuple[Tensor, Tensor]
FRACTIONS = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05)


def train(
    x: Tensor, y: Tensor, seed: int, epochs: int, learning_rate: float, weight_decay: float
) -> nn.Module:
    torch.manual_seed(seed)
    net = network(x[0].numel(), (300, 100), 10)
    optimiser = torch.optim.Adam(
        net.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser, T_max=epochs * -(-len(x) // 128)
    )
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[index]), y[index]).backward()
            optimiser.step()
            schedule.step()
    return net.eval()


def diagonal_curvature(net: nn.Module, x: Tensor, y: Tensor, kind: str) -> dict[str, Tensor]:
    """Parameter → Σ over rows of the squared gradient of that row's −log p(y|x): of the labels
    ("empirical"), or of each class weighted with its probability ("exact": the Gauss–Newton matrix
    of the softmax). For a linear layer the square of a gradient δaᵀ is δ² (a²)ᵀ, so the sum is a
    matrix product.
    """
    layers = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        m.register_forward_hook(lambda m, i, o, name=name: seen.update({name: (i[0].detach(), o)}))
        for name, m in layers.items()
    ]
    for rows in torch.arange(len(x)).split(1000):
        logits = net(x[rows])
        probs = logits.softmax(1).detach()
        targets = (
            [(y[rows], torch.ones(len(rows)))]
            if kind == "empirical"
            else [(torch.full_like(y[rows], c), probs[:, c]) for c in range(probs.shape[1])]
        )
        for target, weight in targets:
            residual = (probs - nn.functional.one_hot(target, probs.shape[1])) * weight.sqrt()[
                :, None
            ]
            deltas = torch.autograd.grad(
                logits, [output for _, output in seen.values()], residual, retain_graph=True
            )
            for (name, (inputs, _)), delta in zip(seen.items(), deltas, strict=True):
                square = delta.square()
                total[f"{name}.weight"] += square.mT @ inputs.square()
                total[f"{name}.bias"] += square.sum(0)
    for hook in hooks:
        hook.remove()
    return total


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((net(x).argmax(1) == y).double().mean())


def magnitude(net: nn.Module, posterior: bmr.Posterior, kept: float) -> nn.Module:
    """Of all parameters those of the largest size are left (Han et al. 2015), over all layers
    together.
    """
    sizes = torch.cat([site.mean.abs().flatten() for site in posterior.sites.values()])
    limit = sizes.kthvalue(len(sizes) - round(kept * len(sizes))).values
    return bmr.export(
        net,
        posterior.masked({name: site.mean.abs() > limit for name, site in posterior.sites.items()}),
    )


def rows_of(
    seed: int, train_rows: Pair, scored: Pair, settings: argparse.Namespace
) -> list[dict[str, float | str]]:
    """Kept fraction and accuracy of each rule at each size, and of the whole network."""
    net = train(*train_rows, seed, settings.epochs, settings.learning_rate, settings.weight_decay)
    start = time.perf_counter()
    curvature = diagonal_curvature(net, *train_rows, settings.curvature)
    passed = time.perf_counter()
    trained = {name: p.detach() for name, p in net.named_parameters()}
    posterior = bmr.Posterior.from_curvature(
        trained, curvature, bmr.Gaussian(settings.prior_scale), temperature=settings.temperature
    )
    spike = bmr.Gaussian(0)
    nets = {k: bmr.export(net, bmr.reduce(posterior, spike, kept=k).posterior) for k in FRACTIONS}
    seconds = {
        "curvature_seconds": passed - start,
        "reduction_seconds": (time.perf_counter() - passed) / len(FRACTIONS),
    }
    evidence = bmr.reduce(posterior, to=spike)
    nets[evidence.kept] = bmr.export(net, evidence.posterior)
    bare = bmr.Posterior.from_moments(trained, {name: torch.zeros(()) for name in trained}, None)
    compared = [("unpruned", 1.0, net)]
    for kept, pruned in nets.items():
        own = kept == evidence.kept
        compared += [
            ("evidence decides" if own else "evidence", kept, pruned),
            ("magnitude, as many" if own else "magnitude", kept, magnitude(net, bare, kept)),
        ]
    return [
        {"seed": seed, "target": target, "rule": rule, "kept": fraction(one)}
        | {"accuracy": accuracy(one, *scored), **seconds}
        for rule, target, one in compared
    ]


def show(results: pd.DataFrame) -> None:
    """Prints means and standard deviations over the seeds."""
    sized = results["rule"].isin(["evidence", "magnitude"])
    wide = results[sized].groupby(["target", "rule"])["accuracy"].agg(["mean", "std"])
    print(wide.unstack("rule").sort_index(ascending=False).to_string(float_format="%.4f"))
    rest = results[~sized].groupby("rule")[["kept", "accuracy"]].agg(["mean", "std"])
    print(rest.to_string(float_format="%.4f"))
    print(results[["curvature_seconds", "reduction_seconds"]].mean().to_string())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--prior-scale", type=float, default=0.04)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--curvature", choices=("exact", "empirical"), default="exact")
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("results/laplace-pruning"))
    parser.add_argument(
        "--page",
        type=Path,
        help="a page whose table to fill, such as docs/results/laplace_pruning.md",
    )
    return parser.parse_args()


def main() -> None:
    settings = arguments()
    torch.set_num_threads(1)
    data = bmr.load("fashion-mnist")
    x, y, x_score, y_score = data.x_train, data.y_train, data.x_test, data.y_test
    if settings.validation:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        held, rest = order[:10_000], order[10_000:]
        x, y, x_score, y_score = x[rest], y[rest], x[held], y[held]
    rows: list[dict[str, float | str]] = []
    for seed in range(settings.seeds):
        rows += rows_of(seed, (x, y), (x_score, y_score), settings)
        settings.out.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(settings.out / "results.csv", index=False)
    (settings.out / "settings.json").write_text(
        json.dumps({k: str(v) for k, v in vars(settings).items()}, indent=1)
    )
    results = pd.DataFrame(rows)
    show(results)
    if not settings.validation and settings.page:
        write_page(settings.page, results)


def write_page(page: Path, results: pd.DataFrame) -> None:
    """The table between the marks of the page."""
    rows = []
    for kept in FRACTIONS:
        at = results[results["target"] == kept].set_index("seed")
        both = [at[at["rule"] == rule]["accuracy"] for rule in ("evidence", "magnitude")]
        gap = ", ".join(f"{100 * value:+.1f}" for value in both[0] - both[1])
        accuracies = [f"{a.mean():.3f} ± {a.std():.3f}" for a in both]
        rows.append([f"{kept:.0%}", *accuracies, f"{gap} points"])
    whole = results[results["rule"] == "unpruned"]["accuracy"]
    seconds = results.groupby("seed")[["curvature_seconds", "reduction_seconds"]].first().mean()
    note = (
        f"Unpruned: {whole.mean():.3f} ± {whole.std():.3f}. Curvature: {seconds.iloc[0]:.1f} s; one"
        f" reduction: {seconds.iloc[1]:.2f} s (one busy thread)."
    )
    head = ["kept", "evidence", "magnitude", "difference per seed"]
    fill(page, [*table(head, rows), "", note])


def fraction(net: nn.Module) -> float:
    parameters = list(net.parameters())
    return sum(int(p.count_nonzero()) for p in parameters) / sum(p.numel() for p in parameters)


if __name__ == "__main__":
    main()
