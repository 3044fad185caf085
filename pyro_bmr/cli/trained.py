"""The command for a network that is trained already: `pyro-bmr prune`.

Next: `selection.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pyro_bmr.cli.grids import set_threads, shows_progress
from pyro_bmr.cli.scoring import network_scores
from pyro_bmr.data.data_set import Data
from pyro_bmr.data.named import load
from pyro_bmr.errors import ModelError
from pyro_bmr.experiments.models import default_model, load_model
from pyro_bmr.exporting import deploy
from pyro_bmr.files import reading
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.post_training import Pruned, prune
from pyro_bmr.priors import Gaussian
from pyro_bmr.reduction.groups import NofM
from pyro_bmr.shrinking import reader_labels, shrink


def prune_network(arguments: argparse.Namespace) -> int:
    """Prunes a trained network, writes it, and prints its layers and what is lost."""
    set_threads(arguments.threads)
    data = load(arguments.data, arguments.target, arguments.likelihood)
    model = arguments.model or default_model(data)
    program = load_model(model)(data, Gaussian())
    if not isinstance(program, BayesianNetwork):
        raise ModelError(
            f"'{model}': expected a BayesianNetwork from build, got"
            f" {type(program).__name__}; prune takes networks alone"
        )
    net, example = _with_weights(program.net, Path(arguments.weights)), data.seen(data.x_train[:4])
    pruned = prune(
        net,
        (data.x_train, data.y_train),
        program.likelihood,
        _kept(arguments.kept),
        per=reader_labels(net, example) if arguments.per == "reader" else arguments.per,
        heads=arguments.heads,
        rows=arguments.rows,
        corrections=arguments.corrections,
        last_corrections=5 * arguments.corrections,
        values=_values(net, program, data, arguments.noise),
        most_rise=arguments.most_rise,
        seed=arguments.seed,
        checkpoint=Path(arguments.out) / "rounds" if arguments.resume else None,
        progress=shows_progress(arguments),
    )
    pruned.reduction.save(Path(arguments.out) / "reduction")
    _write(arguments, net, pruned, data)
    return 0


def _write(arguments: argparse.Namespace, net: nn.Module, pruned: Pruned, data: Data) -> None:
    example, small = data.seen(data.x_test[:128]), pruned.net
    if arguments.shrink:
        small = shrink(pruned.net, pruned.masks, example)
    before, after = (network_scores(one, data) for one in (net, small))
    report = {
        "kept": pruned.kept,
        "delta_f": pruned.reduction.delta_f,
        "rounds": [dict(row) for row in pruned.rounds],
        "stopped": pruned.stopped,
        "before": before,
        **after,
    }
    table = deploy(
        small,
        arguments.out,
        example,
        formats=arguments.format,
        before=net,
        report=report,
        seconds=arguments.seconds,
    )
    print(pruned.table().to_string(index=False, float_format="%.4g"))
    if pruned.stopped:
        print(f"stopped: {pruned.stopped}")
    print()
    print(table.to_string(index=False))
    said = ""
    for name in list(before)[:1]:
        said = f"{name} on the test rows: {before[name]:.4g} before, {after[name]:.4g} after, "
    print(f"\n{said}{pruned.kept:.1%} of the weights kept; the files are in {arguments.out}")


def _with_weights(net: nn.Module, path: Path) -> nn.Module:
    """The network with the weights of a safetensors file."""
    mend = "give a safetensors file of the state_dict of this model"
    with reading(f"--weights '{path}' does not fit the model", ModelError, mend):
        net.load_state_dict(load_file(path))
    return net.eval()


def _kept(text: str) -> float | NofM:
    """A fraction, or a pattern such as 2:4."""
    n, colon, m = text.partition(":")
    try:
        return NofM(int(n), int(m)) if colon else float(text)
    except ValueError:
        raise ModelError(
            f"--kept {text}: expected a fraction such as 0.1, or a pattern such as 2:4"
        ) from None


def _values(
    net: nn.Module, program: BayesianNetwork, data: Data, noise: float | None
) -> dict[str, Tensor] | None:
    """The noise of real targets: as given, or the root mean square error on the training rows."""
    inferred = getattr(program.likelihood, "inferred", ())
    if inferred != ("noise",):
        return None
    each = getattr(program.likelihood, "noise", None) == "per output"
    if noise is not None:
        return {"noise": torch.full(data.y_train.shape[1:] if each else (), float(noise))}
    with torch.no_grad():
        outputs = torch.cat([net(rows) for rows in data.seen(data.x_train).split(1000)])
    errors = (outputs.reshape(data.y_train.shape) - data.y_train).square()
    return {"noise": (errors.nanmean(0) if each else errors.nanmean()).sqrt()}
