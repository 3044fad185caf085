"""The options of the command line, as data: which command has which, with their help.

Owns the options of each command; those that several of them have are in `shared_options.py`. Next:
`command_line.py`.
"""

from __future__ import annotations

import os

from pyro_bmr.cli.shared_options import (
    DEVICE,
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
    temperature,
    text,
    whole,
    words,
)
from pyro_bmr.experiments.baseline_cells import IN_COMPARISONS
from pyro_bmr.experiments.settings import AUTO, GUIDES, OPTIMIZERS, ROUTES
from pyro_bmr.exporting.formats import FORMATS
from pyro_bmr.guides.row_noise import PER_ROW, PER_STEP


def _fit_options() -> Options:
    rates = ", ".join(f"{rate:g} for {name}" for name, (_, rate) in OPTIMIZERS.items())
    estimators = ", ".join((*PER_STEP, *PER_ROW))
    return {
        "--epochs": whole(
            None,
            "N",
            "passes over the training rows; by default 20, but 3,000 to 16,000 steps; fewer for"
            " few rows",
        ),
        "--batch-size": whole(USUAL.batch_size, "ROWS", "rows of a step"),
        "--optimizer": text(
            None, "NAME", f"{', '.join(OPTIMIZERS)}; by default the second for mean field"
        ),
        "--learning-rate": number(None, "RATE", f"by default {rates}; it falls to 0 over the fit"),
        "--guide": text(USUAL.guide, "NAME", f"of all but map: {', '.join(GUIDES)}"),
        "--estimator": text(USUAL.estimator, "NAME", f"of mean field's gradient: {estimators}"),
        "--temperature": {
            "type": temperature,
            "default": AUTO,
            "metavar": "T",
            "help": "1 is Bayes; less counts the data more often. auto: what shorter fits score"
            " best with on held-out rows, which also give a temperature of the class"
            " probabilities, or the noise of real targets; 1 for map, other targets and"
            " programs written by hand",
        },
    }


def _reductions(kept: str, every: str) -> Options:
    return {
        "--kept": number(None, "FRACTION", kept),
        "--reduce-every": number(None, "EPOCHS", every),
        **SCHEDULE,
    }


def compare_options() -> Options:
    """Those of `pyro-bmr compare`."""
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
            "interval of reductions during the fit; by default a tenth of it, or about 1,000 steps"
            " where the evidence decides on classes",
        ),
        "--widen": number(
            USUAL.widen, "FACTOR", "of the posterior variances in predictions; 1 is as fitted"
        ),
        "--calibrate": flag(
            "find that factor on a sixth of the training rows, which the fits do without"
        ),
        **VALIDATION,
        **DRAWS,
        **DEVICE,
        **THREADS,
        **jobs(min(2, os.cpu_count() or 1)),
        "--out": text(
            "results/compare", "DIR", "folder of the results; finished cells in it are kept"
        ),
        **QUIET,
    }


def study_options() -> Options:
    """Those of `pyro-bmr study`."""
    return {
        "file": {"metavar": "FILE", "help": "the declaration, a TOML file"},
        "--out": text(
            "results/study", "DIR", "folder of the results; finished cells in it are kept"
        ),
        **jobs(1),
        "--only": words([], "NAME", "run these methods and no others"),
        "--seeds": whole(None, "N", "seeds 0 … N − 1 in the place of the declared ones"),
        **VALIDATION,
        **DEVICE,
        "--list": flag(
            "print the cells, which are finished and what the others may take, and run nothing"
        ),
        **QUIET,
    }


def fit_options() -> Options:
    """Those of `pyro-bmr fit`."""
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
            "interval of these reductions; by default a tenth of the fit, or about 1,000 steps"
            " where the evidence decides on classes",
        ),
        **DRAWS,
        **DEVICE,
        **THREADS,
        "--resume": flag(
            "save the fit in RUN/checkpoints as it runs, and go on from there if it was stopped"
            " before"
        ),
        "--checkpoint-seconds": number(60.0, "SECONDS", "between two saves of --resume"),
        "--shard": flag(
            "share the posterior out over the processes that torchrun has started; Gaussian priors"
        ),
        "--out": text("results/run", "RUN", "folder of the run"),
        **QUIET,
    }


def reduce_options() -> Options:
    """Those of `pyro-bmr reduce`."""
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
        "--window": flag(
            "go on to the smallest model that is nearly as probable, for columns of a regression"
        ),
        **DRAWS,
    }


def export_options() -> Options:
    """Those of `pyro-bmr export`."""
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


def prune_options() -> Options:
    """Those of `pyro-bmr prune`."""
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
        "--per": {
            **PER["--per"],
            "help": f"{PER['--per']['help']}, or reader: a hidden unit by the weights that read it",
        },
        "--rows": whole(10_000, "N", "training rows that are used"),
        "--corrections": whole(
            100,
            "N",
            "steps towards the dense network after each round, five times as many after the last",
        ),
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


def select_options() -> Options:
    """Those of `pyro-bmr select`."""
    families = (
        "normal, student-t, poisson, negative-binomial, bernoulli, categorical, ordinal; by default"
        " normal for a target of numbers"
    )
    return {
        "file": {
            "metavar": "FILE.csv",
            "help": "a table with a header; texts and gaps are welcome",
        },
        "--target": {"required": True, "metavar": "COLUMN", "help": "the column to predict"},
        "--family": text(None, "NAME", f"{families}, and classes for one of texts"),
        "--exposure": text(None, "COLUMN", "the exposure of each row, for counts"),
        "--order": text(None, "LOW,…,HIGH", "the classes of --family ordinal that are no numbers"),
        "--prior": text("spike-and-slab", None, "spike-and-slab, horseshoe, gaussian"),
        "--steps": whole(None, "N", "of each run of the search; by default 1,000 or 200"),
        "--draws": whole(2000, "N", "posterior draws"),
        "--folds": whole(5, "N", "of the cross-validation; 0: none"),
        "--seed": whole(0, None, "of everything random"),
        "--out": text("results/select", "DIR", "folder of the results"),
    }
