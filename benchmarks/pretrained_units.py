"""Units of trained networks, removed by the weights that lead to them or by those that read them:
`python benchmarks/pretrained_units.py --networks mlp lenet --page docs/results/pretrained.md`.

Fashion-MNIST; networks and rows are those of `pretrained.py`. Each cell is the accuracy, the NLL,
and the parameters that are left after `shrink`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

import pyro_bmr as bmr

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.pages import fill, table
from benchmarks.parts.trained_networks import RECIPES, rows, trained
from benchmarks.pretrained import scores

SHARES = (0.5, 0.3, 0.2, 0.1)  # of the weights in groups


def rows_of(name: str, settings: argparse.Namespace) -> list[list[str]]:
    data = rows()
    net = trained(name, settings.seed, settings.nets, data["train"])
    scored = data["held" if settings.validation else "test"]
    order = torch.randperm(
        len(data["train"].x), generator=torch.Generator().manual_seed(settings.seed)
    )
    x = data["train"].x[order[: settings.rows]]

    def cell(one: nn.Module) -> str:
        small = bmr.shrink(one, {}, x[:4], fold_padded=True)
        found, size = scores(one, scored), sum(p.numel() for p in small.parameters())
        return f"{found['accuracy']:.3f} ({found['nll']:.2f}), {size:,}"

    lines = [[f"{name}, dense", cell(net)]]
    by = {"unit": "unit", "reader": bmr.shrinking.reader_labels(net, x[:4])}
    for steps in (0, settings.corrections):
        for word, per in by.items():
            cells: dict[float, str] = {}
            bmr.prune(
                net,
                x,
                bmr.Categorical(),
                SHARES[-1],
                per=per,
                path=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15),
                corrections=steps,
                last_corrections=steps,
                rows=len(x),
                size=len(order),
                after_round=lambda kept, one, c=cells: c.update({kept: cell(one)}),
                progress=False,
            )
            about = "no steps" if not steps else f"{steps} steps a round"
            lines.append([f"{name}, by {word}, {about}", *(cells[kept] for kept in SHARES)])
            print(lines[-1], flush=True)
    return [line + [""] * (len(SHARES) + 1 - len(line)) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(RECIPES), default=["mlp", "lenet"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1000, help="calibration rows")
    parser.add_argument("--corrections", type=int, default=100, help="steps after each round")
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--nets", type=Path, default=Path("results/pretrained/nets"))
    parser.add_argument("--page", type=Path, help="such as docs/results/pretrained.md")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    lines = [line for name in settings.networks for line in rows_of(name, settings)]
    if settings.page:
        heads = ("", *(f"{kept:.0%} of the groups' weights" for kept in SHARES))
        fill(settings.page, table(heads, lines), "units")


if __name__ == "__main__":
    main()
