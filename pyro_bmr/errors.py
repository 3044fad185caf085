"""The errors that users can cause. Each says what was asked, which rule it broke, what was got, and how to mend it.

The command line prints them in one line and exits with status 2; everything else is a bug and keeps its traceback. A result that stands but may
mislead comes with a `PyroBMRWarning`.
"""

from collections.abc import Iterable


class PyroBMRError(Exception):
    """Base of every error that pyro_bmr raises on purpose."""


class DataError(PyroBMRError):
    """The data are missing, malformed, or do not fit the likelihood."""


class ModelError(PyroBMRError):
    """A program, prior, likelihood or guide is declared in a way that cannot be fitted."""


class OptionError(ModelError):
    """A method of a study does not know some of its options, `unknown`; those that it knows are `known`."""

    def __init__(self, method: str, unknown: Iterable[str], known: Iterable[str]) -> None:
        self.unknown, self.known = sorted(unknown), list(known)
        super().__init__(f"{method}: no option {', '.join(self.unknown)}; the options are: {', '.join(self.known)}")


class FitError(PyroBMRError):
    """A fit cannot start or has left the finite numbers."""


class ReductionError(PyroBMRError):
    """A reduction has no answer for the posterior and prior it was given."""


class ShrinkError(PyroBMRError):
    """A network cannot be made smaller: its masks do not fit it, or it has a part that is not a supported pattern."""


class PyroBMRWarning(UserWarning):
    """A result that is not wrong but may mislead: the message says which figure shows it, and the mend. `warnings.filterwarnings` takes the class."""
