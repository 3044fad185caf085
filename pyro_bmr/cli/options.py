"""The options of the command line, as data: which command has which, with their help.

Owns `parser`. What the commands do is in `grids.py` and `networks.py`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from pyro_bmr.cli.parsers import Help, Parser, without_command
from pyro_bmr.data.named import sources
from pyro_bmr.experiments.baseline_cells import IN_COMPARISONS
from pyro_bmr.experiments.models import model_names
from pyro_bmr.experiments.settings import GUIDES, OPTIMIZERS, ROUTES, Settings
from pyro_bmr.exporting.formats import FORMATS
from pyro_bmr.guides.row_noise import PER_ROW, PER_STEP
from pyro_bmr.priors.names import PRIORS
from pyro_bmr.reduction.groups import GROUPS

Command = Callable[[argparse.Namespace], int]
Options = dict[str, dict[str, Any]]
"""Flag, or name of a positional argument → what argparse is told of it."""
_PRIORS = ", ".join([*PRIORS, "gaussian:SCALE"])
TARGETS = (
    "gaussian:0 (the point spike), gaussian:SCALE, gaussian (the scale with the best evidence),"
    " laplace, student-t, horseshoe, horseshoe:unit, spike-and-slab"
)
_USUAL = Settings()


def parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of the command line, which sets `run` to the function of the command that was
    given.
    """
    description = (
        "Sparse Bayesian networks by Bayesian model reduction: compare priors in one table, or fit,"
        " reduce and export one network step by step."
    )
    whole = Parser(
        prog="pyro-bmr",
        description=description,
        epilog="pyro-bmr COMMAND --help has the options of each command.",
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {version('pyro_bmr')}")
    whole.set_defaults(run=without_command(whole))
    added_to = whole.add_subparsers(metavar="COMMAND")
    for name, (about, more, options) in _COMMANDS.items():
        added = added_to.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}. {more}",
            formatter_class=Help,
        )
        added.set_defaults(run=commands[name])
        for flag, rules in options().items():
            added.add_argument(flag, **rules)
    return whole


def _text(default: str | None, metavar: str | None, help: str) -> dict[str, Any]:
    return {"default": default, "metavar": metavar, "help": help}


def _words(default: list[str], metavar: str, help: str) -> dict[str, Any]:
    return {"nargs": "+", "default": default, "metavar": metavar, "help": help}


def _number(default: float | None, metavar: str | None, help: str) -> dict[str, Any]:
    return {"type": float, "default": default, "metavar": metavar, "help": help}


def _whole(default: int | None, metavar: str | None, help: str) -> dict[str, Any]:
    return {"type": int, "default": default, "metavar": metavar, "help": help}


def _flag(help: str) -> dict[str, Any]:
    return {"action": "store_true", "help": help}


_DRAWS = {"--draws": _whole(_USUAL.draws, "N", "posterior draws for predictions")}
_THREADS = {"--threads": _whole(1, "N", "threads of torch; small networks are fastest with one")}


def _jobs(usual: int) -> Options:
    about = "cells that run at once, each in a process; -1: one per core"
    return {"--jobs": _whole(usual, "N", about)}


_QUIET = {"--quiet": _flag("no progress bar")}
_VALIDATION = {
    "--validation": _number(
        None, "FRACTION", "score a held-out part of the training rows instead of the test rows"
    )
}
_SCHEDULE = {
    "--start": _number(_USUAL.start, "FRACTION", "of the fit, before the first reduction"),
    "--stop": _number(_USUAL.stop, "FRACTION", "of the fit, after which nothing more is pruned"),
}
_GROUPS = {
    "--per": _text(
        "weight", "GROUP", f"what is kept or pruned as one: weight, {', '.join(GROUPS)}"
    ),
    "--heads": _whole(None, "N", "the number of attention heads, for --per head"),
}


def _problem() -> Options:
    own = (
        "sizes after a colon, as in mlp:500-500; or FILE.py with build(data, prior). By default"
        " mlp, or linear_regression for real targets"
    )
    data = f"{', '.join(sources())}, FILE.npz, FILE.csv, or a folder of IDX files"
    return {
        "--model": _text(None, None, f"{', '.join(model_names())}; {own}"),
        "--data": _text("digits", None, data),
        "--target": _text(None, "COLUMN", "the column of FILE.csv to predict"),
    }


def _fit_options() -> Options:
    rates = ", ".join(f"{rate:g} for {name}" for name, (_, rate) in OPTIMIZERS.items())
    estimators = ", ".join((*PER_STEP, *PER_ROW))
    return {
        "--epochs": _whole(None, "N", "passes over the training rows; by default 3,000 steps"),
        "--batch-size": _whole(_USUAL.batch_size, "ROWS", "rows of a step"),
        "--optimizer": _text(
            None, "NAME", f"{', '.join(OPTIMIZERS)}; by default the second for mean field"
        ),
        "--learning-rate": _number(None, "RATE", f"by default {rates}; it falls to 0 over the fit"),
        "--guide": _text(_USUAL.guide, "NAME", f"of all but map: {', '.join(GUIDES)}"),
        "--estimator": _text(_USUAL.estimator, "NAME", f"of mean field's gradient: {estimators}"),
        "--temperature": _number(
            None,
            "T",
            "1 is Bayes; less counts the data more often. By default 1 for real targets; for"
            " classes 1 (map), 0.1 (fitted) and 0.3 (reduced)",
        ),
    }


def _reductions(kept: str, every: str) -> Options:
    return {
        "--kept": _number(None, "FRACTION", kept),
        "--reduce-every": _number(None, "EPOCHS", every),
        **_SCHEDULE,
    }


def _compare() -> Options:
    return {
        **_problem(),
        "--priors": _words(["gaussian:layer", "horseshoe", "spike-and-slab"], "PRIOR", _PRIORS),
        "--routes": _words(
            list(ROUTES), "ROUTE", "maximum a posteriori, fitted under the prior, reduced to it"
        ),
        "--baselines": {
            "nargs": "*",
            "metavar": "NAME",
            "help": f"rows of plain torch: {', '.join(IN_COMPARISONS)}; by default those that the"
            " model and the routes allow, after the flag alone none",
        },
        "--seeds": _whole(2, "N", "seeds 0 … N − 1"),
        **_fit_options(),
        **_reductions(
            "target fraction of weights for the reduced route and fitted shrinkage priors; by"
            " default the evidence decides",
            "interval of reductions during the fit; by default a tenth of it",
        ),
        "--widen": _number(
            _USUAL.widen, "FACTOR", "of the posterior variances in predictions; 1 is as fitted"
        ),
        "--calibrate": _flag(
            "find that factor on a sixth of the training rows, which the fits do without"
        ),
        **_VALIDATION,
        **_DRAWS,
        **_THREADS,
        **_jobs(min(2, os.cpu_count() or 1)),
        "--out": _text(
            "results/compare", "DIR", "folder of the results; finished cells in it are kept"
        ),
        **_QUIET,
    }


def _study() -> Options:
    return {
        "file": {"metavar": "FILE", "help": "the declaration, a TOML file"},
        "--out": _text(
            "results/study", "DIR", "folder of the results; finished cells in it are kept"
        ),
        **_jobs(1),
        "--only": _words([], "NAME", "run these methods and no others"),
        "--seeds": _whole(None, "N", "seeds 0 … N − 1 in the place of the declared ones"),
        **_VALIDATION,
        "--list": _flag(
            "print the cells, which are finished and what the others may take, and run nothing"
        ),
        **_QUIET,
    }


def _fit() -> Options:
    return {
        **_problem(),
        "--prior": _text("gaussian:layer", None, _PRIORS),
        "--map": _flag("the maximum a posteriori, which cannot be reduced"),
        "--seed": _whole(0, None, "of everything random"),
        **_fit_options(),
        "--reduce-to": _text(None, "PRIOR", f"reduce during the fit, too, to one of: {TARGETS}"),
        **_GROUPS,
        **_reductions(
            "target fraction of weights for these reductions; by default the evidence decides",
            "interval of these reductions; by default a tenth of the fit",
        ),
        **_DRAWS,
        **_THREADS,
        "--resume": _flag(
            "save the fit in RUN/checkpoints as it runs, and go on from there if it was stopped"
            " before"
        ),
        "--out": _text("results/run", "RUN", "folder of the run"),
        **_QUIET,
    }


def _reduce() -> Options:
    folder = "folder of a run of pyro-bmr fit, or of a cell; the reduction is saved in it"
    return {
        "run_folder": {"metavar": "RUN", "help": folder},
        "--to": _text("gaussian:0", "PRIOR", TARGETS),
        **_GROUPS,
        "--threshold": _number(
            0.0, "NATS", "by how much the evidence has to rise without a weight or group"
        ),
        "--kept": _number(
            None, "FRACTION", "instead of the threshold, the fraction of weights that is kept"
        ),
        **_DRAWS,
    }


def _export() -> Options:
    folder = "folder of a run or of a cell; its last reduction is exported if it has one"
    return {
        "run_folder": {"metavar": "RUN", "help": folder},
        "--format": _words(["safetensors"], "FORMAT", ", ".join(FORMATS)),
        "--shrink": _flag("remove units, channels and heads without a kept weight"),
        "--ensemble": _whole(0, "N", "draws of the posterior to export as well"),
        "--unreduced": _flag("export the posterior of the fit, whatever was reduced after it"),
        "--seconds": _number(0.3, None, "length of each measurement of a latency"),
        **_THREADS,
        "--out": _text("results/export", "DIR", "folder of the files"),
    }


def _prune() -> Options:
    return {
        **_problem(),
        "--weights": {
            "required": True,
            "metavar": "FILE.safetensors",
            "help": "the trained weights, a state_dict of the model",
        },
        "--kept": {
            "required": True,
            "metavar": "FRACTION",
            "help": "of the weights; or a pattern, such as 2:4",
        },
        **_GROUPS,
        "--rows": _whole(10_000, "N", "training rows that are used"),
        "--corrections": _whole(1, "N", "Gauss–Newton steps after each round"),
        "--most-rise": _number(
            None, "NATS", "stop where the outputs are further than this from the dense network's"
        ),
        "--noise": _number(
            None, "STD", "of real targets; by default the error on the training rows"
        ),
        "--seed": _whole(0, None, "of everything random"),
        "--format": _words(["safetensors"], "FORMAT", ", ".join(FORMATS)),
        "--shrink": _flag("remove units, channels and heads without a kept weight"),
        "--seconds": _number(0.3, None, "length of each measurement of a latency"),
        **_THREADS,
        "--resume": _flag("save each round in DIR/rounds, and go on from there after a stop"),
        "--out": _text("results/pruned", "DIR", "folder of the files"),
        **_QUIET,
    }


def _select() -> Options:
    families = (
        "normal, poisson, negative-binomial, bernoulli, categorical; by default normal for a target"
        " of numbers"
    )
    return {
        "file": {
            "metavar": "FILE.csv",
            "help": "a table with a header; texts and gaps are welcome",
        },
        "--target": {"required": True, "metavar": "COLUMN", "help": "the column to predict"},
        "--family": _text(None, "NAME", f"{families}, and classes for one of texts"),
        "--prior": _text("spike-and-slab", None, "spike-and-slab, horseshoe, gaussian"),
        "--steps": _whole(None, "N", "of each run of the search; by default 1,000 or 200"),
        "--draws": _whole(2000, "N", "posterior draws"),
        "--folds": _whole(5, "N", "of the cross-validation; 0: none"),
        "--seed": _whole(0, None, "of everything random"),
        "--out": _text("results/select", "DIR", "folder of the results"),
    }


_COMMANDS: dict[str, tuple[str, str, Callable[[], Options]]] = {
    "compare": (
        "fit and score each prior by each route with each seed, in one table",
        "Finished cells are not run again.",
        _compare,
    ),
    "study": (
        "run a declared grid of models, data, methods and seeds, and report it",
        "Finished cells are not run again; see docs/studies.md.",
        _study,
    ),
    "fit": (
        "fit one network and save it as a run",
        "pyro-bmr reduce and pyro-bmr export take the run from there.",
        _fit,
    ),
    "reduce": (
        "say which weights of a run the evidence does without, and prune them",
        "No new fit; the run keeps the posterior of the fit.",
        _reduce,
    ),
    "export": (
        "write a run as plain torch, smaller if asked, in several formats",
        "The files load without pyro_bmr.",
        _export,
    ),
    "prune": (
        "prune a network that is trained already, without training it",
        "No labels are needed; see docs/tutorial_pruning.md.",
        _prune,
    ),
    "select": (
        "say which columns of a table predict its target, and how sure that is",
        "Texts and missing values are encoded; see docs/tables.md.",
        _select,
    ),
    "data": (
        "list the data sets: which are installed, how to install the others",
        "Files of your own need no installing: see --data.",
        dict,
    ),
}
"""Name → what it does, a line more of its help, its options."""
