"""Trained networks pruned without training, beside magnitude, Wanda, SparseGPT and the rule of The
LLM Surgeon: `python benchmarks/pretrained.py --networks mlp lenet vit --seeds 3`.

Fashion-MNIST. Networks are trained once and kept in --nets. All methods read the same calibration
rows; none sees the test rows. --validation scores the 5,000 held-out training rows instead of the
test rows. --cost times one layer of three sizes. --posterior predicts from draws. --page
fills docs/results/pretrained.md.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.post_training import PATH

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts import one_shot
from benchmarks.parts.layer_cost import layer_costs
from benchmarks.parts.pages import fill, table
from benchmarks.parts.trained_networks import RECIPES, Rows, rows, trained, trained_on

SIZES = (0.5, 0.2, 0.1, 0.05)
ROUNDS = tuple(step for step in PATH if step >= SIZES[-1])
AFTER = ", trained"
OURS, STEPLESS = "prune", "prune, no steps"
LIKELIHOOD = bmr.Categorical()
DRAWS = 8  # of a pruned posterior
Network = tuple[float, nn.Module]


@torch.no_grad()
def scores(net: nn.Module, scored: Rows) -> dict[str, float]:
    return scores_of(torch.cat([net(part) for part in scored.x.split(500)]).softmax(1), scored)


def scores_of(probs: Tensor, scored: Rows) -> dict[str, float]:
    return {
        "accuracy": bmr.metrics.accuracy(probs, scored.y),
        "nll": float(nn.functional.nll_loss(probs.log(), scored.y)),
        "ece": bmr.metrics.ece(probs, scored.y),
    }


def ours(
    net: nn.Module,
    data: Rows,
    settings: argparse.Namespace,
    likelihood: bmr.Categorical,
    steps: bool,
) -> list[Network]:
    """One path through all sizes; each size has the steps of its round."""
    found: list[Network] = []

    def keep(kept: float, one: nn.Module) -> None:
        if kept in SIZES:
            found.append((kept, copy.deepcopy(one)))

    bmr.prune(
        net,
        data,
        likelihood,
        SIZES[-1],
        corrections=settings.corrections if steps else 0,
        last_corrections=settings.corrections if steps else 0,
        rows=len(data.x),
        size=settings.size,
        scale=settings.scale,
        temperature=settings.temperature,
        after_round=keep,
        progress=False,
    )
    return found


def sizes_of_layers(net: nn.Module) -> dict[str, float]:
    return {name: float((p != 0).double().mean()) for name, p in net.named_parameters()}


def methods(
    net: nn.Module, data: Rows, settings: argparse.Namespace, likelihood: bmr.Categorical
) -> Iterator[tuple[str, Callable[[], list[Network]]]]:
    """Name → what gives the network of each size."""
    found = one_shot.factors(net, data, "true", likelihood)
    each = lambda prune: lambda: [(kept, prune(kept)) for kept in SIZES]  # noqa: E731
    yield "dense", lambda: [(1.0, net)]
    yield "magnitude, uniform", each(lambda k: one_shot.magnitude(net, found, k, True))
    yield "magnitude, one threshold", each(lambda k: one_shot.magnitude(net, found, k, False))
    yield "Wanda", each(lambda k: one_shot.wanda(net, found, k))
    yield "SparseGPT, uniform", each(lambda k: one_shot.sparsegpt(net, found, k))
    for name, fisher in (
        ("The LLM Surgeon's rule", "empirical"),
        ("… with the true Fisher", "true"),
    )[: None if settings.differences else 1]:
        yield (
            name,
            lambda fisher=fisher: list(
                one_shot.surgeon(net, data, ROUNDS, SIZES, fisher, likelihood).items()
            ),
        )
    yield STEPLESS, lambda: ours(net, data, settings, likelihood, steps=False)
    yield OURS, lambda: ours(net, data, settings, likelihood, steps=True)


def results(name: str, seed: int, settings: argparse.Namespace) -> list[dict[str, object]]:
    data = rows()
    net = trained(name, seed, settings.nets, data["train"])
    scored = data["held" if settings.validation else "test"]
    settings.size = len(data["train"].x)
    order = torch.randperm(settings.size, generator=torch.Generator().manual_seed(seed))
    some = order[: settings.rows]
    calibration = Rows(data["train"].x[some], data["train"].y[some])
    out, last = [], {}
    for method, run in methods(net, calibration, settings, LIKELIHOOD):
        if settings.only and method not in settings.only:
            continue
        start = time.perf_counter()
        found = run()
        seconds = time.perf_counter() - start
        last = {kept: sizes_of_layers(one) for kept, one in found}
        out += [_row(name, seed, method, kept, one, scored, seconds) for kept, one in found]
        for kept, one in found if settings.train and method != "dense" else ():
            one = trained_on(one, settings.train, settings.rate, data["train"])
            out.append(_row(name, seed, f"{method}{AFTER}", kept, one, scored, seconds))
        new = pd.DataFrame([row for row in out if row["method"] in (method, method + AFTER)])
        print(new.to_string(index=False, header=False), flush=True)
    curved = one_shot.factors(net, calibration, "true", LIKELIHOOD)
    for kept in () if settings.only else SIZES:
        one = one_shot.sparsegpt(net, curved, last[kept])
        out.append(_row(name, seed, "SparseGPT, our sizes", kept, one, scored, 0.0))
    return out


def from_posterior(name: str, settings: argparse.Namespace) -> list[str]:
    """A table: the pruned network, and the average over draws of its posterior, without steps."""
    data, lines = rows(), []
    scored = data["held" if settings.validation else "test"]
    for seed in settings.seeds:
        net = trained(name, seed, settings.nets, data["train"])
        order = torch.randperm(len(data["train"].x), generator=torch.Generator().manual_seed(seed))
        x = data["train"].x[order[: settings.rows]]
        for kept in SIZES[-2:]:
            pruned = bmr.prune(
                net, x, bmr.Categorical(), kept, corrections=0, last_corrections=0, rows=len(x),
                size=len(order), progress=False,
            )  # fmt: skip
            cells = [f"{name}, seed {seed}", f"{kept:.0%}", _cell(scores(pruned.net, scored))]
            for widening in (1.0, 20.0):
                drawn = pruned.draws(DRAWS, widening=widening)
                found = bmr.prediction.predict_networks(drawn, bmr.Categorical(), scored.x)
                cells.append(_cell(scores_of(found.probs, scored)))
            print(" | ".join(cells), flush=True)
            lines.append(cells)
    return table(["network", "kept", "point", "posterior", "20 times as wide"], lines)


def _cell(found: dict[str, float]) -> str:
    return f"{found['accuracy']:.3f} ({found['nll']:.3f}, {found['ece']:.3f})"


def _row(
    name: str, seed: int, method: str, kept: float, net: nn.Module, scored: Rows, seconds: float
) -> dict[str, object]:
    about = {"network": name, "seed": seed, "method": method, "kept": kept}
    return {**about, **scores(net, scored), "seconds": seconds}


def accuracy_table(found: pd.DataFrame, name: str) -> list[str]:
    """Accuracy, NLL and ECE of each method at each size; means and deviations over the seeds."""
    of = found[found["network"] == name]
    lines = []
    for method in of["method"].unique():
        cells = [method]
        for kept in (1.0,) if method == "dense" else SIZES:
            at = of[(of["method"] == method) & (of["kept"] == kept)]
            spread = f" ± {at['accuracy'].std():.3f}" if len(at) > 1 else ""
            cells.append(
                f"{at['accuracy'].mean():.3f}{spread} ({at['nll'].mean():.2f},"
                f" {at['ece'].mean():.3f})"
            )
        lines.append(cells + [""] * (len(SIZES) + 1 - len(cells)))
    return table([name, *(f"{kept:.0%}" for kept in SIZES)], lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=["mlp"], choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=5000, help="calibration rows")
    parser.add_argument("--corrections", type=int, default=8, help="steps after each round")
    parser.add_argument("--train", type=int, help="steps of training after each pruning")
    parser.add_argument("--rate", type=float, default=2e-3, help="of that training")
    parser.add_argument("--only", nargs="*", help="methods to run")
    parser.add_argument(
        "--differences", action="store_true", help="what each difference to the rule is worth"
    )
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--scale", choices=["empirical"], help="of the prior, in `prune`")
    parser.add_argument("--temperature", type=float, default=0.05, help="in `prune`")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument(
        "--posterior", action="store_true", help="predictions from draws, of the first network"
    )
    parser.add_argument("--nets", type=Path, default=Path("results/pretrained/nets"))
    parser.add_argument("--out", type=Path, default=Path("results/pretrained"))
    parser.add_argument("--page", type=Path, help="such as docs/results/pretrained.md")
    return parser.parse_args()


def main() -> None:
    settings = arguments()
    torch.set_num_threads(1)
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.cost:
        lines = layer_costs()
        print("\n".join(lines))
        if settings.page:
            fill(settings.page, lines, "cost")
        return
    if settings.posterior:
        lines = from_posterior(settings.networks[0], settings)
        if settings.page:
            fill(settings.page, lines, "posterior")
        return
    path = settings.out / ("validation.csv" if settings.validation else "results.csv")
    done = pd.read_csv(path) if path.exists() else pd.DataFrame()
    for name in settings.networks:
        for seed in settings.seeds:
            if len(done) and ((done["network"] == name) & (done["seed"] == seed)).any():
                continue
            done = pd.concat([done, pd.DataFrame(results(name, seed, settings))])
            done.to_csv(path, index=False)
    if settings.page:
        after = done["method"].str.endswith(AFTER)
        for name in done["network"].unique():
            fill(settings.page, accuracy_table(done[~after], name), name)
        for name in done[after]["network"].unique():
            fill(settings.page, accuracy_table(done[after], name), name + AFTER)


if __name__ == "__main__":
    main()
