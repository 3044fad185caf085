"""Predicted against observed change of free energy along a pruning path, for two data sets: `python
benchmarks/refit.py concrete --data <folder>`.

`concrete`: strength of 1030 mixtures of 8 ingredients; `boston`: median value of homes in 506
tracts, 13 regressors. A network with one layer of 50 ReLU units, mean field, all rows. `--data` is
the folder of the two packages that `regression_tables.py` says how to get.

One shot: every size is reduced from the one fit of the full model, and refitted. Iterated: every
size is reduced from the refit of the size before; its prediction is the sum of those along the way.
The free energies are those of the fits, 256 draws each, with the same noise; each refit starts
where its reduction ends, and `at once` is the free energy there, before a step of it. `more
training` is the gain of the full model, trained on for as long as one refit: what of an observed
gain is not due to the reduction. `--choose` prints how well the full model predicts a fifth of the
rows that it has not seen, at several scales of the prior; the one with the best prediction is the
default of the data set.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from regression_tables import READERS
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.experiments.plots import headless, save_figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.pages import fill, table

KEPT = (
    *(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2),
    *(0.15, 0.12, 0.1, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03),
)
PRIOR_SCALES = (0.3, 0.5, 1.0, 2.0, 4.0)
SCALES = {"concrete": 4.0, "boston": 0.5}  # of the prior: see --choose


def standardised(table: pd.DataFrame) -> tuple[torch.Tensor, torch.Tensor]:
    """The regressors, and the last column, in float64."""
    values = torch.tensor(table.to_numpy(dtype=float))
    values = (values - values.mean(0)) / values.std(0)
    return values[:, :-1], values[:, -1]


def model(columns: int, scale: float, seed: int) -> bmr.BayesianNetwork:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(columns, 50), nn.ReLU(), nn.Linear(50, 1)).double()
    return bmr.BayesianNetwork(net, bmr.Gaussian(scale), bmr.Normal())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SCALES)
    parser.add_argument("--data", type=Path, required=True, help="the folder of R's packages")
    parser.add_argument(
        "--choose",
        action="store_true",
        help="only print what the rows held out say of the prior's scale",
    )
    parser.add_argument("--scale", type=float, help="of the prior of every weight")
    parser.add_argument("--epochs", type=int, default=1500)
    parser.add_argument("--refit-epochs", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--refit-learning-rate", type=float, default=5e-3)
    parser.add_argument("--batches", type=int, default=5, help="in an epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/refit"))
    parser.add_argument("--kept", type=float, nargs="+", default=KEPT)
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument(
        "--page",
        type=Path,
        default=Path("docs/results/refit.md"),
        help="whose table and picture to fill",
    )
    return parser.parse_args()


def main() -> None:
    settings = arguments()
    torch.set_num_threads(1)
    headless()
    data = standardised(READERS[settings.name](settings.data))
    common = {
        "batch_size": -(-len(data[1]) // settings.batches),
        "seed": settings.seed,
        "progress": False,
    }
    first = {**common, "epochs": settings.epochs, "optimizer": bmr.adam(settings.learning_rate)}
    if settings.choose:
        choose(data, settings.seed, first)
        return
    scale = settings.scale or SCALES[settings.name]
    full = bmr.fit(model(data[0].shape[1], scale, settings.seed), data, **first)
    results = path(
        full,
        data,
        settings.kept,
        {**common, "epochs": settings.refit_epochs, "draws": settings.draws},
        settings.refit_learning_rate,
    )
    out = settings.out / settings.name
    out.mkdir(parents=True, exist_ok=True)
    results.to_csv(out / "results.csv", index=False)
    (out / "settings.json").write_text(
        json.dumps({k: str(v) for k, v in vars(settings).items()}, indent=1)
    )
    print(results.to_string())
    if settings.page.exists():
        write_page(settings.page, settings.name, results)
        draw(settings.page.with_name(f"refit_{settings.name}.png"), results)


def choose(data: tuple[torch.Tensor, torch.Tensor], seed: int, first: dict) -> None:
    for scale in PRIOR_SCALES:
        history = bmr.fit(
            model(data[0].shape[1], scale, seed), data, validation=0.2, **first
        ).history
        print(
            f"scale {scale}: NLL of the rows held out {history['validation_nll'].iloc[-1]:.4f} at"
            " the end",
            flush=True,
        )


def path(
    full: bmr.Fit,
    data: tuple[torch.Tensor, torch.Tensor],
    sizes: list[float],
    again: dict,
    learning_rate: float,
) -> pd.DataFrame:
    """One row per path and size: the columns path, kept, predicted, at_once, observed and
    standard_error.
    """
    spike, observing = bmr.Gaussian(0), {**again, "optimizer": bmr.adam(learning_rate)}
    standing = {**again, "epochs": 1, "optimizer": bmr.adam(0.0)}

    def step(fit: bmr.Fit, kept: float) -> tuple[bmr.fitting.Refit, float]:
        reduction = bmr.reduce(fit.posterior, to=spike, kept=kept)
        return (
            bmr.refit(fit, reduction, data, **observing),
            bmr.refit(fit, reduction, data, **standing).observed,
        )

    rows = []
    for _ in range(2):
        more, _ = step(full, 1.0)
        rows.append(("more training", 1.0, 0.0, 0.0, more.observed, more.standard_error))
        full = more.fit if len(rows) == 1 else full
    current, predicted, observed = full, 0.0, 0.0
    for kept in sizes:
        one, at_once = step(full, kept)
        rows.append(("one shot", kept, one.predicted, at_once, one.observed, one.standard_error))
        next_, at_once = step(current, kept)
        at_once, error = observed + at_once, next_.standard_error
        current, predicted, observed = (
            next_.fit,
            predicted + next_.predicted,
            observed + next_.observed,
        )
        rows.append(("iterated", kept, predicted, at_once, observed, error))
        for row in rows[-2:]:
            print(f"{row[0]:9s} {row[1]:.2f}" + "".join(f"{v:9.1f}" for v in row[2:5]), flush=True)
    return pd.DataFrame(
        rows, columns=["path", "kept", "predicted", "at_once", "observed", "standard_error"]
    )


def draw(file: Path, results: pd.DataFrame) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for k, (path, group) in enumerate(
        results[results["path"] != "more training"].groupby("path", sort=False)
    ):
        pruned = 100 * (1 - group["kept"])
        for column, line in (("predicted", "--"), ("observed", "o-")):
            axes.plot(pruned, group[column], line, color=f"C{k}", label=f"{path}, {column}")
    axes.axhline(0, color="0.6", linewidth=1)
    axes.set(
        xlabel="weights pruned (%)",
        ylabel="ΔF (nats)",
        ylim=(min(-200, results["observed"].min()), None),
    )
    axes.legend(fontsize=8)
    save_figure(figure, file)


def write_page(page: Path, name: str, results: pd.DataFrame) -> None:
    """The table between the marks of the page."""
    columns = ["predicted", "at_once", "observed"]
    paths = [results[results["path"] == p].set_index("kept") for p in ("one shot", "iterated")]
    rows = [
        [f"{1 - kept:.0%}", *(f"{value:.1f}" for p in paths for value in p.loc[kept, columns])]
        for kept in paths[0].index
    ]
    more = results[results["path"] == "more training"]["observed"]
    note = (
        f"More training of the full model: {more.iloc[0]:.1f} nats, then {more.iloc[1]:.1f}."
        f" Standard error of an observed change: at most {results['standard_error'].max():.1f}."
    )
    head = [
        *("pruned", "one shot, predicted", "at once", "observed"),
        *("iterated, predicted", "at once", "observed"),
    ]
    fill(page, [*table(head, rows), "", note], name)


if __name__ == "__main__":
    main()
