"""`python -m pyro_bmr`, which is `pyro-bmr`."""

import sys

from pyro_bmr.cli import main

if __name__ == "__main__":
    sys.exit(main())
