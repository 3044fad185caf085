"""The results of a comparison on disk, which is also how an interrupted one goes on; tables as
text.

Owns `ResultsFolder`, `summary` and `markdown`, and `fingerprint`, which tells data and models
apart. Next: `compare.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import PyroBMRError
from pyro_bmr.experiments import plots
from pyro_bmr.experiments.cells import Cell, Settings
from pyro_bmr.exporting import save
from pyro_bmr.files import finite, make_folder, read_json, reading, write_atomically, write_json
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.predict import ClassPrediction
from pyro_bmr.priors import Gaussian, Prior
from pyro_bmr.reduction.reduce import quiet_reduction

if TYPE_CHECKING:
    import pandas as pd

_TEXT = ("model", "data", "prior", "route")
_MEASURES = ("accuracy", "rmse", "nll", "brier", "ece", "kept", "delta_f", "seconds")
_REAL = ("temperature", *_MEASURES)
_MEND = "remove its row from results.csv to fit it again"


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation over seeds, one row per prior and route, as text."""
    measures = [c for c in _MEASURES if c in table and table[c].notna().any()]

    def text(values: pd.Series[Any]) -> str:
        return mean_and_spread(str(values.name), values.mean(), values.std())

    return table.groupby(["prior", "route"], sort=False)[measures].agg(text).reset_index()


def mean_and_spread(measure: str, mean: float, spread: float) -> str:
    """``0.893 ± 0.002``, with the digits of the measure; without the spread where there is but one
    value.
    """
    digits = {
        "seconds": 1,
        "step_ratio": 2,
        "kilobytes": 1,
        "elbo": 0,
        "delta_f": 0,
        "kept": 4,
        "size": 4,
    }.get(measure, 3)
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


class ResultsFolder:
    """The results on disk: settings.json, results.csv (one row per finished cell), networks/,
    pictures/, report.md.
    """

    def __init__(
        self, path: Path, model: str, data: Data, settings: Settings, priors: Mapping[str, Prior]
    ) -> None:
        import pandas as pd

        self.path = path
        if (path / "posterior.safetensors").exists():  # whose settings.json would be replaced
            raise PyroBMRError(
                f"'{path}' holds a run of pyro-bmr fit; choose another folder for the comparison"
            )
        make_folder(path)
        self.settings = {
            "model": model,
            "data": data.name,
            "fingerprint": fingerprint(model, data),
            **settings.__dict__,
        }
        self.table = pd.DataFrame()
        # text stays text, whatever it looks like, and numbers are read back exactly
        if (path / "results.csv").exists():
            self.table = _table(path / "results.csv")
        kept = path / "settings.json"
        described = {
            name: repr(prior)
            for name, prior in priors.items()
            if type(prior).__repr__ is not object.__repr__
        }
        if not self.table.empty:
            # older folders do not say what had but one value then
            old = {**Settings().__dict__, **_settings(kept)}
            old_priors = old.get("priors", {})
            differences = [
                f"{key} was {old.get(key)!r}, is {value!r}"
                for key, value in self.settings.items()
                if old.get(key) != value
            ]
            differences += [
                f"prior '{name}' was {old_priors[name]}, is {text}"
                for name, text in described.items()
                if old_priors.get(name, text) != text
            ]
            described = {**old_priors, **described}
            if differences:
                raise PyroBMRError(
                    f"'{path}' holds results of other settings ({'; '.join(differences)}); choose"
                    " another folder, or remove it"
                )
        write_json(kept, finite({**self.settings, "priors": described}))

    def finished(self, prior: str, route: str, seed: int) -> dict[str, Any] | None:
        """The row of a cell that is there already.

        Raises:
            PyroBMRError: it is not the row that the report of its network has.
        """
        if self.table.empty:
            return None
        found = self.table[
            (self.table["prior"] == prior)
            & (self.table["route"] == route)
            & (self.table["seed"] == seed)
        ]
        if found.empty:
            return None
        row = {str(k): v for k, v in found.iloc[0].to_dict().items()}
        path = self.path / "networks" / f"{file_name(prior)}-{route}-{seed}" / "report.json"
        with reading(f"'{path}' is no report of a comparison", PyroBMRError, _MEND):
            kept = dict(json.loads(path.read_text(encoding="utf-8"))["row"])
        others = [
            name
            for name, value in kept.items()
            if row.get(name) != value and not (value is None and row.get(name) != row.get(name))
        ]
        if others:
            raise PyroBMRError(
                f"'{self.path / 'results.csv'}' and '{path}' differ in {', '.join(others)}: one of"
                f" them is damaged; {_MEND}"
            )
        return row

    def keep(self, row: dict[str, Any], cell: Cell, data: Data) -> None:
        """Weights and pictures first, the row last: a row in results.csv is a finished cell."""
        import pandas as pd

        name = f"{file_name(row['prior'])}-{row['route']}-{row['seed']}"
        sites = cell.reduction.table().to_dict("records") if cell.reduction else []
        about = {"row": row, "settings": self.settings, "sites": sites, "warnings": cell.warnings}
        calibration = (
            metrics.calibration(cell.prediction.probs, data.y_test).tolist()
            if isinstance(cell.prediction, ClassPrediction)
            else None
        )
        save(
            cell.weights,
            self.path / "networks" / name,
            finite({**about, "calibration": calibration}),
        )
        write_atomically(
            self.path / "networks" / name / "history.csv",
            lambda p: cell.fit.history.to_csv(p, index=False),
        )
        if cell.reduction is not None and row["route"] == "reduced" and row["seed"] == 0:
            make_folder(self.path / "pictures")
            # of the weights that survived the fit
            before = quiet_reduction(cell.fit.posterior, to=Gaussian(scale=0.0))
            plots.save_figure(
                plots.delta_f_histogram({k: s.spike_delta_f for k, s in before.sites.items()}),
                self.path / "pictures" / f"delta_f-{file_name(row['prior'])}.png",
            )
        self.table = pd.concat([self.table, pd.DataFrame([row])], ignore_index=True)
        write_atomically(
            self.path / "results.csv", lambda p: self.table.to_csv(p, index=False, na_rep="nan")
        )

    def report(self, table: pd.DataFrame) -> None:
        """Writes pictures and report.md."""
        make_folder(self.path / "pictures")
        calibration = {}
        for row in table[table["seed"] == 0].to_dict("records"):
            name = f"{file_name(row['prior'])}-{row['route']}-0"
            rows = calibration_of(self.path / "networks" / name / "report.json")
            if rows is not None:
                calibration[f"{row['prior']}, {row['route']}"] = rows
        plots.save_figure(
            plots.comparison_figure(table, calibration), self.path / "pictures" / "comparison.png"
        )
        drawn = [f"delta_f-{file_name(str(prior))}.png" for prior in sorted(set(table["prior"]))]
        pictures = [
            "comparison.png",
            *(name for name in drawn if (self.path / "pictures" / name).exists()),
        ]
        first = table.iloc[0]
        lines = [
            f"# {first['model']} on {first['data']}",
            "",
            (
                f"{table['seed'].nunique()} seeds, mean ± standard deviation;"
                f" {int(first['parameters']):,} parameters."
            ),
            "Settings: "
            + ", ".join(
                f"{key} {value}"
                for key, value in self.settings.items()
                if key not in ("model", "data", "fingerprint")
            )
            + ".",
            "",
            markdown(summary(table)),
            "",
            *(f"![{p.removesuffix('.png')}](pictures/{p})" for p in pictures),
            "",
        ]
        write_atomically(
            self.path / "report.md", lambda p: p.write_text("\n".join(lines), encoding="utf-8")
        )


def _table(path: Path) -> pd.DataFrame:
    import pandas as pd

    with reading(
        f"'{path}' is no table of a comparison", PyroBMRError, "remove it, or choose another folder"
    ):
        table = pd.read_csv(
            path,
            dtype=dict.fromkeys(_TEXT, str),
            converters=dict.fromkeys(_REAL, float),
            keep_default_na=False,
        )
        if missing := {"prior", "route", "seed"} - set(table.columns):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
    return table


def _settings(path: Path) -> dict[str, Any]:
    fault, mend = (
        f"'{path}' is no settings of a comparison",
        "choose another folder, or remove this one",
    )
    settings = read_json(path, fault, PyroBMRError, mend)
    with reading(fault, PyroBMRError, mend):
        if not isinstance(settings.get("priors", {}), dict):
            raise ValueError("no object of priors")
    return settings


def calibration_of(path: Path) -> Tensor | None:
    """The calibration in the report of a cell, (bins, 3); None for real targets.

    Raises:
        PyroBMRError: the file is no such report.
    """
    with reading(f"'{path}' is no report of a comparison", PyroBMRError, _MEND):
        rows = json.loads(path.read_text(encoding="utf-8"))["calibration"]
        calibration = None if rows is None else torch.tensor(rows, dtype=torch.float32)
        if calibration is not None and (calibration.ndim != 2 or calibration.shape[1] != 3):
            raise ValueError("calibration is no table of three columns")
    return calibration


def fingerprint(model: str, data: Data) -> str:
    """A hash of the data, and of the model if it is a file: results of others are never taken for
    these.
    """
    content = hashlib.sha256()
    for tensor in (data.x_train, data.y_train, data.x_test, data.y_test):
        content.update(tensor.cpu().contiguous().numpy().tobytes())
    path = Path(model.partition(":")[0])
    if path.suffix == ".py" and path.is_file():
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def file_name(prior: str) -> str:
    """The name of a prior as part of a path."""
    return prior.replace(":", "-").replace("/", "-")


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    rows = [
        list(map(str, table.columns)),
        ["---"] * table.shape[1],
        *(list(map(str, row)) for row in table.itertuples(index=False)),
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
