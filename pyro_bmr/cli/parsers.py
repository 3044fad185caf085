"""How the command line prints its errors and its help.

Owns `Parser`, `Help` and `without_command`. Next: `shared_options.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class Help(argparse.HelpFormatter):
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


def without_command(whole: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Prints the help where an error would go, and gives the exit status of one: there was nothing
    to do.
    """

    def run(arguments: argparse.Namespace) -> int:
        whole.print_help(sys.stderr)
        return 2

    return run
