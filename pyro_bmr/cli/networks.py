"""The commands for a fitted network: `pyro-bmr reduce` and `export`.

Next: `commands.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmr.cli.grids import set_threads
from pyro_bmr.cli.scoring import listed, network_scores, scored, warn_of_loss
from pyro_bmr.data.data_set import Data
from pyro_bmr.data.targets import kind_of
from pyro_bmr.errors import ModelError
from pyro_bmr.experiments.folder import read_cell
from pyro_bmr.experiments.runs import Run, load_run
from pyro_bmr.experiments.temperature_trials import at_scale
from pyro_bmr.exporting import deploy, ensemble, export, point_weights, save
from pyro_bmr.files import finite
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.prediction.predict import predict
from pyro_bmr.priors.names import prior_from_name
from pyro_bmr.reduction.reduce import reduce
from pyro_bmr.shrinking import shrink_plan


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
        window=arguments.window,
    )
    names = ("to", "per", "heads", "threshold", "window")
    about = {name: getattr(arguments, name) for name in names} | {"target": arguments.kept}
    run.reduced(reduction, about)
    drawn = {"draws": arguments.draws, "seed": int(run.settings["seed"])}
    scale = float(run.settings.get("scale") or 1.0)
    before, after = (
        at_scale(predict(program, posterior, data.x_test, **drawn), scale)
        for posterior in (run.posterior, reduction.posterior)
    )
    warn_of_loss(before, after, data)
    print(reduction.table().to_string(index=False))
    summary = {"kept": reduction.kept, "delta_f": reduction.delta_f, **scored(after, data)}
    print(listed(summary, data))
    return 0


def export_run(arguments: argparse.Namespace) -> int:
    """Exports a run, and prints the files, what they cost, and what the network does not apply."""
    set_threads(arguments.threads)
    run = load_run(arguments.run_folder, reduced=not arguments.unreduced)
    data = run.data()
    _export(arguments, run, data)
    if (scale := _class_temperature(run, data)) != 1:
        print(
            f"\nthe scores of the run are those of class probabilities at the temperature"
            f" {scale:.4g} (scale), which the exported network does not apply: divide its logits by"
            " it, or by what pyro_bmr.prediction.best_temperature finds for them on held-out rows"
        )
    return 0


def _class_temperature(run: Run, data: Data) -> float:
    """The temperature of the class probabilities in the scores of a run; 1 for other targets."""
    if kind_of(data.likelihood()) not in ("classes", "bits"):
        return 1.0
    held = read_cell(run.folder / "row.json") if run.posterior is None else run.settings
    return float(held.get("scale") or 1.0)


def _export(arguments: argparse.Namespace, run: Run, data: Data) -> None:
    example = data.seen(data.x_test[:128])
    if run.posterior is None:
        _export_network(arguments, run.network(data), _report(run, None, data), {}, None, data)
        return
    program = run.program(data)
    if not isinstance(program, BayesianNetwork):
        _export_weights(arguments, run, program, data)
        return
    report = _report(run, program, data)
    draws = None
    if arguments.ensemble:
        like = example if arguments.shrink else None
        draws = ensemble(program, run.posterior, draws=arguments.ensemble, example=like)
    dense, masks = export(program, run.posterior), run.posterior.masks
    _export_network(arguments, dense, report, masks, draws, data)


def _export_network(
    arguments: argparse.Namespace,
    dense: nn.Module,
    report: dict[str, Any],
    masks: Mapping[str, Tensor],
    draws: Mapping[str, Tensor] | None,
    data: Data,
) -> None:
    """Shrinks a network if asked, writes it, and prints the files and what they cost."""
    net, example = dense, data.seen(data.x_test[:128])
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


def _export_weights(arguments: argparse.Namespace, run: Run, program: Any, data: Data) -> None:
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


def _scores_of(net: nn.Module, data: Data) -> dict[str, Any]:
    """What the exported network scores on the test rows, and the units of its outputs."""
    found: dict[str, Any] = network_scores(net, data)
    if kind_of(data.likelihood()) != "reals":
        return found
    # the network gives (target − mean) / scale
    mean, scale = (torch.as_tensor(t).tolist() for t in (data.target_mean, data.target_scale))
    return {**found, "target": {"mean": mean, "scale": scale}}


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
