"""The command line: `pyro-bmr compare`, `study`, `fit`, `reduce`, `export` and `data`. Errors that
users can cause are one line and exit status 2.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

import torch

from pyro_bmr.cli.options import parser
from pyro_bmr.data.data_set import Data
from pyro_bmr.data.named import load, sources
from pyro_bmr.errors import ModelError, PyroBMRError, PyroBMRWarning, warn
from pyro_bmr.experiments import plots
from pyro_bmr.experiments.cells import Settings, guide_named, optimizer_named, scores
from pyro_bmr.experiments.compare import compare
from pyro_bmr.experiments.declaration import declare
from pyro_bmr.experiments.models import load_model
from pyro_bmr.experiments.report import summary_of
from pyro_bmr.experiments.results_folder import summary
from pyro_bmr.experiments.runs import Run, check_run_folder, load_run, save_run
from pyro_bmr.experiments.study import cells_left, study
from pyro_bmr.exporting import deploy, ensemble, export, point_weights, save
from pyro_bmr.files import finite
from pyro_bmr.fitting.fit import fit
from pyro_bmr.fitting.processes import process_group
from pyro_bmr.guides import Point
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.paired_losses import paired_loss
from pyro_bmr.prediction.predict import Prediction, predict
from pyro_bmr.priors.names import prior_from_name
from pyro_bmr.pruning import Every
from pyro_bmr.reduction.reduce import reduce
from pyro_bmr.shrinking import shrink_plan


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = parser(
        {
            "compare": _compare,
            "study": _study,
            "fit": _fit,
            "reduce": _reduce,
            "export": _export,
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


def _compare(arguments: argparse.Namespace) -> int:
    plots.headless()
    priors = {name: prior_from_name(name) for name in arguments.priors}
    settings = Settings(
        **{field.name: getattr(arguments, field.name) for field in fields(Settings)}
    )
    data = load(arguments.data, arguments.target)
    if arguments.threads is not None:
        _set_threads(arguments.threads)
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
    print(
        f"\nresults.csv, report.md, pictures and {len(table)} exported networks are in"
        f" {arguments.out}"
    )
    return 0


def _study(arguments: argparse.Namespace) -> int:
    plots.headless()
    declared = declare(arguments.file, seeds=arguments.seeds, validation=arguments.validation)
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
        progress=not arguments.quiet and sys.stderr.isatty(),
    )
    if not done.table.empty:
        print(summary_of(done.table).to_string(index=False))
        print(
            f"\nresults.csv, report.html, report.md and pictures of {len(done.table)} finished"
            f" cells are in {arguments.out}"
        )
    for cell, line in done.failures.items():
        print(f"pyro-bmr: {cell} failed: {line}", file=sys.stderr)
    return 1 if done.failures else 0


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


def _fit(arguments: argparse.Namespace) -> int:
    _set_threads(arguments.threads)
    prior, target = (
        prior_from_name(arguments.prior),
        arguments.reduce_to and prior_from_name(arguments.reduce_to),
    )
    data = load(arguments.data, arguments.target)
    model = arguments.model or ("mlp" if data.task == "classification" else "linear_regression")
    with torch.random.fork_rng():
        torch.manual_seed(arguments.seed)
        program = load_model(model)(data, prior)
    if target is None and arguments.kept is not None:
        raise ModelError(
            f"--kept {arguments.kept}: a target needs reductions during the fit; add --reduce-to"
            " gaussian:0"
        )
    if target is None and arguments.per != "weight":
        raise ModelError(
            f"--per {arguments.per}: groups need reductions during the fit; add --reduce-to"
            " gaussian:0"
        )
    every = arguments.reduce_every or arguments.epochs / 10
    schedule = target and Every(
        every,
        target,
        arguments.start,
        kept=arguments.kept,
        stop=arguments.stop,
        per=arguments.per,
        heads=arguments.heads,
    )
    if arguments.point and arguments.guide != "mean-field":
        raise ModelError(
            f"--guide {arguments.guide}: a point estimate has none; leave out --point or --guide"
        )
    guide = (
        Point
        if arguments.point
        else guide_named(arguments.guide, arguments.optimizer, arguments.estimator)
    )
    make, arguments.learning_rate = optimizer_named(arguments.optimizer, arguments.learning_rate)
    check_run_folder(arguments.out)
    with process_group() as rank:
        result = fit(
            program,
            data,
            guide=guide,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            optimizer=make(),
            seed=arguments.seed,
            temperature=arguments.temperature,
            reduce=schedule or None,
            progress=not arguments.quiet and sys.stderr.isatty(),
            checkpoint=Path(arguments.out) / "checkpoints" if arguments.resume else None,
        )
    if rank > 0:
        return 0  # the first process has it all
    asked = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("run", "out", "quiet", "threads", "draws", "resume")
    }
    settings = {**asked, "model": model}
    found = _scores(
        predict(
            result.program,
            result.posterior,
            data.x_test,
            draws=arguments.draws,
            seed=arguments.seed,
        ),
        data,
    )
    save_run(result, arguments.out, {**settings, "seconds": result.seconds, **found})
    print(_listed(found, data))
    print(
        f"the run is in {arguments.out}; next: pyro-bmr reduce {arguments.out}, pyro-bmr export"
        f" {arguments.out}"
    )
    return 0


def _reduce(arguments: argparse.Namespace) -> int:
    run, prior = load_run(arguments.run_folder), prior_from_name(arguments.to)
    reduction = reduce(
        run.posterior,
        prior,
        arguments.per,
        threshold=arguments.threshold,
        kept=arguments.kept,
        heads=arguments.heads,
    )
    about = {name: getattr(arguments, name) for name in ("to", "per", "heads", "threshold")} | {
        "target": arguments.kept
    }
    run.reduced(reduction, about)
    data = run.data()
    program = run.program(prior_from_name(run.settings["prior"]), data)
    drawn = {"draws": arguments.draws, "seed": int(run.settings["seed"])}
    before, after = (
        predict(program, posterior, data.x_test, **drawn)
        for posterior in (run.posterior, reduction.posterior)
    )
    _warn_of_loss(before, after, data)
    found = _scores(after, data)
    print(reduction.table().to_string(index=False))
    print(_listed({"kept": reduction.kept, "delta_f": reduction.delta_f, **found}, data))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    _set_threads(arguments.threads)
    run = load_run(arguments.run_folder, reduced=not arguments.unreduced)
    data = run.data()
    program = run.program(prior_from_name(run.settings["prior"]), data)
    if not isinstance(program, BayesianNetwork):
        if arguments.format != ["safetensors"] or arguments.shrink or arguments.ensemble:
            raise ModelError(
                f"'{run.settings['model']}' is a program of its own and no network: its weights can"
                " be exported, as safetensors, and nothing else"
            )
        save(
            point_weights(program, run.posterior), arguments.out, _export_report(run, program, data)
        )
        print(f"model.safetensors and report.json are in {arguments.out}")
        return 0
    report, masks = _export_report(run, program, data), run.posterior.masks
    dense = export(program, run.posterior)
    net, example = dense, data.x_test[:128]
    if arguments.shrink:
        plan = shrink_plan(dense, masks, example)
        print(f"{plan}\n")
        net = plan.apply()
        report |= {
            "plan": plan.layers.to_dict(orient="records"),
            "kept channels": dict(plan.kept),
            "inputs not read": plan.unread_inputs.tolist(),
        }
    with torch.no_grad():
        outputs = torch.cat([net(rows) for rows in data.x_test.split(1000)])
    if data.task == "classification":
        report["accuracy"] = metrics.accuracy(outputs.softmax(1), data.y_test)
    else:
        report["rmse"] = (
            metrics.rmse(outputs[:, 0] if outputs.ndim > 1 else outputs, data.y_test)
            * data.target_scale
        )
        # the network gives (target − mean) / scale
        report["target"] = {"mean": data.target_mean, "scale": data.target_scale}
    draws = (
        ensemble(
            program,
            run.posterior,
            draws=arguments.ensemble,
            example=example if arguments.shrink else None,
        )
        if arguments.ensemble
        else None
    )
    table = deploy(
        net,
        arguments.out,
        example,
        formats=arguments.format,
        before=dense,
        ensemble=draws,
        report=report,
        seconds=arguments.seconds,
    )
    print(table.to_string(index=False))
    print(
        "\nthe files, network.py to load them without pyro_bmr, and report.json are in"
        f" {arguments.out}"
    )
    return 0


def _export_report(run: Run, program: Any, data: Data) -> dict[str, Any]:
    """What report.json says of a run: how it was fitted and reduced, how much of it lives, and what
    may mislead.
    """
    masks = run.posterior.masks
    sizes = (
        {"kept": sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())}
        if masks
        else {"kept": 1.0}
    )
    said = list(run.reduction.get("warnings", ()))
    if run.reduction:
        before, after = (
            predict(program, each, data.x_test, draws=0)
            for each in (load_run(run.folder).posterior, run.posterior)
        )
        said += _warn_of_loss(before, after, data)
    report: dict[str, Any] = finite(
        {"settings": run.settings, "reduction": run.reduction, **sizes, "warnings": said}
    )
    return report


def _warn_of_loss(before: Prediction, after: Prediction, data: Data) -> list[str]:
    caution = paired_loss(before, after, data.y_test).caution()
    if caution:
        units = "" if data.target_scale == 1 else ", target standardised"
        warn(f"test data{units}: {caution}")
    return [caution] if caution else []


def _scores(prediction: Prediction, data: Data) -> dict[str, float]:
    """Those of `compare`, which has NaN for what a task has not: rmse and nll (nats per row) in the
    units of the target.
    """
    return {
        name: value for name, value in scores(prediction, data).items() if not math.isnan(value)
    }


def _listed(values: Mapping[str, float], data: Data) -> str:
    units = " (rmse and nll in the units of the target)" if data.task == "regression" else ""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items()) + units


def _set_threads(threads: int) -> None:
    if threads < 1:
        raise ModelError(f"--threads {threads}: at least 1 is wanted")
    torch.set_num_threads(threads)


def _data(arguments: argparse.Namespace) -> int:
    for name, source in sources().items():
        state = "installed" if source.installed() else f"install with: {source.install}"
        print(f"{name:14} {source.about:55} {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
