"""The commands that run a grid: `pyro-bmr compare` and `pyro-bmr study`.

Next: `networks.py`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import fields

import torch

from pyro_bmr.data.named import load
from pyro_bmr.errors import ModelError
from pyro_bmr.experiments import plots
from pyro_bmr.experiments.compare import comparison, run_comparison, summary
from pyro_bmr.experiments.conclusions import conclusions
from pyro_bmr.experiments.declaration import declare
from pyro_bmr.experiments.models import default_model
from pyro_bmr.experiments.report import printed, summary_of
from pyro_bmr.experiments.settings import Settings
from pyro_bmr.experiments.study import cells_left, check_jobs, study
from pyro_bmr.priors.names import prior_from_name


def compare(arguments: argparse.Namespace) -> int:
    """Runs a comparison and prints its table of means; status 1 if a cell failed."""
    plots.headless()
    priors = {name: prior_from_name(name) for name in arguments.priors}
    settings = Settings(
        **{field.name: getattr(arguments, field.name) for field in fields(Settings)}
    )
    data = load(arguments.data, arguments.target, arguments.likelihood)
    set_threads(arguments.threads)
    check_jobs(arguments.jobs)
    model = arguments.model or default_model(data)
    source = f"{arguments.data}:{arguments.target}" if arguments.target else arguments.data
    declared = comparison(
        model,
        data,
        priors,
        arguments.routes,
        arguments.seeds,
        settings,
        source,
        arguments.baselines,
        arguments.likelihood,
        arguments.device,
    )
    done = run_comparison(
        declared, arguments.out, jobs=arguments.jobs, progress=shows_progress(arguments)
    )
    print(printed(summary(done.table)), end="\n\n")
    print("\n".join([*conclusions(done.table, done.failed), *declared.remarks]))
    print(
        f"\nresults.csv, report.html, report.md, pictures and {len(done.table)} exported networks"
        f" are in {arguments.out}"
    )
    return _status(done.failures)


def run_study(arguments: argparse.Namespace) -> int:
    """Runs a declared study and prints its table of means; status 1 if a cell failed."""
    plots.headless()
    given = {name: getattr(arguments, name) for name in ("seeds", "validation", "device")}
    declared = declare(arguments.file, **given)
    if arguments.list:
        cells, seconds = cells_left(
            declared, arguments.out, only=arguments.only, jobs=arguments.jobs
        )
        print(cells.to_string(index=False, float_format="%.1f", na_rep="?"))
        counts = cells["state"].value_counts()
        states = (f"{counts.get(state, 0)} {state}" for state in ("finished", "failed", "open"))
        print(f"\n{', '.join(states)}; {_duration(seconds)} to go")
        return 0
    done = study(
        declared,
        arguments.out,
        jobs=arguments.jobs,
        only=arguments.only,
        progress=shows_progress(arguments),
    )
    if not done.table.empty:
        print(printed(summary_of(done.table)))
        print(
            f"\nresults.csv, report.html, report.md and pictures of {len(done.table)} finished"
            f" cells are in {arguments.out}"
        )
    return _status(done.failures)


def set_threads(threads: int) -> None:
    """Sets the threads of torch.

    Raises:
        ModelError: there is not one at least.
    """
    if threads < 1:
        raise ModelError(f"--threads: expected at least 1, got {threads}")
    torch.set_num_threads(threads)


def shows_progress(arguments: argparse.Namespace) -> bool:
    """Whether there is a screen that wants a progress bar."""
    return not arguments.quiet and sys.stderr.isatty()


def _status(failures: Mapping[str, str]) -> int:
    """The exit status, a line for each cell that failed."""
    for cell, line in failures.items():
        print(f"pyro-bmr: {cell} failed: {line}", file=sys.stderr)
    return 1 if failures else 0


def _duration(seconds: float) -> str:
    """About how long, in words."""
    if math.isnan(seconds):
        return "unknown time"
    return (
        f"about {seconds:.0f} s"
        if seconds < 120
        else f"about {seconds / 60:.0f} min"
        if seconds < 7200
        else f"about {seconds / 3600:.1f} h"
    )
