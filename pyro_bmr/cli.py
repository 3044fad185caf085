"""The command line: `pyro-bmr compare` and `pyro-bmr data`. Errors that users can cause are one line and exit status 2."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import NoReturn

import torch

from pyro_bmr import plots
from pyro_bmr.comparison import ROUTES, Settings, compare, model_names, summary
from pyro_bmr.data import load, sources
from pyro_bmr.errors import ModelError, PyroBMRError
from pyro_bmr.priors import Gaussian, Horseshoe, Laplace, Prior, SpikeAndSlab, StudentT

PRIORS: dict[str, Prior] = {
    "gaussian": Gaussian(),
    "gaussian:layer": Gaussian("layer"),
    "gaussian:unit": Gaussian("layer", per="unit"),
    "gaussian:input": Gaussian("layer", per="input"),
    "gaussian:weight": Gaussian("layer", per="weight"),
    "gaussian:pretrained": Gaussian(mean="init"),
    "laplace": Laplace(),
    "student-t": StudentT(),
    "horseshoe": Horseshoe(),
    "horseshoe:unit": Horseshoe(tiers=("layer", "unit")),
    "horseshoe:input": Horseshoe(tiers=("layer", "input")),
    "horseshoe:tiered": Horseshoe.tiered(),
    "spike-and-slab": SpikeAndSlab(),
    "spike-and-slab:relaxed": SpikeAndSlab(temperature=0.5),
    "spike-and-slab:unit": SpikeAndSlab(temperature=0.5, per="unit"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except PyroBMRError as error:
        print(f"pyro-bmr: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def prior_from_name(name: str) -> Prior:
    """A prior by its name on the command line; ``gaussian:0.1`` is `Gaussian(scale=0.1)`.

    Raises:
        ModelError: there is no such prior.
    """
    if name in PRIORS:
        return PRIORS[name]
    family, _, number = name.partition(":")
    try:
        if family == "gaussian":
            return Gaussian(float(number))
    except ValueError:
        pass
    raise ModelError(f"no prior '{name}'; the priors are: {', '.join(PRIORS)} and gaussian:SCALE with a number")


def _compare(arguments: argparse.Namespace) -> int:
    plots.headless()
    priors = {name: prior_from_name(name) for name in arguments.priors}
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    data = load(arguments.data, arguments.target)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ModelError(f"--threads {arguments.threads}: at least 1 is wanted")
        torch.set_num_threads(arguments.threads)
    model = arguments.model or ("mlp" if data.task == "classification" else "linear_regression")
    table = compare(
        model,
        data,
        priors=priors,
        routes=arguments.routes,
        seeds=arguments.seeds,
        settings=settings,
        out=arguments.out,
        progress=not arguments.quiet and sys.stderr.isatty(),
    )
    print(summary(table).to_string(index=False))
    print(f"\nresults.csv, report.md, pictures and {len(table)} exported networks are in {arguments.out}")
    return 0


def _data(arguments: argparse.Namespace) -> int:
    for name, source in sources().items():
        state = "installed" if source.installed() else f"install with: {source.install}"
        print(f"{name:14} {source.about:55} {state}")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pyro-bmr", description="Sparse Bayesian networks by Bayesian model reduction.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    defaults = Settings()

    c = commands.add_parser("compare", help="prior × route × seed, one table", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    c.add_argument(
        "--model", help=f"{', '.join(model_names())} (sizes after a colon: mlp:500-500), or FILE.py with build(data, prior); default: mlp or linear_regression"
    )
    c.add_argument("--data", default="digits", help=f"{', '.join(sources())}, FILE.npz, FILE.csv, or a folder of IDX files")
    c.add_argument("--target", help="the column of FILE.csv to predict")
    c.add_argument("--priors", nargs="+", default=["gaussian", "horseshoe", "spike-and-slab"], metavar="PRIOR", help=", ".join([*PRIORS, "gaussian:SCALE"]))
    c.add_argument("--routes", nargs="+", default=list(ROUTES), metavar="ROUTE", help=", ".join(ROUTES))
    c.add_argument("--seeds", type=int, default=2, help="seeds 0 … N − 1")
    c.add_argument("--epochs", type=int, default=defaults.epochs)
    c.add_argument("--batch-size", type=int, default=defaults.batch_size)
    c.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    c.add_argument("--temperature", type=float, default=defaults.temperature, help="1 is Bayes; less counts the data more often")
    c.add_argument("--kept", type=float, default=defaults.kept, help="target fraction of weights for the reduced route; by default the evidence decides")
    c.add_argument(
        "--reduce-every", type=float, default=defaults.reduce_every, metavar="EPOCHS", help="interval of reductions during the fit; by default a tenth of it"
    )
    c.add_argument("--start", type=float, default=defaults.start, help="fraction of the fit before the first reduction")
    c.add_argument("--stop", type=float, default=defaults.stop, help="fraction of the fit after which nothing more is pruned")
    c.add_argument("--draws", type=int, default=defaults.draws, help="posterior draws for predictions")
    c.add_argument("--validation", type=float, default=None, metavar="FRACTION", help="score a held-out part of the training rows instead of the test rows")
    c.add_argument("--threads", type=int, default=1, help="threads of torch; small networks are fastest with one")
    c.add_argument("--out", default="results/compare", help="folder of the results; finished rows in it are kept")
    c.add_argument("--quiet", action="store_true", help="no progress bars")
    c.set_defaults(run=_compare)

    d = commands.add_parser("data", help="the data sets: which are installed, how to install the others")
    d.set_defaults(run=_data)
    return parser


if __name__ == "__main__":
    sys.exit(main())
