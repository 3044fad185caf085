"""The baseline: gradual magnitude pruning of a point estimate in plain torch (Zhu & Gupta 2017), without and with temperature scaling (Guo et al. 2017).

    python benchmarks/magnitude_pruning.py --kept 0.02 --seeds 3 --out results/fashion-mnist/magnitude-2

Global magnitude ranking over all weights and biases, cubic schedule, Adam with cosine decay, pruned entries held at 0. The scaled
variant trains without a sixth of the training rows and fits one temperature there by NLL; the plain one trains on all of them.
Kept fraction 1 is the dense network. Uses the library for data and metrics only.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

import pyro_bmr as bmr
from pyro_bmr.models.mlp import network


def train(x: Tensor, y: Tensor, hidden: tuple[int, ...], classes: int, kept: float, seed: int, settings: argparse.Namespace) -> nn.Module:
    """A trained network of which the fraction `kept` of all parameters is not zero."""
    torch.manual_seed(seed)
    net = network(x[0].numel(), hidden, classes)
    parameters = list(net.parameters())
    masks = [torch.ones_like(p) for p in parameters]
    optimiser = torch.optim.Adam(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    per_epoch = math.ceil(len(x) / settings.batch_size)
    total = settings.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=total)
    interval = max(round(settings.reduce_every * per_epoch), 1)
    step = 0
    for _ in tqdm(range(settings.epochs), desc=f"kept {kept:g}, seed {seed}", leave=False):
        for index in torch.randperm(len(x)).split(settings.batch_size):
            step += 1
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[index]), y[index]).backward()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                if kept < 1 and settings.start * total <= step <= settings.stop * total + 1 and (step % interval == 0 or step == round(settings.stop * total)):
                    done = min(max((step / total - settings.start) / (settings.stop - settings.start), 0.0), 1.0)
                    target = kept + (1 - kept) * (1 - done) ** 3
                    ranks = torch.cat([(p.abs() * m).flatten() for p, m in zip(parameters, masks, strict=True)])
                    limit = ranks.kthvalue(max(ranks.numel() - round(target * ranks.numel()), 1)).values
                    masks = [((p.abs() > limit) & (m > 0)).float() for p, m in zip(parameters, masks, strict=True)]
                for p, m in zip(parameters, masks, strict=True):
                    p.mul_(m)
    return net.eval()


def temperature(logits: Tensor, y: Tensor) -> float:
    """The scale of the logits with the least NLL, by golden section in its logarithm."""
    low, high, ratio = math.log(0.2), math.log(5.0), (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        losses = [nn.functional.cross_entropy(logits / math.exp(t), y) for t in (a, b)]
        low, high = (low, b) if losses[0] < losses[1] else (a, high)
    return math.exp((low + high) / 2)


def scores(logits: Tensor, y: Tensor) -> dict[str, float]:
    probs = logits.softmax(1)
    return {"accuracy": bmr.metrics.accuracy(probs, y), "nll": float(nn.functional.cross_entropy(logits, y)), "ece": bmr.metrics.ece(probs, y)}


@torch.no_grad()
def logits_of(net: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([net(batch) for batch in x.split(2000)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--hidden", default="300-100")
    parser.add_argument("--kept", type=float, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--reduce-every", type=float, default=0.25, help="epochs between prunings")
    parser.add_argument("--start", type=float, default=0.0)
    parser.add_argument("--stop", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    data = bmr.load(settings.data)
    assert data.classes is not None
    hidden = tuple(int(size) for size in settings.hidden.split("-"))
    held = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    held, rest = held[: len(held) // 6], held[len(held) // 6 :]
    rows = []
    for seed in range(settings.seeds):
        for scaled in (False, True):
            start = time.perf_counter()
            index = rest if scaled else torch.arange(len(data.x_train))
            net = train(data.x_train[index], data.y_train[index], hidden, data.classes, settings.kept, seed, settings)
            seconds = time.perf_counter() - start
            scale = temperature(logits_of(net, data.x_train[held]), data.y_train[held]) if scaled else 1.0
            counts = [int(p.count_nonzero()) for p in net.parameters()]
            kept = sum(counts) / sum(p.numel() for p in net.parameters())
            route = "temperature-scaled" if scaled else "plain"
            result = scores(logits_of(net, data.x_test) / scale, data.y_test)
            rows.append({"prior": "none", "route": route, "seed": seed, "scale": scale, **result, "kept": kept, "seconds": seconds})
            settings.out.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(settings.out / "results.csv", index=False)
    (settings.out / "settings.json").write_text(json.dumps({k: str(v) for k, v in vars(settings).items()}, indent=1))
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
