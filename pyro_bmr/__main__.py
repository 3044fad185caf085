"""`python -m pyro_bmr`, which is `pyro-bmr`."""

import sys

from pyro_bmr.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
