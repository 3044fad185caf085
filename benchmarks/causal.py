"""A causal transformer over bytes, pruned after its training, and with --fits during a fit:
`python benchmarks/causal.py --page docs/results/pretrained.md`.

The text is the source of the standard library of Python. The next byte is predicted from up to 64
bytes before it. Scores are bits per byte on files that no method reads. --validation scores other
such files instead, on which settings are chosen. The methods are those of `pretrained.py`.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import pyro_bmr as bmr

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.pages import fill, table
from benchmarks.parts.trained_networks import Rows, descend, epoch_batches, stored
from benchmarks.pretrained import SIZES, Network, methods

LENGTH, BATCH, RATE = 64, 64, 2e-3
LIKELIHOOD = bmr.Categorical(class_axis=-1)
DURING = "reduced during a fit"


class ByteTransformer(nn.Module):
    """(rows, length) of symbols → the logits of the next one at each place."""

    def __init__(self, symbols: int, dim: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, LENGTH, dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, symbols)
        self.register_buffer("future", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.position
        return self.head(self.norm(self.encoder(x, mask=self.future)))


def texts() -> dict[str, Rows]:
    """Rows for training, held out, and for the test, of different files."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    parts = {"test": order[:15], "held": order[15:30], "train": order[30:]}
    whole = {
        name: b"".join(files[k].read_bytes() for k in places) for name, places in parts.items()
    }
    symbols = {byte: k for k, byte in enumerate(sorted(set(b"".join(whole.values()))))}
    return {name: _rows(torch.tensor([symbols[b] for b in text])) for name, text in whole.items()}


def _rows(text: Tensor) -> Rows:
    count = (len(text) - 1) // LENGTH
    return Rows(*(text[k : k + count * LENGTH].view(count, LENGTH) for k in (0, 1)))


@torch.no_grad()
def bits(net: nn.Module, scored: Rows) -> float:
    """Per byte."""
    logits = torch.cat([net(part) for part in scored.x.split(250)])
    found = nn.functional.cross_entropy(logits.flatten(0, -2), scored.y.flatten())
    return float(found) / math.log(2)


def trained(seed: int, symbols: int, folder: Path, train: Rows, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    net, path = ByteTransformer(symbols), folder / f"bytes-{seed}.safetensors"
    return stored(net, path, lambda: descend(net, train, epoch_batches(train, epochs, BATCH), RATE))


def during(train: Rows, symbols: int, kept: float, settings: argparse.Namespace) -> Network:
    """Fitted from scratch by the natural gradient, reduced to a size on the way."""
    torch.manual_seed(settings.seed)
    model = bmr.BayesianNetwork(ByteTransformer(symbols), bmr.Gaussian("layer"), LIKELIHOOD)
    fit = bmr.fit(
        model,
        train,
        epochs=settings.epochs,
        batch_size=BATCH,
        optimizer=bmr.natural_gradient(settings.rate),
        temperature=settings.fit_temperature,
        reduce=bmr.Every(to=bmr.Gaussian(scale=0), kept=kept),
        progress=False,
    )
    return kept, bmr.export(fit.program, fit.posterior)


def results(settings: argparse.Namespace) -> Iterator[dict[str, object]]:
    data = texts()
    scored = data["held" if settings.validation else "test"]
    symbols = 1 + max(int(part.x.max()) for part in data.values())
    net = trained(settings.seed, symbols, settings.nets, data["train"], settings.epochs)
    settings.size = len(data["train"].x)
    generator = torch.Generator().manual_seed(settings.seed)
    some = torch.randperm(settings.size, generator=generator)[: settings.rows]
    calibration = Rows(data["train"].x[some], data["train"].y[some])

    def rows_of(method: str, found: list[Network], start: float) -> Iterator[dict[str, object]]:
        for kept, one in found:
            row = {"method": method, "kept": kept, "bits": bits(one, scored)}
            print(row, f"{time.perf_counter() - start:.0f} s", flush=True)
            yield {**row, "seed": settings.seed}

    for method, run in methods(net, calibration, settings, LIKELIHOOD).items():
        if settings.only and method not in settings.only:
            continue
        start = time.perf_counter()
        yield from rows_of(method, run(), start)
    for kept in SIZES if settings.fits else ():
        start = time.perf_counter()
        yield from rows_of(DURING, [during(data["train"], symbols, kept, settings)], start)


def bits_table(found: pd.DataFrame) -> list[str]:
    lines = []
    for method in found["method"].unique():
        of = found[found["method"] == method]
        cells = [f"{of[of['kept'] == kept]['bits'].mean():.3f}" for kept in of["kept"].unique()]
        lines.append([method, *cells, *[""] * (len(SIZES) - len(cells))])
    return table(["bits per byte", *(f"{kept:.0%}" for kept in SIZES)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3, help="of the training and of the fits")
    parser.add_argument("--rows", type=int, default=1000, help="calibration rows of 64 bytes")
    parser.add_argument("--corrections", type=int, default=100, help="steps after each round")
    parser.add_argument("--last", type=int, default=500, help="steps after the last round")
    parser.add_argument("--fits", action="store_true", help="also reduces during fits")
    parser.add_argument("--rate", type=float, default=0.1, help="of the natural gradient")
    parser.add_argument("--fit-temperature", type=float, default=0.3, help="of the fits")
    parser.add_argument("--only", nargs="*", help="methods to run")
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--nets", type=Path, default=Path("results/pretrained/nets"))
    parser.add_argument("--out", type=Path, default=Path("results/pretrained"))
    parser.add_argument("--page", type=Path, help="such as docs/results/pretrained.md")
    settings = parser.parse_args()
    settings.differences, settings.scale, settings.temperature = False, None, 0.05
    settings.sizes, settings.step_rate = SIZES, 0.05
    torch.set_num_threads(1)
    settings.out.mkdir(parents=True, exist_ok=True)
    found = pd.DataFrame(list(results(settings)))
    name = "bytes-validation" if settings.validation else "bytes"
    found.to_csv(settings.out / f"{name}-{settings.seed}.csv", index=False)
    if settings.page:
        fill(settings.page, bits_table(found), "bytes")


if __name__ == "__main__":
    main()
