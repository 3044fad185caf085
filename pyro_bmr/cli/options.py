"""The options of the command line, as data: which command has which, with their help.

Owns `parser`. What the commands do is in `grids.py`, `networks.py` and `trained.py`; options that
several of them have are in `shared_options.py`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version

from pyro_bmr.cli.parsers import Help, Parser, without_command
from pyro_bmr.cli.shared_options import (
    DRAWS,
    PER,
    PRIOR_NAMES,
    QUIET,
    SCHEDULE,
    TARGETS,
    THREADS,
    USUAL,
    VALIDATION,
    Options,
    flag,
    jobs,
    number,
    problem,
    text,
    whole,
    words,
)
from pyro_bmr.experiments.baseline_cells import IN_COMPARISONS
from pyro_bmr.experiments.settings import GUIDES, OPTIMIZERS, ROUTES
from pyro_bmr.exporting.formats import FORMATS
from pyro_bmr.guides.row_noise import PER_ROW, PER_STEP

Command = Callable[[argparse.Namespace], int]


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
        for name_or_flag, rules in options().items():
            added.add_argument(name_or_flag, **rules)
    return whole


def _fit_options() -> Options:
    rates = ", ".join(f"{rate:g} for {name}" for name, (_, rate) in OPTIMIZERS.items())
    estimators = ", ".join((*PER_STEP, *PER_ROW))
    return {
        "--epochs": whole(None, "N", "passes over the training rows; by default 3,000 steps"),
        "--batch-size": whole(USUAL.batch_size, "ROWS", "rows of a step"),
        "--optimizer": text(
            None, "NAME", f"{', '.join(OPTIMIZERS)}; by default the second for mean field"
        ),
        "--learning-rate": number(None, "RATE", f"by default {rates}; it falls to 0 over the fit"),
        "--guide": text(USUAL.guide, "NAME", f"of all but map: {', '.join(GUIDES)}"),
        "--estimator": text(USUAL.estimator, "NAME", f"of mean field's gradient: {estimators}"),
        "--temperature": number(
            None,
            "T",
            "1 is Bayes; less counts the data more often. By default 1 for real targets; for"
            " classes 1 (map), 0.1 (fitted) and 0.3 (reduced)",
        ),
    }


def _reductions(kept: str, every: str) -> Options:
    return {
        "--kept": number(None, "FRACTION", kept),
        "--reduce-every": number(None, "EPOCHS", every),
        **SCHEDULE,
    }


def _compare() -> Options:
    return {
        **problem(),
        "--priors": words(["gaussian:layer", "horseshoe", "spike-and-slab"], "PRIOR", PRIOR_NAMES),
        "--routes": words(
            list(ROUTES), "ROUTE", "maximum a posteriori, fitted under the prior, reduced to it"
        ),
        "--baselines": {
            "nargs": "*",
            "metavar": "NAME",
            "help": f"rows of plain torch: {', '.join(IN_COMPARISONS)}; by default those that the"
            " model and the routes allow, after the flag alone none",
        },
        "--seeds": whole(2, "N", "seeds 0 … N − 1"),
        **_fit_options(),
        **_reductions(
            "target fraction of weights for the reduced route and fitted shrinkage priors; by"
            " default the evidence decides",
            "interval of reductions during the fit; by default a tenth of it",
        ),
        "--widen": number(
            USUAL.widen, "FACTOR", "of the posterior variances in predictions; 1 is as fitted"
        ),
        "--calibrate": flag(
            "find that factor on a sixth of the training rows, which the fits do without"
        ),
        **VALIDATION,
        **DRAWS,
        **THREADS,
        **jobs(min(2, os.cpu_count() or 1)),
        "--out": text(
            "results/compare", "DIR", "folder of the results; finished cells in it are kept"
        ),
        **QUIET,
    }


def _study() -> Options:
    return {
        "file": {"metavar": "FILE", "help": "the declaration, a TOML file"},
        "--out": text(
            "results/study", "DIR", "folder of the results; finished cells in it are kept"
        ),
        **jobs(1),
        "--only": words([], "NAME", "run these methods and no others"),
        "--seeds": whole(None, "N", "seeds 0 … N − 1 in the place of the declared ones"),
        **VALIDATION,
        "--list": flag(
            "print the cells, which are finished and what the others may take, and run nothing"
        ),
        **QUIET,
    }


def _fit() -> Options:
    return {
        **problem(),
        "--prior": text("gaussian:layer", None, PRIOR_NAMES),
        "--map": flag("the maximum a posteriori, which cannot be reduced"),
        "--seed": whole(0, None, "of everything random"),
        **_fit_options(),
        "--reduce-to": text(None, "PRIOR", f"reduce during the fit, too, to one of: {TARGETS}"),
        **PER,
        **_reductions(
            "target fraction of weights for these reductions; by default the evidence decides",
            "interval of these reductions; by default a tenth of the fit",
        ),
        **DRAWS,
        **THREADS,
        "--resume": flag(
            "save the fit in RUN/checkpoints as it runs, and go on from there if it was stopped"
            " before"
        ),
        "--out": text("results/run", "RUN", "folder of the run"),
        **QUIET,
    }


def _reduce() -> Options:
    folder = "folder of a run of pyro-bmr fit, or of a cell; the reduction is saved in it"
    return {
        "run_folder": {"metavar": "RUN", "help": folder},
        "--to": text("gaussian:0", "PRIOR", TARGETS),
        **PER,
        "--threshold": number(
            0.0, "NATS", "by how much the evidence has to rise without a weight or group"
        ),
        "--kept": number(
            None, "FRACTION", "instead of the threshold, the fraction of weights that is kept"
        ),
        **DRAWS,
    }


def _export() -> Options:
    folder = "folder of a run or of a cell; its last reduction is exported if it has one"
    return {
        "run_folder": {"metavar": "RUN", "help": folder},
        "--format": words(["safetensors"], "FORMAT", ", ".join(FORMATS)),
        "--shrink": flag("remove units, channels and heads without a kept weight"),
        "--ensemble": whole(0, "N", "draws of the posterior to export as well"),
        "--unreduced": flag("export the posterior of the fit, whatever was reduced after it"),
        "--seconds": number(0.3, None, "length of each measurement of a latency"),
        **THREADS,
        "--out": text("results/export", "DIR", "folder of the files"),
    }


def _prune() -> Options:
    return {
        **problem(),
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
        **PER,
        "--rows": whole(10_000, "N", "training rows that are used"),
        "--corrections": whole(1, "N", "Gauss–Newton steps after each round"),
        "--most-rise": number(
            None, "NATS", "stop where the outputs are further than this from the dense network's"
        ),
        "--noise": number(
            None, "STD", "of real targets; by default the error on the training rows"
        ),
        "--seed": whole(0, None, "of everything random"),
        "--format": words(["safetensors"], "FORMAT", ", ".join(FORMATS)),
        "--shrink": flag("remove units, channels and heads without a kept weight"),
        "--seconds": number(0.3, None, "length of each measurement of a latency"),
        **THREADS,
        "--resume": flag("save each round in DIR/rounds, and go on from there after a stop"),
        "--out": text("results/pruned", "DIR", "folder of the files"),
        **QUIET,
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
        "--family": text(None, "NAME", f"{families}, and classes for one of texts"),
        "--prior": text("spike-and-slab", None, "spike-and-slab, horseshoe, gaussian"),
        "--steps": whole(None, "N", "of each run of the search; by default 1,000 or 200"),
        "--draws": whole(2000, "N", "posterior draws"),
        "--folds": whole(5, "N", "of the cross-validation; 0: none"),
        "--seed": whole(0, None, "of everything random"),
        "--out": text("results/select", "DIR", "folder of the results"),
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
