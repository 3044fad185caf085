"""Fills the tables of docs/results/fashion_mnist.md from the folders of finished runs: `python
benchmarks/fashion_mnist.py`.

Each row names the command that made its folder; a folder that is not there is run first, so this is
the one command that regenerates the page.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path("results/fashion-mnist")
PAGE = Path("docs/results/fashion_mnist.md")
OURS = (
    "pyro-bmr compare --data fashion-mnist --model mlp --priors gaussian --routes reduced"
    " --reduce-every 1 --epochs 20 --seeds 3 --quiet"
)
BASELINE = (
    "python benchmarks/magnitude_pruning.py --data fashion-mnist --epochs 20 --seeds 3 --threads 1"
)
RUNS = {
    "evidence": (
        "reduced, the evidence decides, T = 1",
        f"{OURS} --temperature 1 --start 0.1 --stop 1",
    ),
    "cold-2": (
        "reduced to 1.95 %, T = 0.07",
        f"{OURS} --temperature 0.07 --kept 0.0195 --learning-rate 4e-3",
    ),
    "cold-6": (
        "reduced to 5.9 %, T = 0.1",
        f"{OURS} --temperature 0.1 --kept 0.059 --learning-rate 4e-3 --batch-size 256",
    ),
    "cold-6-calibrated": (
        "reduced to 5.9 %, T = 0.2",
        f"{OURS} --temperature 0.2 --kept 0.059 --learning-rate 4e-3 --batch-size 256",
    ),
    "magnitude-2": ("magnitude pruning to 1.95 %", f"{BASELINE} --kept 0.0195 --stop 0.5"),
    "magnitude-6": ("magnitude pruning to 5.9 %", f"{BASELINE} --kept 0.059 --stop 0.5"),
    "dense": ("dense point estimate", f"{BASELINE} --kept 1 --learning-rate 1e-3"),
}
COLUMNS = ["accuracy", "nll", "ece", "kept", "seconds"]


def main() -> None:
    rows, commands = [], []
    for name, (label, command) in RUNS.items():
        folder = ROOT / name
        if not finished(folder):
            words = shlex.split(command.replace("pyro-bmr", "python -m pyro_bmr", 1))
            subprocess.run(
                [
                    *(sys.executable if word == "python" else word for word in words),
                    "--out",
                    str(folder),
                ],
                check=True,
            )
        table = pd.read_csv(folder / "results.csv")
        for route, group in table.groupby("route", sort=False):
            suffix = ", temperature-scaled" if route == "temperature-scaled" else ""
            rows.append([label + suffix, *(cell(group[column], column) for column in COLUMNS)])
        commands.append(f"{command} --out {folder}")
    table_lines = [
        "| method | " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * (len(COLUMNS) + 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    page = PAGE.read_text(encoding="utf-8")
    for mark, lines in (("table", table_lines), ("commands", ["```", *commands, "```"])):
        before, after = page.split(f"<!-- {mark} -->")[0], page.split(f"<!-- end of {mark} -->")[1]
        page = before + "\n".join([f"<!-- {mark} -->", *lines, f"<!-- end of {mark} -->"]) + after
    PAGE.write_text(page, encoding="utf-8")


def finished(folder: Path) -> bool:
    """All three seeds, and of the baseline both variants."""
    path = folder / "results.csv"
    return (
        path.exists()
        and all(group["seed"].nunique() == 3 for _, group in pd.read_csv(path).groupby("route"))
        and len(pd.read_csv(path)) % 3 == 0
    )


def cell(values: pd.Series, column: str) -> str:
    digits = {"seconds": 0, "kept": 4}.get(column, 3)
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


if __name__ == "__main__":
    main()
