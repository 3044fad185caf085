"""The command line as a parser: which commands there are, and what each is for.

Owns `parser`. What the commands do is in `grids.py`, `fits.py`, `networks.py`, `trained.py` and
`selection.py`; their options are in `options.py`. Next: `scoring.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib.metadata import version

from pyro_bmr.cli import options
from pyro_bmr.cli.parsers import Help, Parser, without_command
from pyro_bmr.cli.shared_options import Options

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
    for name, (about, more, options_of) in _COMMANDS.items():
        added = added_to.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}. {more}",
            formatter_class=Help,
        )
        added.set_defaults(run=commands[name])
        for name_or_flag, rules in options_of().items():
            added.add_argument(name_or_flag, **rules)
    return whole


_COMMANDS: dict[str, tuple[str, str, Callable[[], Options]]] = {
    "compare": (
        "fit and score each prior by each route with each seed, in one table",
        "Finished cells are not run again.",
        options.compare_options,
    ),
    "study": (
        "run a declared grid of models, data, methods and seeds, and report it",
        "Finished cells are not run again; see docs/studies.md.",
        options.study_options,
    ),
    "fit": (
        "fit one network and save it as a run",
        "pyro-bmr reduce and pyro-bmr export take the run from there.",
        options.fit_options,
    ),
    "reduce": (
        "say which weights of a run the evidence does without, and prune them",
        "No new fit; the run keeps the posterior of the fit.",
        options.reduce_options,
    ),
    "export": (
        "write a run as plain torch, smaller if asked, in several formats",
        "The files load without pyro_bmr.",
        options.export_options,
    ),
    "prune": (
        "prune a network that is trained already, without training it",
        "No labels are needed; see docs/tutorial_pruning.md.",
        options.prune_options,
    ),
    "select": (
        "say which columns of a table predict its target, and how sure that is",
        "Texts and missing values are encoded; see docs/tables.md.",
        options.select_options,
    ),
    "data": (
        "list the data sets: which are installed, how to install the others",
        "Files of your own need no installing: see --data.",
        dict,
    ),
}
"""Name → what it does, a line more of its help, its options."""
