"""Tables for regression, and random splits of them as .npz: `python benchmarks/regression_tables.py
--data <folder> --out results/regression-data`.

`concrete`: strength of 1030 mixtures of 8 ingredients; `ames`: log10 of the price of 2930 homes,
the 33 columns of numbers; `boston`: median value of homes in 506 tracts, 13 regressors, only to
compare with old papers. They are in two Debian packages; R is not needed, `pip install rdata` is.
In a folder of your own:

    apt-get download r-cran-modeldata r-cran-mlbench
    for package in *.deb; do dpkg -x $package R; done

and `--data R/usr/lib/R/site-library` it is. Split k of a table holds out a tenth of its rows, drawn
with seed k.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import numpy as np
import pandas as pd
import rdata


def modeldata(library: Path, name: str) -> pd.DataFrame:
    folder = library / "modeldata/data"
    index = rdata.conversion.convert(
        rdata.parser.parse_file(folder / "Rdata.rdx", extension=".rds")
    )
    offset, length = index["variables"][name]
    packed = (folder / "Rdata.rdb").read_bytes()[offset : offset + length]
    if packed[4:5] != b"Z":  # R's code for xz, after the size in four bytes
        raise SystemExit(
            f"{folder}: the table {name} is not packed with xz; this reads r-cran-modeldata 1.1.0"
        )
    raw = lzma.decompress(
        packed[5:],
        lzma.FORMAT_RAW,
        filters=[{"id": lzma.FILTER_LZMA2, "preset": 6 | lzma.PRESET_EXTREME}],
    )
    return rdata.conversion.convert(
        rdata.parser.parse_data(raw, extension=".rds"), default_encoding="ASCII"
    )


def concrete(library: Path) -> pd.DataFrame:
    return modeldata(library, "concrete")


def ames(library: Path) -> pd.DataFrame:
    table = modeldata(library, "ames").select_dtypes("number")
    price = np.log10(table.pop("Sale_Price"))
    return table.assign(log10_price=price)


def boston(library: Path) -> pd.DataFrame:
    return rdata.read_rda(library / "mlbench/data/BostonHousing.rda")["BostonHousing"]


READERS = {"concrete": concrete, "ames": ames, "boston": boston}
"""Name → what reads the table, whose last column is the target."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--splits", type=int, default=5)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, reader in READERS.items():
        values = reader(arguments.data).to_numpy(dtype=float)
        for split in range(arguments.splits):
            order = np.random.default_rng(split).permutation(len(values))
            test, train = np.split(values[order], [len(values) // 10])
            arrays = {
                "x_train": train[:, :-1],
                "y_train": train[:, -1],
                "x_test": test[:, :-1],
                "y_test": test[:, -1],
            }
            np.savez(arguments.out / f"{name}-{split}.npz", **arrays)


if __name__ == "__main__":
    main()
