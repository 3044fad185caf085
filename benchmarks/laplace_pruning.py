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
import time
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.models.mlp import network

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


def main() -> None:
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
    settings = parser.parse_args()
    torch.set_num_threads(1)
    data = bmr.load("fashion-mnist")
    x, y, x_score, y_score = data.x_train, data.y_train, data.x_test, data.y_test
    if settings.validation:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y, x_score, y_score = (
            x[order[10_000:]],
            y[order[10_000:]],
            x[order[:10_000]],
            y[order[:10_000]],
        )
    rows = []
    for seed in range(settings.seeds):
        net = train(x, y, seed, settings.epochs, settings.learning_rate, settings.weight_decay)
        start = time.perf_counter()
        curvature = diagonal_curvature(net, x, y, settings.curvature)
        passed = time.perf_counter()
        trained = {name: p.detach() for name, p in net.named_parameters()}
        posterior = bmr.Posterior.from_curvature(
            trained, curvature, bmr.Gaussian(settings.prior_scale), temperature=settings.temperature
        )
        nets = {
            kept: bmr.export(net, bmr.reduce(posterior, to=bmr.Gaussian(0), kept=kept).posterior)
            for kept in FRACTIONS
        }
        seconds = {
            "curvature_seconds": passed - start,
            "reduction_seconds": (time.perf_counter() - passed) / len(FRACTIONS),
        }
        evidence = bmr.reduce(posterior, to=bmr.Gaussian(0))
        nets[evidence.kept] = bmr.export(net, evidence.posterior)
        bare = bmr.Posterior.from_moments(
            trained, {name: torch.zeros(()) for name in trained}, None
        )
        for kept, pruned in nets.items():
            rule = "evidence decides" if kept == evidence.kept else "evidence"
            rows.append(
                {
                    "seed": seed,
                    "target": kept,
                    "rule": rule,
                    "kept": fraction(pruned),
                    "accuracy": accuracy(pruned, x_score, y_score),
                    **seconds,
                }
            )
            rival = magnitude(net, bare, kept)
            rule = "magnitude, as many" if kept == evidence.kept else "magnitude"
            rows.append(
                {
                    "seed": seed,
                    "target": kept,
                    "rule": rule,
                    "kept": fraction(rival),
                    "accuracy": accuracy(rival, x_score, y_score),
                    **seconds,
                }
            )
        rows.append(
            {
                "seed": seed,
                "target": 1.0,
                "rule": "unpruned",
                "kept": 1.0,
                "accuracy": accuracy(net, x_score, y_score),
                **seconds,
            }
        )
        settings.out.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(settings.out / "results.csv", index=False)
    (settings.out / "settings.json").write_text(
        json.dumps({k: str(v) for k, v in vars(settings).items()}, indent=1)
    )
    table = pd.DataFrame(rows)
    wide = (
        table[table["rule"].isin(["evidence", "magnitude"])]
        .groupby(["target", "rule"])["accuracy"]
        .agg(["mean", "std"])
        .unstack("rule")
    )
    wide = wide.sort_index(ascending=False)
    print(wide.to_string(float_format="%.4f"))
    rest = (
        table[~table["rule"].isin(["evidence", "magnitude"])]
        .groupby("rule")[["kept", "accuracy"]]
        .agg(["mean", "std"])
    )
    print(rest.to_string(float_format="%.4f"))
    print(table[["curvature_seconds", "reduction_seconds"]].mean().to_string())
    if not settings.validation and settings.page:
        write_page(settings.page, table)


def write_page(page: Path, table: pd.DataFrame) -> None:
    """The table between the marks of the page."""
    lines = ["| kept | evidence | magnitude | difference per seed |", "|---|---|---|---|"]
    for kept in FRACTIONS:
        both = {
            rule: (
                table[(table["target"] == kept) & (table["rule"] == rule)].set_index("seed")[
                    "accuracy"
                ]
            )
            for rule in ("evidence", "magnitude")
        }
        gap = ", ".join(f"{100 * value:+.1f}" for value in both["evidence"] - both["magnitude"])
        lines.append(
            f"| {kept:.0%} | "
            + " | ".join(f"{a.mean():.3f} ± {a.std():.3f}" for a in both.values())
            + f" | {gap} points |"
        )
    whole = table[table["rule"] == "unpruned"]["accuracy"]
    seconds = table.groupby("seed")[["curvature_seconds", "reduction_seconds"]].first().mean()
    lines += [
        "",
        (
            f"Unpruned: {whole.mean():.3f} ± {whole.std():.3f}. Curvature: {seconds.iloc[0]:.1f} s;"
            f" one reduction: {seconds.iloc[1]:.2f} s (one busy thread)."
        ),
    ]
    text = page.read_text(encoding="utf-8")
    before, after = text.split("<!-- table -->")[0], text.split("<!-- end of table -->")[1]
    page.write_text(
        before + "\n".join(["<!-- table -->", *lines, "<!-- end of table -->"]) + after,
        encoding="utf-8",
    )


def fraction(net: nn.Module) -> float:
    parameters = list(net.parameters())
    return sum(int(p.count_nonzero()) for p in parameters) / sum(p.numel() for p in parameters)


if __name__ == "__main__":
    main()
