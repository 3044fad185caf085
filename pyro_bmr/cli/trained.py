"""The command for a network that is trained already: `pyro-bmr prune`.

Next: `selection.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pyro_bmr.cli.grids import set_threads, shows_progress
from pyro_bmr.data.data_set import Data
from pyro_bmr.data.named import load
from pyro_bmr.errors import ModelError
from pyro_bmr.experiments.models import load_model
from pyro_bmr.exporting import deploy
from pyro_bmr.files import reading
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.post_training import Pruned, prune
from pyro_bmr.prediction import metrics
from pyro_bmr.priors import Gaussian
from pyro_bmr.reduction.groups import NofM
from pyro_bmr.shrinking import shrink


def prune_network(arguments: argparse.Namespace) -> int:
    """Prunes a trained network, writes it, and prints its layers and what is lost."""
    set_threads(arguments.threads)
    data = load(arguments.data, arguments.target)
    model = arguments.model or ("mlp" if data.task == "classification" else "linear_regression")
    program = load_model(model)(data, Gaussian())
    if not isinstance(program, BayesianNetwork):
        raise ModelError(
            f"'{model}': expected a BayesianNetwork from build, got"
            f" {type(program).__name__}; prune takes networks alone"
        )
    net = _with_weights(program.net, Path(arguments.weights))
    pruned = prune(
        net,
        (data.x_train, data.y_train),
        program.likelihood,
        _kept(arguments.kept),
        per=arguments.per,
        heads=arguments.heads,
        rows=arguments.rows,
        corrections=arguments.corrections,
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
    example, small = data.x_test[:128], pruned.net
    if arguments.shrink:
        small = shrink(pruned.net, pruned.masks, example)
    before, after = (_score(one, data) for one in (net, small))
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
    (name, first), (_, last) = next(iter(before.items())), next(iter(after.items()))
    print(
        f"\n{name} on the test rows: {first:.4g} before, {last:.4g} after, {pruned.kept:.1%} of the"
        f" weights kept; the files are in {arguments.out}"
    )


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
    if noise is None:
        noise = metrics.rmse(_outputs(net, data.x_train), data.y_train)
    return {"noise": torch.tensor(float(noise))}


@torch.no_grad()
def _outputs(net: nn.Module, x: Tensor) -> Tensor:
    outputs: Tensor = torch.cat([net(rows) for rows in x.split(1000)])
    return outputs[:, 0] if outputs.ndim == 2 and outputs.shape[1] == 1 else outputs


def _score(net: nn.Module, data: Data) -> dict[str, Any]:
    """On the test rows: accuracy, or rmse in the units of the target."""
    outputs = _outputs(net, data.x_test)
    if data.task == "classification":
        return {"accuracy": metrics.accuracy(outputs.softmax(1), data.y_test)}
    return {"rmse": metrics.rmse(outputs, data.y_test) * data.target_scale}
