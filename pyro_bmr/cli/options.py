"""The options of the command line: which command has which, with their help.

Owns `parser`. What the commands do is in `cli.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import NoReturn

from pyro_bmr.data.named import sources
from pyro_bmr.experiments.cells import GUIDES, OPTIMIZERS, ROUTES, Settings
from pyro_bmr.experiments.models import model_names
from pyro_bmr.exporting.formats import FORMATS
from pyro_bmr.guides.row_noise import PER_ROW, PER_STEP
from pyro_bmr.priors.names import PRIORS
from pyro_bmr.reduction.groups import GROUPS

Command = Callable[[argparse.Namespace], int]
_PRIORS = ", ".join([*PRIORS, "gaussian:SCALE"])
TARGETS = (
    "gaussian:0 (the point spike), gaussian:SCALE, gaussian (the scale with the best evidence),"
    " laplace, student-t, horseshoe, horseshoe:unit, spike-and-slab"
)
_THREADS = "threads of torch; small networks are fastest with one"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Help(argparse.HelpFormatter):
    """Adds the default to the help of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if (
            default is None
            or default is False
            or default == argparse.SUPPRESS
            or not action.option_strings
        ):
            return text
        return (
            f"{text} (default: {' '.join(default) if isinstance(default, list) else '%(default)s'})"
        )


def _without_command(whole: argparse.ArgumentParser) -> Command:
    """Prints the help where an error would go, and gives the exit status of one: there was nothing
    to do.
    """

    def run(arguments: argparse.Namespace) -> int:
        whole.print_help(sys.stderr)
        return 2

    return run


def parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of the command line, which sets `run` to the function of the command that was
    given.
    """
    description = (
        "Sparse Bayesian networks by Bayesian model reduction: compare priors in one table, or fit,"
        " reduce and export one network step by step."
    )
    whole = _Parser(
        prog="pyro-bmr",
        description=description,
        epilog="pyro-bmr COMMAND --help has the options of each command.",
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {version('pyro_bmr')}")
    whole.set_defaults(run=_without_command(whole))
    added_to = whole.add_subparsers(metavar="COMMAND")
    defaults = Settings()

    def command(name: str, about: str, more: str) -> argparse.ArgumentParser:
        added = added_to.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}. {more}",
            formatter_class=_Help,
        )
        added.set_defaults(run=commands[name])
        return added

    c = command(
        "compare",
        "fit and score each prior by each route with each seed, in one table",
        "An interrupted comparison goes on where it stopped.",
    )
    _add_problem(c)
    c.add_argument(
        "--priors",
        nargs="+",
        default=["gaussian", "horseshoe", "spike-and-slab"],
        metavar="PRIOR",
        help=_PRIORS,
    )
    c.add_argument(
        "--routes",
        nargs="+",
        default=list(ROUTES),
        metavar="ROUTE",
        help="point estimate, fitted under the prior, reduced to it",
    )
    c.add_argument("--seeds", type=int, default=2, metavar="N", help="seeds 0 … N − 1")
    _add_fit(c, defaults)
    of = (
        "target fraction of weights for the reduced route and fitted shrinkage priors; by default"
        " the evidence decides"
    )
    c.add_argument("--kept", type=float, metavar="FRACTION", help=of)
    c.add_argument(
        "--reduce-every",
        type=float,
        metavar="EPOCHS",
        help="interval of reductions during the fit; by default a tenth of it",
    )
    _add_schedule(c, defaults)
    c.add_argument(
        "--widen",
        type=float,
        default=defaults.widen,
        metavar="FACTOR",
        help="of the posterior variances in predictions; 1 is as fitted",
    )
    c.add_argument(
        "--scaled",
        action="store_true",
        help="find that factor on a sixth of the training rows, which the fits do without",
    )
    c.add_argument(
        "--validation",
        type=float,
        metavar="FRACTION",
        help="score a held-out part of the training rows instead of the test rows",
    )
    _add_run(c, defaults)
    c.add_argument(
        "--out",
        default="results/compare",
        metavar="DIR",
        help="folder of the results; finished rows in it are kept",
    )
    c.add_argument("--quiet", action="store_true", help="no progress bars")

    s = command(
        "study",
        "run a declared grid of models, data, methods and seeds, and report it",
        "Finished cells are not run again; see docs/studies.md.",
    )
    s.add_argument("file", metavar="FILE", help="the declaration, a TOML file")
    s.add_argument(
        "--out",
        default="results/study",
        metavar="DIR",
        help="folder of the results; finished cells in it are kept",
    )
    s.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="cells that run at once, each in a process with one thread; -1 for one per core",
    )
    s.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="run these methods and no others"
    )
    s.add_argument(
        "--seeds", type=int, metavar="N", help="seeds 0 … N − 1 in the place of the declared ones"
    )
    s.add_argument(
        "--validation",
        type=float,
        metavar="FRACTION",
        help="score a held-out part of the training rows instead of the test rows",
    )
    s.add_argument(
        "--list",
        action="store_true",
        help="print the cells, which are finished and what the others may take, and run nothing",
    )
    s.add_argument("--quiet", action="store_true", help="no progress bar")

    f = command(
        "fit",
        "fit one network and save it as a run",
        "pyro-bmr reduce and pyro-bmr export take the run from there.",
    )
    _add_problem(f)
    f.add_argument("--prior", default="gaussian", help=_PRIORS)
    f.add_argument(
        "--point",
        action="store_true",
        help="a point estimate (maximum a posteriori), which cannot be reduced",
    )
    f.add_argument("--seed", type=int, default=0, help="of everything random")
    _add_fit(f, defaults)
    f.add_argument(
        "--reduce-to", metavar="PRIOR", help=f"reduce during the fit, too, to one of: {TARGETS}"
    )
    f.add_argument(
        "--reduce-every",
        type=float,
        metavar="EPOCHS",
        help="interval of these reductions; by default a tenth of the fit",
    )
    _add_groups(f)
    f.add_argument(
        "--kept",
        type=float,
        metavar="FRACTION",
        help="target fraction of weights for these reductions; by default the evidence decides",
    )
    _add_schedule(f, defaults)
    _add_run(f, defaults)
    f.add_argument(
        "--resume",
        action="store_true",
        help=(
            "save the fit in RUN/checkpoints as it runs, and go on from there if it was stopped"
            " before"
        ),
    )
    f.add_argument("--out", default="results/run", metavar="RUN", help="folder of the run")
    f.add_argument("--quiet", action="store_true", help="no progress bar")

    r = command(
        "reduce",
        "say which weights of a run the evidence does without, and prune them",
        "No new fit; the posterior of the fit stays in the run.",
    )
    r.add_argument(
        "run_folder",
        metavar="RUN",
        help="folder of a run of pyro-bmr fit; the reduction is saved in it",
    )
    r.add_argument("--to", default="gaussian:0", metavar="PRIOR", help=TARGETS)
    _add_groups(r)
    r.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        metavar="NATS",
        help="by how much the evidence has to rise without a weight or group",
    )
    r.add_argument(
        "--kept",
        type=float,
        metavar="FRACTION",
        help="instead of the threshold, the fraction of weights that stays",
    )
    r.add_argument(
        "--draws",
        type=int,
        default=defaults.draws,
        metavar="N",
        help="posterior draws for predictions",
    )

    e = command(
        "export",
        "write a run as plain torch, smaller if asked, in several formats",
        "The files load without pyro_bmr.",
    )
    e.add_argument(
        "run_folder",
        metavar="RUN",
        help="folder of a run; its last reduction is exported if it has one",
    )
    e.add_argument(
        "--format", nargs="+", default=["safetensors"], metavar="FORMAT", help=", ".join(FORMATS)
    )
    e.add_argument("--shrink", action="store_true", help="remove dead units, channels and heads")
    e.add_argument(
        "--ensemble",
        type=int,
        default=0,
        metavar="N",
        help="draws of the posterior to export as well",
    )
    e.add_argument(
        "--unreduced",
        action="store_true",
        help="export the posterior of the fit, whatever was reduced after it",
    )
    e.add_argument(
        "--seconds", type=float, default=0.3, help="length of each measurement of a latency"
    )
    e.add_argument("--threads", type=int, default=1, metavar="N", help=_THREADS)
    e.add_argument("--out", default="results/export", metavar="DIR", help="folder of the files")

    command(
        "data",
        "list the data sets: which are installed, how to install the others",
        "Files of your own need no installing: see --data.",
    )
    return whole


def _add_problem(parser: argparse.ArgumentParser) -> None:
    own = (
        "sizes after a colon, as in mlp:500-500; or FILE.py with build(data, prior). By default"
        " mlp, or linear_regression for real targets"
    )
    parser.add_argument("--model", help=f"{', '.join(model_names())}; {own}")
    parser.add_argument(
        "--data",
        default="digits",
        help=f"{', '.join(sources())}, FILE.npz, FILE.csv, or a folder of IDX files",
    )
    parser.add_argument("--target", metavar="COLUMN", help="the column of FILE.csv to predict")


def _add_fit(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    rates = ", ".join(f"{rate:g} for {name}" for name, (_, rate) in OPTIMIZERS.items())
    parser.add_argument(
        "--epochs",
        type=int,
        default=defaults.epochs,
        metavar="N",
        help="passes over the training rows",
    )
    parser.add_argument(
        "--batch-size", type=int, default=defaults.batch_size, metavar="ROWS", help="rows of a step"
    )
    parser.add_argument(
        "--optimizer", default=defaults.optimizer, metavar="NAME", help=", ".join(OPTIMIZERS)
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help=f"by default {rates}; it falls to 0 over the fit",
    )
    parser.add_argument(
        "--guide",
        default=defaults.guide,
        metavar="NAME",
        help=f"of all but point estimates: {', '.join(GUIDES)}",
    )
    parser.add_argument(
        "--estimator",
        default=defaults.estimator,
        metavar="NAME",
        help=f"of mean field's gradient: {', '.join((*PER_STEP, *PER_ROW))}",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="T",
        help="1 is Bayes; less counts the data more often",
    )


def _add_groups(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--per",
        default="weight",
        metavar="GROUP",
        help=f"what stays or goes as one: weight, {', '.join(GROUPS)}",
    )
    parser.add_argument(
        "--heads", type=int, metavar="N", help="the number of attention heads, for --per head"
    )


def _add_schedule(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    parser.add_argument(
        "--start",
        type=float,
        default=defaults.start,
        metavar="FRACTION",
        help="of the fit, before the first reduction",
    )
    parser.add_argument(
        "--stop",
        type=float,
        default=defaults.stop,
        metavar="FRACTION",
        help="of the fit, after which nothing more is pruned",
    )


def _add_run(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    parser.add_argument(
        "--draws",
        type=int,
        default=defaults.draws,
        metavar="N",
        help="posterior draws for predictions",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help=_THREADS)
