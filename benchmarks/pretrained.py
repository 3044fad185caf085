"""Trained networks pruned without training, beside magnitude, Wanda, SparseGPT, OBC and the rule of
The LLM Surgeon: `python benchmarks/pretrained.py --networks mlp lenet vit --seeds 0 1 2`.

Fashion-MNIST. Networks are trained once and kept in --nets. All methods read the same calibration
rows; none sees the test rows. --validation scores the 5,000 held-out training rows instead of the
test rows. A method that has its rows in --out is not run again. --cost times one layer of three
sizes. --posterior predicts from draws. --page fills docs/results/pretrained.md.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.post_training import PATH

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts import one_shot
from benchmarks.parts.layer_cost import layer_costs
from benchmarks.parts.layer_sizes import lamp, owl, weights_and_norms
from benchmarks.parts.pages import fill, table
from benchmarks.parts.same_steps import Rule, with_steps
from benchmarks.parts.trained_networks import RECIPES, Rows, rows, trained, trained_on

SIZES = (0.5, 0.2, 0.1, 0.05)
AFTER = ", trained"
OURS, STEPLESS, SURGEON = "prune", "prune, no steps", "The LLM Surgeon's rule"
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


def rounds_to(sizes: Sequence[float]) -> tuple[float, ...]:
    """The rounds of `prune` down to the last of the sizes, with all of them."""
    return tuple(sorted({*sizes, *(s for s in PATH if s > sizes[-1])}, reverse=True))


def without_steps(
    net: nn.Module, data: Rows, settings: argparse.Namespace, likelihood: bmr.Categorical
) -> list[Network]:
    """One path through all sizes, which has the networks of a call for each."""
    found: list[Network] = []

    def keep(kept: float, one: nn.Module) -> None:
        if kept in settings.sizes:
            found.append((kept, copy.deepcopy(one)))

    pruned(net, data, settings, likelihood, settings.sizes[-1], (0, 0), keep)
    return found


def pruned(
    net: nn.Module,
    data: Rows,
    settings: argparse.Namespace,
    likelihood: bmr.Categorical,
    kept: float,
    steps: tuple[int, int],
    after_round: Callable[[float, nn.Module], None] | None = None,
) -> nn.Module:
    return bmr.prune(
        net,
        data,
        likelihood,
        kept,
        corrections=steps[0],
        last_corrections=steps[1],
        path=rounds_to(settings.sizes),
        rate=settings.step_rate,
        rows=len(data.x),
        size=settings.size,
        scale=settings.scale,
        temperature=settings.temperature,
        after_round=after_round,
        progress=False,
    ).net


def sizes_of_layers(net: nn.Module) -> dict[str, float]:
    return {name: float((p != 0).double().mean()) for name, p in net.named_parameters()}


def methods(
    net: nn.Module, data: Rows, settings: argparse.Namespace, likelihood: bmr.Categorical
) -> dict[str, Callable[[], list[Network]]]:
    """Name → what gives the network of each size."""
    found = one_shot.factors(net, data, "true", likelihood)
    rounds = rounds_to(settings.sizes)
    names = one_shot.weights_of(found)
    weights, norms = weights_and_norms(net, found, names)
    scales = {name: float(weight.square().mean().sqrt()) for name, weight in weights.items()}
    last: dict[float, dict[str, float]] = {}
    orders: dict[str, Tensor] = {}

    def each(prune: Callable[[float], nn.Module]) -> Callable[[], list[Network]]:
        return lambda: [(kept, prune(kept)) for kept in settings.sizes]

    def surgeon(**changes: Any) -> Callable[[], list[Network]]:
        rule = one_shot.Surgeon(**changes)
        return lambda: list(rule.path(net, data, rounds, settings.sizes, likelihood).items())

    def surgeon_shot(one: nn.Module, kept: float, held: one_shot.Masks) -> nn.Module:
        return one_shot.Surgeon().next(one, data, held, kept, likelihood)

    def stepped(rule: Rule) -> list[Network]:
        steps = settings.corrections, settings.last
        return with_steps(rule, net, data, rounds, settings.sizes, steps, likelihood)

    def obc(sizes: float | Mapping[str, float]) -> nn.Module:
        if not orders:
            orders.update(one_shot.obc_orders(net, found))
        return one_shot.obc(net, found, orders, sizes)

    def ours() -> list[Network]:
        steps = settings.corrections, settings.last
        path = [(k, pruned(net, data, settings, likelihood, k, steps)) for k in settings.sizes]
        last.update({kept: sizes_of_layers(one) for kept, one in path})
        return path

    def of_our_sizes(prune: Callable[[Mapping[str, float]], nn.Module]) -> list[Network]:
        if not last:
            ours()
        return [(kept, prune(last[kept])) for kept in settings.sizes]

    sparsegpt = partial(one_shot.sparsegpt, net, found)
    runs = {
        "dense": lambda: [(1.0, net)],
        "magnitude, uniform": each(lambda k: one_shot.magnitude(net, found, k, True)),
        "magnitude, one threshold": each(lambda k: one_shot.magnitude(net, found, k, False)),
        "Wanda": each(lambda k: one_shot.wanda(net, found, k)),
        "SparseGPT, uniform": each(sparsegpt),
        "SparseGPT, sizes by LAMP": each(lambda k: sparsegpt(lamp(weights, k))),
        "SparseGPT, sizes by OWL": each(lambda k: sparsegpt(owl(weights, norms, k))),
        "OBC, uniform": each(obc),
        SURGEON: surgeon(),
        "… each row by itself": surgeon(whole=False),
        "… with the true Fisher": surgeon(fisher="true"),
        "… and the prior as damping": surgeon(
            fisher="true", scales=scales, temperature=settings.temperature
        ),
        STEPLESS: lambda: without_steps(net, data, settings, likelihood),
        OURS: ours,
        "magnitude, one threshold, the same steps": lambda: stepped(
            lambda one, kept: one_shot.magnitude(one, found, kept, False)
        ),
        f"{SURGEON}, the same steps": lambda: stepped(partial(surgeon_shot, held={})),
        "SparseGPT, our sizes": lambda: of_our_sizes(sparsegpt),
        "OBC, our sizes": lambda: of_our_sizes(obc),
    }
    if not settings.differences:
        runs = {name: run for name, run in runs.items() if not name.startswith("…")}
    return runs


def results(
    name: str, seed: int, settings: argparse.Namespace, done: Collection[str]
) -> Iterator[list[dict[str, object]]]:
    """The rows of each method that is not done."""
    data = rows()
    net = trained(name, seed, settings.nets, data["train"])
    scored = data["held" if settings.validation else "test"]
    settings.size = len(data["train"].x)
    order = torch.randperm(settings.size, generator=torch.Generator().manual_seed(seed))
    some = order[: settings.rows]
    calibration = Rows(data["train"].x[some], data["train"].y[some])
    for method, run in methods(net, calibration, settings, LIKELIHOOD).items():
        if method in done or (settings.only and method not in settings.only):
            continue
        start = time.perf_counter()
        found = run()
        seconds = time.perf_counter() - start
        out = [_row(name, seed, method, kept, one, scored, seconds) for kept, one in found]
        for kept, one in found if settings.train and method != "dense" else ():
            one = trained_on(one, settings.train, settings.rate, data["train"])
            out.append(_row(name, seed, f"{method}{AFTER}", kept, one, scored, seconds))
        print(pd.DataFrame(out).to_string(index=False, header=False), flush=True)
        yield out


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
    sizes = sorted(of[of["kept"] < 1]["kept"].unique(), reverse=True)
    lines = []
    for method in of["method"].unique():
        cells = [method]
        for kept in (1.0,) if method == "dense" else sizes:
            at = of[(of["method"] == method) & (of["kept"] == kept)]
            spread = f" ± {at['accuracy'].std():.3f}" if len(at) > 1 else ""
            cells.append(
                f"{at['accuracy'].mean():.3f}{spread} ({at['nll'].mean():.2f},"
                f" {at['ece'].mean():.3f})"
            )
        lines.append(cells + [""] * (len(sizes) + 1 - len(cells)))
    return table([name, *(f"{kept:.0%}" for kept in sizes)], lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=["mlp"], choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="what is kept")
    parser.add_argument("--rows", type=int, default=10_000, help="calibration rows")
    parser.add_argument("--corrections", type=int, default=100, help="steps after each round")
    parser.add_argument("--last", type=int, default=500, help="steps after the last round")
    parser.add_argument("--step-rate", type=float, default=0.05, help="of the steps of `prune`")
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
    settings.sizes = tuple(sorted(settings.sizes, reverse=True))
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
            found = done[(done["network"] == name) & (done["seed"] == seed)] if len(done) else done
            ready = set(found["method"]) if len(found) else set()
            for new in results(name, seed, settings, ready):
                done = pd.concat([done, pd.DataFrame(new)])
                done.to_csv(path, index=False)
    if settings.page:
        after = done["method"].str.endswith(AFTER)
        for name in done["network"].unique():
            fill(settings.page, accuracy_table(done[~after], name), name)
        for name in done[after]["network"].unique():
            fill(settings.page, accuracy_table(done[after], name), name + AFTER)


if __name__ == "__main__":
    main()
