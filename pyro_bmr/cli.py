"""The command line: `pyro-bmr compare`, `fit`, `reduce`, `export` and `data`. Errors that users can cause are one line and exit status 2."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import NoReturn

import torch

from pyro_bmr import metrics, plots
from pyro_bmr.comparison import ROUTES, Settings, compare, load_model, model_names, summary
from pyro_bmr.data import load, sources
from pyro_bmr.data_set import Data
from pyro_bmr.errors import ModelError, PyroBMRError
from pyro_bmr.exporting import deploy, ensemble, export, point_weights, save
from pyro_bmr.exporting.formats import FORMATS
from pyro_bmr.fitting import adam, fit
from pyro_bmr.guides import MeanField, Point
from pyro_bmr.networks import BayesianNetwork
from pyro_bmr.posterior import Posterior
from pyro_bmr.prediction import ClassPrediction, predict
from pyro_bmr.priors import Gaussian, Horseshoe, Laplace, Prior, SpikeAndSlab, StudentT
from pyro_bmr.pruning import Every
from pyro_bmr.reduction.sites import reduce
from pyro_bmr.runs import load_run, save_run
from pyro_bmr.shrinking import shrink_plan

PRIORS: dict[str, Prior] = {
    "gaussian": Gaussian(),
    "gaussian:layer": Gaussian("layer"),
    "gaussian:unit": Gaussian("layer", per="unit"),
    "gaussian:input": Gaussian("layer", per="input"),
    "gaussian:weight": Gaussian("layer", per="weight"),
    "gaussian:pretrained": Gaussian(mean="init"),
    "laplace": Laplace(),
    "student-t": StudentT(),
    "horseshoe": Horseshoe(),
    "horseshoe:unit": Horseshoe(tiers=("layer", "unit")),
    "horseshoe:input": Horseshoe(tiers=("layer", "input")),
    "horseshoe:tiered": Horseshoe.tiered(),
    "spike-and-slab": SpikeAndSlab(),
    "spike-and-slab:relaxed": SpikeAndSlab(temperature=0.5),
    "spike-and-slab:unit": SpikeAndSlab(temperature=0.5, per="unit"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except PyroBMRError as error:
        print(f"pyro-bmr: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def prior_from_name(name: str) -> Prior:
    """A prior by its name on the command line; ``gaussian:0.1`` is `Gaussian(scale=0.1)`.

    Raises:
        ModelError: there is no such prior.
    """
    if name in PRIORS:
        return PRIORS[name]
    family, _, number = name.partition(":")
    try:
        if family == "gaussian":
            return Gaussian(float(number))
    except ValueError:
        pass
    raise ModelError(f"no prior '{name}'; the priors are: {', '.join(PRIORS)} and gaussian:SCALE with a number")


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
    every = arguments.reduce_every or arguments.epochs / 10
    schedule = target and Every(every, target, arguments.start, kept=arguments.kept, stop=arguments.stop)
    result = fit(
        program,
        data,
        guide=Point if arguments.point else MeanField,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        optimizer=adam(arguments.learning_rate),
        seed=arguments.seed,
        temperature=arguments.temperature,
        reduce=schedule or None,
        progress=not arguments.quiet and sys.stderr.isatty(),
    )
    names = ("prior", "seed", "epochs", "batch_size", "learning_rate", "temperature", "point", "reduce_to", "reduce_every", "kept", "start", "stop")
    settings = {"model": model, "data": arguments.data, "target": arguments.target, **{name: getattr(arguments, name) for name in names}}
    scores = _scores(result.program, result.posterior, data, arguments.draws)
    save_run(result, arguments.out, {**settings, "seconds": result.seconds, **scores})
    print(", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    print(f"the run is in {arguments.out}; next: pyro-bmr reduce {arguments.out}, pyro-bmr export {arguments.out}")
    return 0


def _reduce(arguments: argparse.Namespace) -> int:
    run, prior = load_run(arguments.run_folder), prior_from_name(arguments.to)
    reduction = reduce(run.posterior, prior, arguments.per, threshold=arguments.threshold, kept=arguments.kept)
    about = {name: getattr(arguments, name) for name in ("to", "per", "threshold")} | {"target": arguments.kept}
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pyro-bmr", description="Sparse Bayesian networks by Bayesian model reduction.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    defaults = Settings()

    c = commands.add_parser("compare", help="prior × route × seed, one table", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    c.add_argument(
        "--model", help=f"{', '.join(model_names())} (sizes after a colon: mlp:500-500), or FILE.py with build(data, prior); default: mlp or linear_regression"
    )
    c.add_argument("--data", default="digits", help=f"{', '.join(sources())}, FILE.npz, FILE.csv, or a folder of IDX files")
    c.add_argument("--target", help="the column of FILE.csv to predict")
    c.add_argument("--priors", nargs="+", default=["gaussian", "horseshoe", "spike-and-slab"], metavar="PRIOR", help=", ".join([*PRIORS, "gaussian:SCALE"]))
    c.add_argument("--routes", nargs="+", default=list(ROUTES), metavar="ROUTE", help=", ".join(ROUTES))
    c.add_argument("--seeds", type=int, default=2, help="seeds 0 … N − 1")
    c.add_argument("--epochs", type=int, default=defaults.epochs)
    c.add_argument("--batch-size", type=int, default=defaults.batch_size)
    c.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    c.add_argument("--temperature", type=float, default=defaults.temperature, help="1 is Bayes; less counts the data more often")
    c.add_argument("--kept", type=float, default=defaults.kept, help="target fraction of weights for the reduced route; by default the evidence decides")
    c.add_argument(
        "--reduce-every", type=float, default=defaults.reduce_every, metavar="EPOCHS", help="interval of reductions during the fit; by default a tenth of it"
    )
    c.add_argument("--start", type=float, default=defaults.start, help="fraction of the fit before the first reduction")
    c.add_argument("--stop", type=float, default=defaults.stop, help="fraction of the fit after which nothing more is pruned")
    c.add_argument("--draws", type=int, default=defaults.draws, help="posterior draws for predictions")
    c.add_argument("--validation", type=float, default=None, metavar="FRACTION", help="score a held-out part of the training rows instead of the test rows")
    c.add_argument("--threads", type=int, default=1, help="threads of torch; small networks are fastest with one")
    c.add_argument("--out", default="results/compare", help="folder of the results; finished rows in it are kept")
    c.add_argument("--quiet", action="store_true", help="no progress bars")
    c.set_defaults(run=_compare)

    f = commands.add_parser("fit", help="one fit, saved as a run", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    f.add_argument("--model", help=f"{', '.join(model_names())} (sizes after a colon: mlp:500-500), or FILE.py with build(data, prior)")
    f.add_argument("--data", default="digits", help=f"{', '.join(sources())}, FILE.npz, FILE.csv, or a folder of IDX files")
    f.add_argument("--target", help="the column of FILE.csv to predict")
    f.add_argument("--prior", default="gaussian", help=", ".join([*PRIORS, "gaussian:SCALE"]))
    f.add_argument("--point", action="store_true", help="a point estimate (maximum a posteriori), which cannot be reduced")
    f.add_argument("--seed", type=int, default=0)
    f.add_argument("--epochs", type=int, default=defaults.epochs)
    f.add_argument("--batch-size", type=int, default=defaults.batch_size)
    f.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    f.add_argument("--temperature", type=float, default=defaults.temperature, help="1 is Bayes; less counts the data more often")
    f.add_argument("--reduce-to", metavar="PRIOR", help="reduce during the fit, too; gaussian:0 is the point spike")
    f.add_argument("--reduce-every", type=float, metavar="EPOCHS", help="interval of these reductions; by default a tenth of the fit")
    f.add_argument("--kept", type=float, help="target fraction of weights for these reductions; by default the evidence decides")
    f.add_argument("--start", type=float, default=defaults.start, help="fraction of the fit before the first reduction")
    f.add_argument("--stop", type=float, default=defaults.stop, help="fraction of the fit after which nothing more is pruned")
    f.add_argument("--draws", type=int, default=defaults.draws, help="posterior draws for the scores")
    f.add_argument("--threads", type=int, default=1)
    f.add_argument("--out", default="results/run", metavar="RUN", help="folder of the run")
    f.add_argument("--quiet", action="store_true", help="no progress bar")
    f.set_defaults(run=_fit)

    r = commands.add_parser("reduce", help="which weights of a run the evidence does without", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    r.add_argument("run_folder", metavar="RUN", help="folder of a run of pyro-bmr fit; the reduction is saved in it")
    r.add_argument("--to", default="gaussian:0", metavar="PRIOR", help=f"{', '.join([*PRIORS, 'gaussian:SCALE'])}; gaussian:0 is the point spike")
    r.add_argument("--per", default="weight", help="what is kept or goes as one: weight, unit, input, channel, head or layer")
    r.add_argument("--threshold", type=float, default=0.0, help="nats by which a weight has to be superfluous")
    r.add_argument("--kept", type=float, help="instead of the threshold, the fraction of weights that stays")
    r.add_argument("--draws", type=int, default=defaults.draws, help="posterior draws for the scores")
    r.set_defaults(run=_reduce)

    e = commands.add_parser("export", help="plain torch, smaller, in several formats", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    e.add_argument("run_folder", metavar="RUN", help="folder of a run; its last reduction is exported if it has one")
    e.add_argument("--format", nargs="+", default=["safetensors"], metavar="FORMAT", help=", ".join(FORMATS))
    e.add_argument("--shrink", action="store_true", help="remove dead units, channels and heads")
    e.add_argument("--ensemble", type=int, default=0, metavar="DRAWS", help="draws of the posterior to export as well")
    e.add_argument("--unreduced", action="store_true", help="export the posterior of the fit, whatever was reduced after it")
    e.add_argument("--seconds", type=float, default=0.3, help="length of each measurement of a latency")
    e.add_argument("--threads", type=int, default=1)
    e.add_argument("--out", default="results/export", metavar="DIR")
    e.set_defaults(run=_export)

    d = commands.add_parser("data", help="the data sets: which are installed, how to install the others")
    d.set_defaults(run=_data)
    return parser


if __name__ == "__main__":
    sys.exit(main())
