"""The command for tables: `pyro-bmr select`.

Owns `select`. The estimators, and scikit-learn with them, are imported when it runs. Next:
`commands.py`.
"""

from __future__ import annotations

import argparse
import shlex
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_bmr.data.csv_file import csv_table
from pyro_bmr.errors import DataError, warn
from pyro_bmr.experiments import plots
from pyro_bmr.experiments.page import Section, page
from pyro_bmr.experiments.report import markdown
from pyro_bmr.files import make_folder, write_atomically

if TYPE_CHECKING:
    import pandas as pd

_NUMBERS = ("normal", "student-t", "poisson", "negative-binomial")
_CLASSES = ("bernoulli", "categorical", "ordinal")
FAMILIES = (*_NUMBERS, *_CLASSES)
_COUNTS = ("poisson", "negative-binomial")
_INCLUSION = {"horseshoe": "probability of being shrunk by less than half"}
_FEW = 10  # different whole numbers: classes if the family says so, numbers otherwise


def select(arguments: argparse.Namespace) -> int:
    """Fits a table, prints its coefficients, and writes table, report and picture."""
    plots.headless()
    table, y = _read(Path(arguments.file), arguments.target)
    family = arguments.family or _family_of(y)
    model = _estimator(family, arguments)
    if arguments.folds > len(y):
        raise DataError(
            f"--folds: expected at most {len(y)}, the rows with a target, got {arguments.folds}"
        )
    if arguments.exposure not in (None, *table.columns):
        raise _no_column("--exposure", arguments.exposure, table)
    if family in _CLASSES:
        _check_classes(family, y, arguments.target)
        y = _ordered(y, arguments) if family == "ordinal" else y.astype(str)
    else:
        _check_numbers(family, y, arguments.target)
    make_folder(Path(arguments.out))
    model.fit(table, y)
    summary = model.summary()
    texts = _texts(summary)
    said = [_kept_words(model), *_alike_words(model)]
    said += [*_held_out_words(model, table, y, arguments.folds, arguments.seed)]
    print(texts.to_string(index=False))
    print("\n" + "\n".join(said))
    _write(Path(arguments.out), arguments, family, model, (summary, texts), said, (table, y))
    print(f"\ncoefficients.csv, report.html, report.md and pictures are in {arguments.out}")
    return 0


def _read(path: Path, target: str) -> tuple[pd.DataFrame, Any]:
    """The table without its target; rows without one are left out with a warning."""
    table = csv_table(path)
    if target not in table.columns:
        raise _no_column("--target", target, table)
    missing = table[target].isna()
    if missing.any():
        warn(f"{int(missing.sum())} rows without {target} are left out")
        table = table[~missing].reset_index(drop=True)
    if not len(table):
        raise DataError(f"'{path}': expected rows with a value of {target}, got none")
    return table.drop(columns=target), table[target]


def _no_column(option: str, name: str, table: pd.DataFrame) -> DataError:
    columns = ", ".join(map(str, table.columns))
    return DataError(f"{option}: expected one of the columns {columns}, got '{name}'")


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


def _check_numbers(family: str, y: Any, target: str) -> None:
    if y.dtype.kind not in "iuf":
        raise DataError(
            f"--family {family}: expected numbers in {target}, got others, such as"
            f" {y.iloc[0]!r}; mend them, or choose a family of classes"
        )


def _ordered(y: Any, arguments: argparse.Namespace) -> Any:
    """The classes in the order given, or that of numbers."""
    import pandas as pd

    if arguments.order is None:
        if y.dtype.kind in "iuf":
            return y
        names = ",".join(sorted(map(str, y.unique())))
        raise DataError(
            f"--family ordinal: expected --order with the classes of {arguments.target} from the"
            f" lowest on, since they are no numbers; such as --order {names} in their true order"
        )
    order = [name.strip() for name in arguments.order.split(",")]
    found = y.astype(str)
    if len(set(order)) < len(order) or not set(found) <= set(order):
        raise DataError(
            f"--order: expected each class of {arguments.target} once, {', '.join(found.unique())},"
            f" got {arguments.order}"
        )
    return found.astype(pd.CategoricalDtype(order, ordered=True))


def _estimator(family: str, arguments: argparse.Namespace) -> Any:
    from pyro_bmr import likelihoods
    from pyro_bmr.estimators import SparseClassifier, SparseRegressor

    if family not in FAMILIES:
        raise DataError(f"--family: expected one of {', '.join(FAMILIES)}, got '{family}'")
    for option, families in (("exposure", _COUNTS), ("order", ("ordinal",))):
        if getattr(arguments, option) is not None and family not in families:
            raise DataError(
                f"--{option}: expected --family {' or '.join(families)}, got {family}; leave it out"
            )
    options: dict[str, Any] = {
        "prior": arguments.prior,
        "steps": arguments.steps,
        "draws": arguments.draws,
        "random_state": arguments.seed,
    }
    if family in _CLASSES:
        # the others follow from the number of classes
        kind = "ordinal" if family == "ordinal" else "categorical"
        return SparseClassifier(family=kind, **options)
    if arguments.exposure is None:
        return SparseRegressor(family=family, **options)
    counts = likelihoods.Poisson if family == "poisson" else likelihoods.NegativeBinomial
    return SparseRegressor(family=counts(exposure=arguments.exposure), **options)


def _texts(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary with its names as columns, and numbers of four digits."""
    texts = summary.copy()
    for name in summary.columns:
        form = "{:.3f}" if name == "inclusion" else "{:.2f}" if name == "delta_f" else "{:.4g}"
        texts[name] = ["" if np.isnan(value) else form.format(value) for value in summary[name]]
    return texts.reset_index()


def _kept_words(model: Any) -> str:
    terms = {
        term.name: kept
        for term, kept in zip(
            model.columns_.terms, _by_term(model, model.kept_), strict=True
        )
    }  # fmt: skip
    kept = [name for name, keep in terms.items() if keep]
    return f"{len(kept)} of {len(terms)} terms are kept: {', '.join(kept) or 'none'}."


def _alike_words(model: Any) -> list[str]:
    from pyro_bmr.estimators.columns import alike_names

    if not model.alike_:
        return []
    return [f"Nearly the same, so that they share their inclusion: {alike_names(model.alike_)}."]


def _by_term(model: Any, values: Any) -> Any:
    return values[np.unique(model.columns_.term_of_name, return_index=True)[1]]


def _held_out_words(model: Any, table: Any, y: Any, folds: int, seed: int) -> list[str]:
    """How well rows are predicted that the fit did not have, in a sentence."""
    if folds < 2:
        return []
    from sklearn.base import clone
    from sklearn.model_selection import KFold

    from pyro_bmr.estimators.table_model import ALIKE

    classes = hasattr(model, "classes_")
    found: list[Any] = []
    for train, test in KFold(folds, shuffle=True, random_state=seed).split(table):
        with warnings.catch_warnings():  # said of all rows
            warnings.filterwarnings("ignore", ALIKE)
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
    explained = f"R² {1 - error.sum() / usual.sum():.3f}, " if usual.any() else ""
    return [
        f"{where} {explained}RMSE {error.mean() ** 0.5:.4g};"
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
    inclusion = _INCLUSION.get(arguments.prior, "probability of inclusion")
    caption = (
        "Coefficients (mean and 90 % interval, times the standard deviation of their column), their"
        f" {inclusion}, and the rows of the fit."
    )
    title = f"{arguments.target} in {Path(arguments.file).name}"
    state = f"{len(rows[1])} rows, family {family}, prior {arguments.prior}."
    command = (
        f"pyro-bmr select {shlex.quote(arguments.file)} --target {shlex.quote(arguments.target)}"
        f" --family {family} --prior {arguments.prior} --seed {arguments.seed}"
    )
    for option in ("exposure", "order"):
        if getattr(arguments, option) is not None:
            command += f" --{option} {shlex.quote(getattr(arguments, option))}"
    lines = [f"# {title}", "", state, "", *(f"- {line}" for line in said), "", markdown(texts)]
    lines += ["", f"![{caption}](pictures/fit.png)", "", f"Made with `{command}`.", ""]
    numbers = summary.reset_index()
    section = Section("Fit", said, [(caption, (folder / "pictures" / "fit.png").read_bytes())])
    html = page(title, state, texts, numbers, [section], {}, {"Command": command})
    for name, text in {"report.md": "\n".join(lines), "report.html": html}.items():
        write_atomically(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
