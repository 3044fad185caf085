"""The command for tables: `pyro-bmr select`.

Owns `select`. The estimators, and scikit-learn with them, are imported when it runs. Next:
`commands.py`.
"""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_bmr.errors import DataError, warn
from pyro_bmr.experiments import plots
from pyro_bmr.experiments.page import Section, page
from pyro_bmr.experiments.report import markdown
from pyro_bmr.files import make_folder, reading, write_atomically

if TYPE_CHECKING:
    import pandas as pd

FAMILIES = ("normal", "poisson", "negative-binomial", "bernoulli", "categorical")
_FEW = 10  # different whole numbers: classes if the family says so, numbers otherwise


def select(arguments: argparse.Namespace) -> int:
    """Fits a table, prints its coefficients, and writes table, report and picture."""
    plots.headless()
    table, y = _read(Path(arguments.file), arguments.target)
    family = arguments.family or _family_of(y)
    model = _estimator(family, arguments)
    if family in ("bernoulli", "categorical"):
        _check_classes(family, y, arguments.target)
        y = y.astype(str)
    make_folder(Path(arguments.out))
    model.fit(table, y)
    summary = model.summary()
    texts = _texts(summary)
    said = [_kept_words(model), *_held_out_words(model, table, y, arguments.folds, arguments.seed)]
    print(texts.to_string(index=False))
    print("\n" + "\n".join(said))
    _write(Path(arguments.out), arguments, family, model, (summary, texts), said, (table, y))
    print(f"\ncoefficients.csv, report.html, report.md and pictures are in {arguments.out}")
    return 0


def _read(path: Path, target: str) -> tuple[pd.DataFrame, Any]:
    """The table without its target; rows without one are left out with a warning."""
    import pandas as pd

    with reading(f"'{path}' is not a readable .csv file", DataError, "give it a header and rows"):
        table = pd.read_csv(path)
    if target not in table.columns:
        raise DataError(
            f"--target: expected one of the columns {', '.join(map(str, table.columns))}, got"
            f" '{target}'"
        )
    missing = table[target].isna()
    if missing.any():
        warn(f"{int(missing.sum())} rows without {target} are left out")
        table = table[~missing].reset_index(drop=True)
    return table.drop(columns=target), table[target]


def _family_of(y: Any) -> str:
    """By the kind of the target: numbers are "normal", texts and truth values are classes."""
    if y.dtype.kind in "iuf":
        return "normal"
    return "bernoulli" if y.nunique() == 2 else "categorical"


def _check_classes(family: str, y: Any, target: str) -> None:
    found, expected = y.nunique(), "2" if family == "bernoulli" else "at least 2"
    most = 2 if family == "bernoulli" else max(_FEW, int(len(y) ** 0.5))
    if not 2 <= found <= most:
        raise DataError(
            f"--family {family}: expected {expected} classes in {target}, got {found} different"
            " values; choose another --family or --target"
        )


def _estimator(family: str, arguments: argparse.Namespace) -> Any:
    from pyro_bmr.estimators import SparseClassifier, SparseRegressor

    if family not in FAMILIES:
        raise DataError(f"--family: expected one of {', '.join(FAMILIES)}, got '{family}'")
    options: dict[str, Any] = {
        "prior": arguments.prior,
        "steps": arguments.steps,
        "draws": arguments.draws,
        "random_state": arguments.seed,
    }
    if family in ("bernoulli", "categorical"):
        return SparseClassifier(**options)
    return SparseRegressor(family=family, **options)


def _texts(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary with its names as columns, and numbers of four digits."""
    texts = summary.copy()
    for name in summary.columns:
        form = "{:.3f}" if name == "inclusion" else "{:.2f}" if name == "delta_f" else "{:.4g}"
        texts[name] = ["" if np.isnan(value) else form.format(value) for value in summary[name]]
    return texts.reset_index()


def _kept_words(model: Any) -> str:
    terms = {
        term.names[0].partition("=")[0] if len(term.names) > 1 else term.names[0]: kept
        for term, kept in zip(
            model.columns_.terms, _by_term(model, model.kept_), strict=True
        )
    }  # fmt: skip
    kept = [name for name, keep in terms.items() if keep]
    return f"{len(kept)} of {len(terms)} terms are kept: {', '.join(kept) or 'none'}."


def _by_term(model: Any, values: Any) -> Any:
    return values[np.unique(model.columns_.term_of_name, return_index=True)[1]]


def _held_out_words(model: Any, table: Any, y: Any, folds: int, seed: int) -> list[str]:
    """How well rows are predicted that the fit did not have, in a sentence."""
    if folds < 2:
        return []
    from sklearn.base import clone
    from sklearn.model_selection import KFold

    classes = hasattr(model, "classes_")
    found: list[Any] = []
    for train, test in KFold(folds, shuffle=True, random_state=seed).split(table):
        part = clone(model).fit(table.iloc[train], y.iloc[train])
        rows, truth = table.iloc[test], y.iloc[test].to_numpy()
        if classes:
            probability = part.predict_proba(rows)
            found.append(np.stack([part.classes_[probability.argmax(1)] == truth]))
        else:
            low, high = part.predict_interval(rows).T
            base = np.full(len(test), y.iloc[train].mean())
            parts = [part.predict(rows), base, truth, (low <= truth) & (truth <= high)]
            found.append(np.stack([np.asarray(row, dtype=np.float64) for row in parts]))
    rows_ = np.concatenate(found, 1)
    where = f"Of rows held out, {folds} folds:"
    if classes:
        share = y.value_counts(normalize=True).iloc[0]
        return [f"{where} accuracy {rows_[0].mean():.3f}; the most frequent class has {share:.3f}."]
    mean, base, truth, inside = rows_
    error, usual = ((truth - guess) ** 2 for guess in (mean, base))
    return [
        f"{where} R² {1 - error.sum() / usual.sum():.3f}, RMSE {error.mean() ** 0.5:.4g};"
        f" {100 * inside.mean():.0f} % are in their 90 % interval."
    ]


def _write(
    folder: Path,
    arguments: argparse.Namespace,
    family: str,
    model: Any,
    tables: tuple[pd.DataFrame, pd.DataFrame],
    said: list[str],
    rows: tuple[Any, Any],
) -> None:
    summary, texts = tables
    write_atomically(folder / "coefficients.csv", lambda path: summary.to_csv(path, na_rep="nan"))
    make_folder(folder / "pictures")
    plots.save_figure(model.plot(*rows), folder / "pictures" / "fit.png")
    caption = (
        "Coefficients (mean and 90 % interval, times the standard deviation of their column), their"
        " probability of inclusion, and the rows of the fit."
    )
    title = f"{arguments.target} in {Path(arguments.file).name}"
    state = f"{len(rows[1])} rows, family {family}, prior {arguments.prior}."
    command = (
        f"pyro-bmr select {shlex.quote(arguments.file)} --target {shlex.quote(arguments.target)}"
        f" --family {family} --prior {arguments.prior} --seed {arguments.seed}"
    )
    lines = [f"# {title}", "", state, "", *(f"- {line}" for line in said), "", markdown(texts)]
    lines += ["", f"![{caption}](pictures/fit.png)", "", f"Made with `{command}`.", ""]
    numbers = summary.reset_index()
    section = Section("Fit", said, [(caption, (folder / "pictures" / "fit.png").read_bytes())])
    html = page(title, state, texts, numbers, [section], {}, {"Command": command})
    for name, text in {"report.md": "\n".join(lines), "report.html": html}.items():
        write_atomically(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
