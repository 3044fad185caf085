"""What a reduction by unit costs beside one by single weights.

`python benchmarks/unit_reduction.py` prints one markdown table.

Posteriors of the shapes of a perceptron, ResNet-18, ViT-tiny and one large layer; a tenth of the
weights are large, the prior is N(0, 1.5). Both reductions take turns in one process on one thread.
Times are the least processor seconds of `--repeats` calls.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

import pyro_bmr as bmr

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.pages import table
from benchmarks.reduction import moments
from pyro_bmr.posteriors.site import Site

Shapes = dict[str, tuple[int, ...]]
COLUMNS = ["network", "weights", "target", "kept", "per weight, ms", "per unit, ms", "ratio"]
TARGETS = (
    ("Gaussian(scale=0)", bmr.Gaussian(scale=0), None),
    ("Gaussian(scale=0)", bmr.Gaussian(scale=0), 0.5),
    ("SpikeAndSlab()", bmr.SpikeAndSlab(), None),
    ("Horseshoe()", bmr.Horseshoe(), None),
)


def with_biases(weights: Shapes) -> Shapes:
    """Each weight, followed by the bias of its units."""
    both = ((f"{n}.weight", s, f"{n}.bias") for n, s in weights.items())
    return {name: s for w, shape, b in both for name, s in ((w, shape), (b, shape[:1]))}


def networks() -> dict[str, Shapes]:
    widths = [3, *[64] * 5, *[128] * 4, *[256] * 4, *[512] * 4]
    pairs = list(zip(widths[1:], widths[:-1], strict=True))
    resnet: Shapes = {f"conv{k}": (o, i, 3, 3) for k, (o, i) in enumerate(pairs)}
    block: Shapes = {"qkv": (576, 192), "proj": (192, 192), "fc1": (768, 192), "fc2": (192, 768)}
    vit: Shapes = {f"{k}.{name}": shape for k in range(12) for name, shape in block.items()}
    return {
        "perceptron": with_biases({"a": (300, 784), "b": (100, 300), "c": (10, 100)}),
        "ResNet-18": with_biases({**resnet, "fc": (10, 512)}),
        "ViT-tiny": with_biases(vit),
        "4,096 × 4,096": {"weight": (4096, 4096)},
    }  # fmt: skip


def posterior(shapes: Shapes) -> bmr.Posterior:
    prior = bmr.formulas.Diagonal(torch.zeros(()), torch.tensor(1.5))
    generator = torch.Generator().manual_seed(0)
    sites = {}
    for name, shape in shapes.items():
        mean, var = torch.empty(shape), torch.empty(shape)
        moments(mean.view(-1), var.view(-1), generator)
        sites[name] = Site(mean, var, prior)
    return bmr.Posterior(sites)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", bmr.PyroBMRWarning)
    rows = []
    for network, shapes in networks().items():
        q = posterior(shapes)
        for title, to, kept in TARGETS:
            least = {"weight": float("inf"), "unit": float("inf")}
            for _ in range(repeats):
                for per in least:
                    start = time.process_time()
                    bmr.reduce(q, to=to, per=per, kept=kept)
                    least[per] = min(least[per], 1e3 * (time.process_time() - start))
            weight, unit = least.values()
            count = sum(q[name].mean.numel() for name in q)
            rows.append([network, f"{count:,}", title, str(kept or "by evidence"),
                         f"{weight:.3g}", f"{unit:.3g}", f"{unit / weight:.2f}"])  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(table(COLUMNS, rows)))


if __name__ == "__main__":
    main()
