"""The command line: `pyro-bmr compare`, `study`, `fit`, `reduce`, `export`, `prune`, `select`
and `data`. Errors that users can cause are one line and exit status 2.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from pyro_bmr.cli.command_line import parser
from pyro_bmr.cli.fits import fit_run
from pyro_bmr.cli.grids import compare, run_study
from pyro_bmr.cli.networks import export_run, reduce_run
from pyro_bmr.cli.selection import select
from pyro_bmr.cli.trained import prune_network
from pyro_bmr.data.named import sources
from pyro_bmr.errors import PyroBMRError, PyroBMRWarning


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = parser(
        {
            "compare": compare,
            "study": run_study,
            "fit": fit_run,
            "reduce": reduce_run,
            "export": export_run,
            "prune": prune_network,
            "select": select,
            "data": _data,
        }
    ).parse_args(argv)
    try:
        with warnings_in_lines():
            return int(arguments.run(arguments))
    except PyroBMRError as error:
        print(f"pyro-bmr: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"pyro-bmr: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Warnings are printed as errors are, one line each, and one that comes again not at all; those
    of the library always.
    """
    printed = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = " ".join(str(message).split())
        if text not in printed:
            print(f"pyro-bmr: warning: {text}", file=sys.stderr)
        printed.add(text)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PyroBMRWarning)
        warnings.showwarning = show
        yield


def _data(arguments: argparse.Namespace) -> int:
    for name, source in sources().items():
        state = "installed" if source.installed() else f"install with: {source.install}"
        print(f"{name:14} {source.about:55} {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
