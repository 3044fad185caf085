"""What `import pyro_bmr` costs over the import of torch and Pyro alone.

    python benchmarks/import_time.py
    python -X importtime -c "import torch, pyro, pyro_bmr"    # each module's time, to find a cause

Fresh interpreters take turns, one with torch and Pyro, one with the library too. Times are those of
the processor in the interpreter, so that waiting for others does not count, and of the clock; given
are the median and the smallest. The first start of each, which may write bytecode, is not counted.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

BASELINE, LIBRARY = "import torch, pyro", "import torch, pyro, pyro_bmr"


def start(code: str) -> tuple[float, float]:
    """Seconds of the processor and of the clock that a fresh interpreter takes for `code`."""
    # Bytecode is kept, as on the machine of a user: without it each start would compile the library
    # again.
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - clock
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--starts", type=int, default=11, metavar="N", help="of each (default: 11)"
    )
    rounds = [(start(BASELINE), start(LIBRARY)) for _ in range(options.parse_args().starts + 1)][1:]
    for k, name in enumerate(("processor", "clock")):
        baseline, library = ([pair[j][k] for pair in rounds] for j in (0, 1))
        for kind, summary in (("median", statistics.median), ("smallest", min)):
            a, b = summary(baseline), summary(library)
            print(
                f"{name}, {kind}: torch and Pyro {a:.2f} s, with pyro_bmr {b:.2f} s, ratio"
                f" {b / a:.3f}"
            )


if __name__ == "__main__":
    main()
