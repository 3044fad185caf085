"""The commands for one network: `pyro-bmr fit`, `reduce` and `export`.

Next: `commands.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmr.cli.grids import set_threads, shows_progress
from pyro_bmr.cli.scoring import listed, scored, warn_of_loss
from pyro_bmr.data.data_set import Data
from pyro_bmr.data.named import load
from pyro_bmr.errors import ModelError
from pyro_bmr.experiments.folder import read_cell
from pyro_bmr.experiments.models import load_model
from pyro_bmr.experiments.runs import Run, check_run_folder, load_run, save_run
from pyro_bmr.experiments.settings import (
    Settings,
    guide_named,
    length_of,
    optimizer_named,
    temperature_of,
)
from pyro_bmr.exporting import deploy, ensemble, export, point_weights, save
from pyro_bmr.files import finite
from pyro_bmr.fitting.fit import fit
from pyro_bmr.fitting.processes import process_group
from pyro_bmr.guides import Point
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.predict import predict
from pyro_bmr.priors.names import prior_from_name
from pyro_bmr.pruning import Every
from pyro_bmr.reduction.reduce import reduce
from pyro_bmr.shrinking import shrink_plan

_NO_SETTINGS = ("run", "out", "quiet", "threads", "draws", "resume")


def fit_run(arguments: argparse.Namespace) -> int:
    """Fits a network, saves it as a run and prints its scores."""
    set_threads(arguments.threads)
    if arguments.optimizer is None:
        usual = Settings(guide=arguments.guide, estimator=arguments.estimator).optimizer
        arguments.optimizer = "adam" if arguments.map else usual
    prior, schedule = prior_from_name(arguments.prior), _schedule(arguments)
    data = load(arguments.data, arguments.target)
    model = arguments.model or ("mlp" if data.task == "classification" else "linear_regression")
    with torch.random.fork_rng():
        torch.manual_seed(arguments.seed)
        program = load_model(model)(data, prior)
    guide = _guide(arguments)
    route = "map" if arguments.map else "reduced" if schedule else "fitted"
    arguments.temperature = temperature_of(arguments.temperature, route, data)
    make, arguments.learning_rate = optimizer_named(arguments.optimizer, arguments.learning_rate)
    check_run_folder(arguments.out)
    with process_group() as rank:
        result = fit(
            program,
            data,
            guide=guide,
            epochs=length_of(arguments.epochs),
            batch_size=arguments.batch_size,
            optimizer=make(),
            seed=arguments.seed,
            temperature=arguments.temperature,
            reduce=schedule,
            progress=shows_progress(arguments),
            checkpoint=Path(arguments.out) / "checkpoints" if arguments.resume else None,
        )
    if rank > 0:
        return 0  # the first process has it all
    drawn = {"draws": arguments.draws, "seed": arguments.seed}
    found = scored(predict(result.program, result.posterior, data.x_test, **drawn), data)
    asked = {name: value for name, value in vars(arguments).items() if name not in _NO_SETTINGS}
    save_run(result, arguments.out, {**asked, "model": model, "seconds": result.seconds, **found})
    print(listed(found, data))
    print(
        f"the run is in {arguments.out}; next: pyro-bmr reduce {arguments.out}, pyro-bmr export"
        f" {arguments.out}"
    )
    return 0


def _schedule(arguments: argparse.Namespace) -> Every | None:
    """The reductions during the fit, if any are asked for."""
    if not arguments.reduce_to:
        for option, value, usual in (
            ("kept", arguments.kept, None),
            ("per", arguments.per, "weight"),
        ):
            if value != usual:
                raise ModelError(
                    f"--{option} {value}: expected reductions during the fit; add --reduce-to"
                    " gaussian:0"
                )
        return None
    return Every(
        arguments.reduce_every,
        prior_from_name(arguments.reduce_to),
        arguments.start,
        kept=arguments.kept,
        stop=arguments.stop,
        per=arguments.per,
        heads=arguments.heads,
    )


def _guide(arguments: argparse.Namespace) -> Any:
    if not arguments.map:
        return guide_named(arguments.guide, arguments.optimizer, arguments.estimator)
    if arguments.guide != "mean-field":
        raise ModelError(f"--guide {arguments.guide}: --map has no guide; leave out one of them")
    return Point


def reduce_run(arguments: argparse.Namespace) -> int:
    """Reduces a run and prints what is kept, and its scores."""
    run, prior = load_run(arguments.run_folder), prior_from_name(arguments.to)
    if run.posterior is None:
        raise ModelError(
            f"'{run.folder}': expected a fit with a posterior, got the cell of the method"
            f" {run.settings['method']}, which can be exported"
        )
    data = run.data()
    program = run.program(data)
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
    drawn = {"draws": arguments.draws, "seed": int(run.settings["seed"])}
    before, after = (
        predict(program, posterior, data.x_test, **drawn)
        for posterior in (run.posterior, reduction.posterior)
    )
    warn_of_loss(before, after, data)
    print(reduction.table().to_string(index=False))
    summary = {"kept": reduction.kept, "delta_f": reduction.delta_f, **scored(after, data)}
    print(listed(summary, data))
    return 0


def export_run(arguments: argparse.Namespace) -> int:
    """Exports a run, and prints the files and what they cost."""
    set_threads(arguments.threads)
    run = load_run(arguments.run_folder, reduced=not arguments.unreduced)
    data = run.data()
    example = data.x_test[:128]
    if run.posterior is None:
        _export_network(arguments, run.network(data), _report(run, None, data), {}, None, data)
        return 0
    program = run.program(data)
    if not isinstance(program, BayesianNetwork):
        return _export_weights(arguments, run, program, data)
    report = _report(run, program, data)
    draws = None
    if arguments.ensemble:
        like = example if arguments.shrink else None
        draws = ensemble(program, run.posterior, draws=arguments.ensemble, example=like)
    dense, masks = export(program, run.posterior), run.posterior.masks
    _export_network(arguments, dense, report, masks, draws, data)
    return 0


def _export_network(
    arguments: argparse.Namespace,
    dense: nn.Module,
    report: dict[str, Any],
    masks: Mapping[str, Tensor],
    draws: Mapping[str, Tensor] | None,
    data: Data,
) -> None:
    """Shrinks a network if asked, writes it, and prints the files and what they cost."""
    net, example = dense, data.x_test[:128]
    if arguments.ensemble and draws is None:
        raise ModelError(
            f"--ensemble {arguments.ensemble}: expected a run with a posterior, got a plain network"
        )
    if arguments.shrink:
        plan = shrink_plan(dense, masks, example)
        print(f"{plan}\n")
        net = plan.apply()
        report |= {
            "plan": plan.layers.to_dict(orient="records"),
            "kept channels": dict(plan.kept),
            "inputs not read": plan.unread_inputs.tolist(),
        }
    table = deploy(
        net,
        arguments.out,
        example,
        formats=arguments.format,
        before=dense,
        ensemble=draws,
        report={**report, **_scores_of(net, data)},
        seconds=arguments.seconds,
    )
    print(table.to_string(index=False))
    print(
        "\nthe files, network.py to load them without pyro_bmr, and report.json are in"
        f" {arguments.out}"
    )


def _export_weights(arguments: argparse.Namespace, run: Run, program: Any, data: Data) -> int:
    """The weights of a program that is no network."""
    if arguments.format != ["safetensors"] or arguments.shrink or arguments.ensemble:
        raise ModelError(
            f"'{run.settings['model']}' is a program of its own and no network: its weights can"
            " be exported, as safetensors, and nothing else"
        )
    report = _report(run, program, data)
    assert run.posterior is not None
    save(point_weights(program, run.posterior), arguments.out, report)
    print(f"model.safetensors and report.json are in {arguments.out}")
    return 0


def _scores_of(net: nn.Module, data: Data) -> dict[str, Any]:
    """What the exported network scores on the test rows."""
    with torch.no_grad():
        outputs: Tensor = torch.cat([net(rows) for rows in data.x_test.split(1000)])
    if data.task == "classification":
        return {"accuracy": metrics.accuracy(outputs.softmax(1), data.y_test)}
    outputs = outputs[:, 0] if outputs.ndim > 1 else outputs
    # the network gives (target − mean) / scale
    target = {"mean": data.target_mean, "scale": data.target_scale}
    return {"rmse": metrics.rmse(outputs, data.y_test) * data.target_scale, "target": target}


def _report(run: Run, program: Any, data: Data) -> dict[str, Any]:
    """What report.json says of a run: how it was fitted and reduced, how much of it is kept, and
    what may mislead.
    """
    if run.posterior is None:
        kept = float(read_cell(run.folder / "row.json")["kept"])
    else:
        masks = run.posterior.masks.values()
        total = sum(mask.numel() for mask in masks)
        kept = sum(int(mask.sum()) for mask in masks) / total if masks else 1.0
    said = list(run.reduction.get("warnings", ()))
    if run.reduction:
        before, after = (
            predict(program, posterior, data.x_test, draws=0)
            for posterior in (load_run(run.folder).posterior, run.posterior)
            if posterior is not None
        )
        said += warn_of_loss(before, after, data)
    report: dict[str, Any] = finite(
        {"settings": run.settings, "reduction": run.reduction, "kept": kept, "warnings": said}
    )
    return report
