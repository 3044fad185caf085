"""What the options of several commands share, and the kinds that options have.

Owns the kinds `text`, `words`, `number`, `whole` and `flag`, and the shared options. Next:
`options.py`.
"""

from __future__ import annotations

from typing import Any

from pyro_bmr.data.named import sources
from pyro_bmr.experiments.models import model_names
from pyro_bmr.experiments.settings import AUTO, Settings
from pyro_bmr.likelihoods.names import LIKELIHOODS
from pyro_bmr.priors.names import PRIORS
from pyro_bmr.reduction.groups import GROUPS

Options = dict[str, dict[str, Any]]
"""Flag, or name of a positional argument → what argparse is told of it."""
USUAL = Settings()
PRIOR_NAMES = ", ".join([*PRIORS, "gaussian:SCALE"])
TARGETS = (
    "gaussian:0 (the point spike), gaussian:SCALE, gaussian (the scale with the best evidence),"
    " laplace, student-t, horseshoe, horseshoe:unit, spike-and-slab"
)


def text(default: str | None, metavar: str | None, help: str) -> dict[str, Any]:
    """An option that takes a word."""
    return {"default": default, "metavar": metavar, "help": help}


def words(default: list[str], metavar: str, help: str) -> dict[str, Any]:
    """An option that takes several words."""
    return {"nargs": "+", "default": default, "metavar": metavar, "help": help}


def number(default: float | None, metavar: str | None, help: str) -> dict[str, Any]:
    """An option that takes a number."""
    return {"type": float, "default": default, "metavar": metavar, "help": help}


def whole(default: int | None, metavar: str | None, help: str) -> dict[str, Any]:
    """An option that takes a whole number."""
    return {"type": int, "default": default, "metavar": metavar, "help": help}


def temperature(given: str) -> float | str:
    """The value of an option that is a number, or the word auto."""
    return given if given == AUTO else float(given)


def flag(help: str) -> dict[str, Any]:
    """An option that takes no value."""
    return {"action": "store_true", "help": help}


DRAWS = {"--draws": whole(USUAL.draws, "N", "posterior draws for predictions")}
DEVICE = {"--device": text("cpu", "NAME", "where it is computed: cpu, cuda, cuda:1, …")}
THREADS = {"--threads": whole(1, "N", "threads of torch; small networks are fastest with one")}


def jobs(usual: int) -> Options:
    """How many processes run at once."""
    about = "cells that run at once, each in a process; -1: one per core"
    return {"--jobs": whole(usual, "N", about)}


QUIET = {"--quiet": flag("no progress bar")}
VALIDATION = {
    "--validation": number(
        None, "FRACTION", "score a held-out part of the training rows instead of the test rows"
    )
}
SCHEDULE = {
    "--start": number(USUAL.start, "FRACTION", "of the fit, before the first reduction"),
    "--stop": number(USUAL.stop, "FRACTION", "of the fit, after which nothing more is pruned"),
}
PER = {
    "--per": text("weight", "GROUP", f"what is kept or pruned as one: weight, {', '.join(GROUPS)}"),
    "--heads": whole(None, "N", "the number of attention heads, for --per head"),
}


def problem() -> Options:
    """The model and the data."""
    own = (
        "sizes after a colon, as in mlp:500-500; or FILE.py with build(data, prior). By default"
        " mlp, or linear_regression for real targets with one noise"
    )
    data = f"{', '.join(sources())}, FILE.npz, FILE.csv, or a folder of IDX files"
    return {
        "--model": text(None, None, f"{', '.join(model_names())}; {own}"),
        "--data": text("digits", None, data),
        "--target": text(
            None, "COLUMN", "the column of FILE.csv to predict; several with commas between them"
        ),
        "--likelihood": text(
            None,
            "NAME",
            f"of the targets: {', '.join(LIKELIHOODS)}; options after a colon, as in"
            " poisson:exposure=COLUMN,weights=COLUMN or normal:missing=ignore. By default classes"
            " for texts and whole numbers, else normal",
        ),
    }
