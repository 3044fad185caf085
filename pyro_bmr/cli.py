"""The command line: `pyro-bmr compare`, `study`, `fit`, `reduce`, `export` and `data`. Errors that users can cause are one line and exit status 2."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from pyro_bmr import metrics, plots
from pyro_bmr.comparison import OPTIMIZERS, ROUTES, Settings, compare, load_model, model_names, optimizer_named, summary
from pyro_bmr.data import load, sources
from pyro_bmr.data_set import Data
from pyro_bmr.errors import ModelError, PyroBMRError
from pyro_bmr.exporting import deploy, ensemble, export, point_weights, save
from pyro_bmr.exporting.formats import FORMATS
from pyro_bmr.fitting import fit
from pyro_bmr.guides import MeanField, Point
from pyro_bmr.guides.row_noise import PER_ROW, PER_STEP
from pyro_bmr.networks import BayesianNetwork
from pyro_bmr.posterior import Posterior
from pyro_bmr.prediction import ClassPrediction, predict
from pyro_bmr.prior_names import PRIORS, prior_from_name
from pyro_bmr.processes import process_group
from pyro_bmr.pruning import Every
from pyro_bmr.reduction.groups import GROUPS
from pyro_bmr.reduction.sites import reduce
from pyro_bmr.runs import load_run, save_run
from pyro_bmr.shrinking import shrink_plan
from pyro_bmr.studies import cells_left, declare, study, summary_of


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except PyroBMRError as error:
        print(f"pyro-bmr: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"pyro-bmr: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130


def _compare(arguments: argparse.Namespace) -> int:
    plots.headless()
    priors = {name: prior_from_name(name) for name in arguments.priors}
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
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
    print(f"\nresults.csv, report.md, pictures and {len(table)} exported networks are in {arguments.out}")
    return 0


def _study(arguments: argparse.Namespace) -> int:
    plots.headless()
    declared = declare(arguments.file, seeds=arguments.seeds, validation=arguments.validation)
    if arguments.list:
        cells, seconds = cells_left(declared, arguments.out, only=arguments.only, jobs=arguments.jobs)
        print(cells.to_string(index=False, float_format="%.1f", na_rep="?"))
        counts = cells["state"].value_counts()
        print(f"\n{', '.join(f'{counts.get(state, 0)} {state}' for state in ('finished', 'failed', 'open'))}; {_duration(seconds)} to go")
        return 0
    done = study(declared, arguments.out, jobs=arguments.jobs, only=arguments.only, progress=not arguments.quiet and sys.stderr.isatty())
    if not done.table.empty:
        print(summary_of(done.table).to_string(index=False))
        print(f"\nresults.csv, report.html, report.md and pictures of {len(done.table)} finished cells are in {arguments.out}")
    for cell, line in done.failures.items():
        print(f"pyro-bmr: {cell} failed: {line}", file=sys.stderr)
    return 1 if done.failures else 0


def _duration(seconds: float) -> str:
    """About how long, in words."""
    if math.isnan(seconds):
        return "unknown time"
    return f"about {seconds:.0f} s" if seconds < 120 else f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"


def _fit(arguments: argparse.Namespace) -> int:
    _set_threads(arguments.threads)
    prior, target = prior_from_name(arguments.prior), arguments.reduce_to and prior_from_name(arguments.reduce_to)
    data = load(arguments.data, arguments.target)
    model = arguments.model or ("mlp" if data.task == "classification" else "linear_regression")
    with torch.random.fork_rng():
        torch.manual_seed(arguments.seed)
        program = load_model(model)(data, prior)
    if target is None and arguments.kept is not None:
        raise ModelError(f"--kept {arguments.kept}: a target needs reductions during the fit; add --reduce-to gaussian:0")
    if target is None and arguments.per != "weight":
        raise ModelError(f"--per {arguments.per}: groups need reductions during the fit; add --reduce-to gaussian:0")
    every = arguments.reduce_every or arguments.epochs / 10
    schedule = target and Every(every, target, arguments.start, kept=arguments.kept, stop=arguments.stop, per=arguments.per, heads=arguments.heads)
    make, arguments.learning_rate = optimizer_named(arguments.optimizer, arguments.learning_rate)
    with process_group() as rank:
        result = fit(
            program,
            data,
            guide=Point if arguments.point else partial(MeanField, estimator=arguments.estimator),
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
    asked = {name: value for name, value in vars(arguments).items() if name not in ("run", "out", "quiet", "threads", "draws", "resume")}
    settings = {**asked, "model": model}
    scores = _scores(result.program, result.posterior, data, arguments.draws)
    save_run(result, arguments.out, {**settings, "seconds": result.seconds, **scores})
    print(", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    print(f"the run is in {arguments.out}; next: pyro-bmr reduce {arguments.out}, pyro-bmr export {arguments.out}")
    return 0


def _reduce(arguments: argparse.Namespace) -> int:
    run, prior = load_run(arguments.run_folder), prior_from_name(arguments.to)
    reduction = reduce(run.posterior, prior, arguments.per, threshold=arguments.threshold, kept=arguments.kept, heads=arguments.heads)
    about = {name: getattr(arguments, name) for name in ("to", "per", "heads", "threshold")} | {"target": arguments.kept}
    run.reduced(reduction, about)
    data = run.data()
    scores = _scores(run.program(prior_from_name(run.settings["prior"]), data), reduction.posterior, data, arguments.draws)
    print(reduction.table().to_string(index=False))
    print(", ".join(f"{name} {value:.4g}" for name, value in {"kept": reduction.kept, "delta_f": reduction.delta_f, **scores}.items()))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    _set_threads(arguments.threads)
    run = load_run(arguments.run_folder, reduced=not arguments.unreduced)
    data = run.data()
    program = run.program(prior_from_name(run.settings["prior"]), data)
    masks = run.posterior.masks
    sizes = {"kept": sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())} if masks else {"kept": 1.0}
    report = {"settings": dict(run.settings), "reduction": dict(run.reduction), **sizes}
    if not isinstance(program, BayesianNetwork):
        if arguments.format != ["safetensors"] or arguments.shrink or arguments.ensemble:
            raise ModelError(f"'{run.settings['model']}' is a program of its own and no network: its weights can be exported, as safetensors, and nothing else")
        save(point_weights(program, run.posterior), arguments.out, report)
        print(f"model.safetensors and report.json are in {arguments.out}")
        return 0
    dense = export(program, run.posterior)
    net, example = dense, data.x_test[:128]
    if arguments.shrink:
        plan = shrink_plan(dense, masks, example)
        print(f"{plan}\n")
        net = plan.apply()
        report |= {"plan": plan.layers.to_dict(orient="records"), "kept channels": dict(plan.kept), "inputs not read": plan.unread_inputs.tolist()}
    with torch.no_grad():
        outputs = torch.cat([net(rows) for rows in data.x_test.split(1000)])
    if data.task == "classification":
        report["accuracy"] = metrics.accuracy(outputs.softmax(1), data.y_test)
    else:
        report["rmse"] = metrics.rmse(outputs[:, 0] if outputs.ndim > 1 else outputs, data.y_test)
    draws = ensemble(program, run.posterior, draws=arguments.ensemble, example=example if arguments.shrink else None) if arguments.ensemble else None
    table = deploy(net, arguments.out, example, formats=arguments.format, before=dense, ensemble=draws, report=report, seconds=arguments.seconds)
    print(table.to_string(index=False))
    print(f"\nthe files, network.py to load them without pyro_bmr, and report.json are in {arguments.out}")
    return 0


def _scores(program: object, posterior: Posterior, data: Data, draws: int) -> dict[str, float]:
    prediction = predict(program, posterior, data.x_test, draws=draws)  # type: ignore[arg-type]
    nll = -float(prediction.log_prob(data.y_test).mean())
    if isinstance(prediction, ClassPrediction):
        return {"accuracy": metrics.accuracy(prediction.probs, data.y_test), "nll": nll, "ece": metrics.ece(prediction.probs, data.y_test)}
    return {"rmse": metrics.rmse(prediction.mean, data.y_test), "nll": nll}


def _set_threads(threads: int) -> None:
    if threads < 1:
        raise ModelError(f"--threads {threads}: at least 1 is wanted")
    torch.set_num_threads(threads)


def _data(arguments: argparse.Namespace) -> int:
    for name, source in sources().items():
        state = "installed" if source.installed() else f"install with: {source.install}"
        print(f"{name:14} {source.about:55} {state}")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Help(argparse.HelpFormatter):
    """Adds the default to the help of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if default is None or default is False or default == argparse.SUPPRESS or not action.option_strings:
            return text
        return f"{text} (default: {' '.join(default) if isinstance(default, list) else '%(default)s'})"


def _parser() -> argparse.ArgumentParser:
    description = "Sparse Bayesian networks by Bayesian model reduction: compare priors in one table, or fit, reduce and export one network step by step."
    parser = _Parser(prog="pyro-bmr", description=description, epilog="pyro-bmr COMMAND --help has the options of each command.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    defaults = Settings()

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str, more: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}. {more}", formatter_class=_Help)
        added.set_defaults(run=run)
        return added

    c = command(
        "compare", _compare, "fit and score each prior by each route with each seed, in one table", "An interrupted comparison goes on where it stopped."
    )
    _add_problem(c)
    c.add_argument("--priors", nargs="+", default=["gaussian", "horseshoe", "spike-and-slab"], metavar="PRIOR", help=_PRIORS)
    c.add_argument("--routes", nargs="+", default=list(ROUTES), metavar="ROUTE", help="point estimate, fitted under the prior, reduced to it")
    c.add_argument("--seeds", type=int, default=2, metavar="N", help="seeds 0 … N − 1")
    _add_fit(c, defaults)
    c.add_argument("--kept", type=float, metavar="FRACTION", help="target fraction of weights for the reduced route; by default the evidence decides")
    c.add_argument("--reduce-every", type=float, metavar="EPOCHS", help="interval of reductions during the fit; by default a tenth of it")
    _add_schedule(c, defaults)
    c.add_argument("--validation", type=float, metavar="FRACTION", help="score a held-out part of the training rows instead of the test rows")
    _add_run(c, defaults)
    c.add_argument("--out", default="results/compare", metavar="DIR", help="folder of the results; finished rows in it are kept")
    c.add_argument("--quiet", action="store_true", help="no progress bars")

    s = command(
        "study", _study, "run a declared grid of models, data, methods and seeds, and report it", "Finished cells are not run again; see docs/studies.md."
    )
    s.add_argument("file", metavar="FILE", help="the declaration, a TOML file")
    s.add_argument("--out", default="results/study", metavar="DIR", help="folder of the results; finished cells in it are kept")
    s.add_argument("--jobs", type=int, default=1, metavar="N", help="cells that run at once, each in a process with one thread; -1 for one per core")
    s.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these methods and no others")
    s.add_argument("--seeds", type=int, metavar="N", help="seeds 0 … N − 1 in the place of the declared ones")
    s.add_argument("--validation", type=float, metavar="FRACTION", help="score a held-out part of the training rows instead of the test rows")
    s.add_argument("--list", action="store_true", help="print the cells, which are finished and what the others may take, and run nothing")
    s.add_argument("--quiet", action="store_true", help="no progress bar")

    f = command("fit", _fit, "fit one network and save it as a run", "pyro-bmr reduce and pyro-bmr export take the run from there.")
    _add_problem(f)
    f.add_argument("--prior", default="gaussian", help=_PRIORS)
    f.add_argument("--point", action="store_true", help="a point estimate (maximum a posteriori), which cannot be reduced")
    f.add_argument("--seed", type=int, default=0, help="of everything random")
    _add_fit(f, defaults)
    f.add_argument("--reduce-to", metavar="PRIOR", help=f"reduce during the fit, too, to one of: {TARGETS}")
    f.add_argument("--reduce-every", type=float, metavar="EPOCHS", help="interval of these reductions; by default a tenth of the fit")
    _add_groups(f)
    f.add_argument("--kept", type=float, metavar="FRACTION", help="target fraction of weights for these reductions; by default the evidence decides")
    _add_schedule(f, defaults)
    _add_run(f, defaults)
    f.add_argument("--resume", action="store_true", help="save the fit in RUN/checkpoints as it runs, and go on from there if it was stopped before")
    f.add_argument("--out", default="results/run", metavar="RUN", help="folder of the run")
    f.add_argument("--quiet", action="store_true", help="no progress bar")

    r = command(
        "reduce", _reduce, "say which weights of a run the evidence does without, and prune them", "No new fit; the posterior of the fit stays in the run."
    )
    r.add_argument("run_folder", metavar="RUN", help="folder of a run of pyro-bmr fit; the reduction is saved in it")
    r.add_argument("--to", default="gaussian:0", metavar="PRIOR", help=TARGETS)
    _add_groups(r)
    r.add_argument("--threshold", type=float, default=0.0, metavar="NATS", help="by how much the evidence has to rise without a weight or group")
    r.add_argument("--kept", type=float, metavar="FRACTION", help="instead of the threshold, the fraction of weights that stays")
    r.add_argument("--draws", type=int, default=defaults.draws, metavar="N", help="posterior draws for predictions")

    e = command("export", _export, "write a run as plain torch, smaller if asked, in several formats", "The files load without pyro_bmr.")
    e.add_argument("run_folder", metavar="RUN", help="folder of a run; its last reduction is exported if it has one")
    e.add_argument("--format", nargs="+", default=["safetensors"], metavar="FORMAT", help=", ".join(FORMATS))
    e.add_argument("--shrink", action="store_true", help="remove dead units, channels and heads")
    e.add_argument("--ensemble", type=int, default=0, metavar="N", help="draws of the posterior to export as well")
    e.add_argument("--unreduced", action="store_true", help="export the posterior of the fit, whatever was reduced after it")
    e.add_argument("--seconds", type=float, default=0.3, help="length of each measurement of a latency")
    e.add_argument("--threads", type=int, default=1, metavar="N", help=_THREADS)
    e.add_argument("--out", default="results/export", metavar="DIR", help="folder of the files")

    command("data", _data, "list the data sets: which are installed, how to install the others", "Files of your own need no installing: see --data.")
    return parser


_PRIORS = ", ".join([*PRIORS, "gaussian:SCALE"])
TARGETS = (
    "gaussian:0 (the point spike), gaussian:SCALE, gaussian (the scale with the best evidence), laplace, student-t, horseshoe, horseshoe:unit, spike-and-slab"
)
_THREADS = "threads of torch; small networks are fastest with one"


def _add_problem(parser: argparse.ArgumentParser) -> None:
    own = "sizes after a colon, as in mlp:500-500; or FILE.py with build(data, prior). By default mlp, or linear_regression for real targets"
    parser.add_argument("--model", help=f"{', '.join(model_names())}; {own}")
    parser.add_argument("--data", default="digits", help=f"{', '.join(sources())}, FILE.npz, FILE.csv, or a folder of IDX files")
    parser.add_argument("--target", metavar="COLUMN", help="the column of FILE.csv to predict")


def _add_fit(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    rates = ", ".join(f"{rate:g} for {name}" for name, (_, rate) in OPTIMIZERS.items())
    parser.add_argument("--epochs", type=int, default=defaults.epochs, metavar="N", help="passes over the training rows")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, metavar="ROWS", help="rows of a step")
    parser.add_argument("--optimizer", default=defaults.optimizer, metavar="NAME", help=", ".join(OPTIMIZERS))
    parser.add_argument("--learning-rate", type=float, metavar="RATE", help=f"by default {rates}; it falls to 0 over the fit")
    parser.add_argument("--estimator", default=defaults.estimator, metavar="NAME", help=f"of mean field's gradient: {', '.join((*PER_STEP, *PER_ROW))}")
    parser.add_argument("--temperature", type=float, default=defaults.temperature, metavar="T", help="1 is Bayes; less counts the data more often")


def _add_groups(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--per", default="weight", metavar="GROUP", help=f"what stays or goes as one: weight, {', '.join(GROUPS)}")
    parser.add_argument("--heads", type=int, metavar="N", help="the number of attention heads, for --per head")


def _add_schedule(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    parser.add_argument("--start", type=float, default=defaults.start, metavar="FRACTION", help="of the fit, before the first reduction")
    parser.add_argument("--stop", type=float, default=defaults.stop, metavar="FRACTION", help="of the fit, after which nothing more is pruned")


def _add_run(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    parser.add_argument("--draws", type=int, default=defaults.draws, metavar="N", help="posterior draws for predictions")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help=_THREADS)


if __name__ == "__main__":
    sys.exit(main())
