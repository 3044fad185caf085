"""Predicted against observed change of free energy along a pruning path: `python benchmarks/refit.py --data <folder>`.

Concrete strength (1030 mixtures, 8 ingredients), a network 8-50-1 with ReLU, mean field, all rows. The data come from the Debian package r-cran-modeldata; R is
not needed: `apt-get download r-cran-modeldata && dpkg -x r-cran-modeldata_*.deb modeldata`, and the folder is modeldata/usr/lib/R/site-library/modeldata/data.
Reading it needs `pip install rdata`.

One shot: every size is reduced from the one fit of the full model, and refitted. Iterated: every size is reduced from the refit of the size before; its
prediction is the sum of those along the way. The free energies are those of the fits, 256 draws each, with the same noise; each refit starts where its
reduction ends. `more training` is the gain of the full model, trained on for as long as one refit: what of an observed gain is not due to the reduction.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import rdata
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.plots import headless, save_figure

KEPT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03)


def concrete(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 ingredients and the strength, standardised, in float64."""
    index = rdata.conversion.convert(rdata.parser.parse_file(folder / "Rdata.rdx", extension=".rds"))
    offset, length = index["variables"]["concrete"]
    packed = (folder / "Rdata.rdb").read_bytes()[offset : offset + length]
    if packed[4:5] != b"Z":  # R's code for xz, after the size in four bytes
        raise SystemExit(f"{folder}: the table concrete is not packed with xz; this reads r-cran-modeldata 1.1.0")
    raw = lzma.decompress(packed[5:], lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6 | lzma.PRESET_EXTREME}])
    table = rdata.conversion.convert(rdata.parser.parse_data(raw, extension=".rds"))
    values = torch.tensor(table.to_numpy(dtype=float))
    values = (values - values.mean(0)) / values.std(0)
    return values[:, :-1], values[:, -1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="of the prior of every weight")
    parser.add_argument("--epochs", type=int, default=1500)
    parser.add_argument("--refit-epochs", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--refit-learning-rate", type=float, default=5e-3)
    parser.add_argument("--batch-size", type=int, default=206)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/refit"))
    parser.add_argument("--kept", type=float, nargs="+", default=KEPT)
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--page", type=Path, default=Path("docs/results/refit.md"), help="whose table and picture to fill")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    headless()
    data = concrete(settings.data)
    torch.manual_seed(settings.seed)
    net = nn.Sequential(nn.Linear(8, 50), nn.ReLU(), nn.Linear(50, 1)).double()
    model = bmr.BayesianNetwork(net, bmr.Gaussian(settings.scale), bmr.Normal())
    common = {"batch_size": settings.batch_size, "seed": settings.seed, "progress": False}
    full = bmr.fit(model, data, epochs=settings.epochs, optimizer=bmr.adam(settings.learning_rate), **common)
    again = {**common, "epochs": settings.refit_epochs, "optimizer": bmr.adam(settings.refit_learning_rate), "draws": settings.draws}
    spike = bmr.Gaussian(0)
    more = bmr.refit(full, bmr.reduce(full.posterior, to=spike, kept=1.0), data, **again)
    full = more.fit
    rows = [("more training", 1.0, 0.0, more.observed, more.standard_error)]
    control = bmr.refit(full, bmr.reduce(full.posterior, to=spike, kept=1.0), data, **again)
    rows.append(("more training", 1.0, 0.0, control.observed, control.standard_error))
    current, predicted, observed = full, 0.0, 0.0
    for kept in settings.kept:
        one = bmr.refit(full, bmr.reduce(full.posterior, to=spike, kept=kept), data, **again)
        rows.append(("one shot", kept, one.predicted, one.observed, one.standard_error))
        step = bmr.refit(current, bmr.reduce(current.posterior, to=spike, kept=kept), data, **again)
        current, predicted, observed = step.fit, predicted + step.predicted, observed + step.observed
        rows.append(("iterated", kept, predicted, observed, step.standard_error))
        print(*(f"{row[0]:9s} {row[1]:.2f} {row[2]:9.1f} {row[3]:9.1f}" for row in rows[-2:]), sep=" | ", flush=True)
    table = pd.DataFrame(rows, columns=["path", "kept", "predicted", "observed", "standard_error"])
    settings.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(settings.out / "results.csv", index=False)
    (settings.out / "settings.json").write_text(json.dumps({k: str(v) for k, v in vars(settings).items()}, indent=1))
    print(table.to_string())
    if settings.page.exists():
        write_page(settings.page, table)
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for k, (path, group) in enumerate(table[table["path"] != "more training"].groupby("path", sort=False)):
            axes.plot(100 * (1 - group["kept"]), group["predicted"], "--", color=f"C{k}", label=f"{path}, predicted")
            axes.plot(100 * (1 - group["kept"]), group["observed"], "o-", color=f"C{k}", label=f"{path}, observed")
        axes.axhline(0, color="0.6", linewidth=1)
        axes.set(xlabel="weights pruned (%)", ylabel="ΔF (nats)", ylim=(min(-200, table["observed"].min()), None))
        axes.legend(fontsize=8)
        save_figure(figure, settings.page.with_suffix(".png"))


def write_page(page: Path, table: pd.DataFrame) -> None:
    """The table between the marks of the page."""
    lines = ["| pruned | one shot, predicted | observed | iterated, predicted | observed |", "|---|---|---|---|---|"]
    for kept in table[table["path"] == "one shot"]["kept"]:
        both = [table[(table["path"] == path) & (table["kept"] == kept)].iloc[0] for path in ("one shot", "iterated")]
        lines.append(f"| {1 - kept:.0%} | " + " | ".join(f"{row['predicted']:.1f} | {row['observed']:.1f}" for row in both) + " |")
    more, error = table[table["path"] == "more training"]["observed"], table["standard_error"].max()
    lines += [
        "",
        f"More training of the full model: {more.iloc[0]:.1f} nats, then {more.iloc[1]:.1f}. Standard error of an observed change: at most {error:.1f}.",
    ]
    text = page.read_text(encoding="utf-8")
    before, after = text.split("<!-- table -->")[0], text.split("<!-- end of table -->")[1]
    page.write_text(before + "\n".join(["<!-- table -->", *lines, "<!-- end of table -->"]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
