"""From a posterior to plain torch: a network with exact zeros, and files that load where Pyro is
not installed.

Owns `export` (an `nn.Module`), `ensemble` (draws of it), `point_weights` (tensors of any program)
and `save` (safetensors + report.json). Next: `costs.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pyro_bmr.errors import ModelError, described, holds, warn
from pyro_bmr.exporting.finite import check_finite, check_network
from pyro_bmr.files import digests, replacing, write_atomically, write_json
from pyro_bmr.isolation import isolated
from pyro_bmr.memory import check_memory
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.networks.plain_module import module_copy, plain_module
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.reduction.collapse import collapse, collapse_of
from pyro_bmr.shrinking.plan import shrink
from pyro_bmr.tracing import Values


@isolated()
@torch.no_grad()
def export(program: nn.Module, posterior: Posterior) -> nn.Module:
    """The plain network at the posterior's point: a copy of `program.net` whose lifted parameters
    are their posterior means, pruned ones exactly 0.

    A weight that is a scale times a standardised site is taken at the scale's median. No hooks, no
    Pyro: the copy can be deep-copied, pickled and trained on. It has the size of the original;
    `shrink` makes it smaller, `save` writes it to disk. Parameters that were not lifted are those
    of `program.net`, so pass `fit.program`.

    `program` may also be a plain module, for a posterior whose sites have the names of its
    parameters (`Posterior.from_curvature` and the like): a copy of it then, with the posterior's
    point in the place of those parameters, made plain (`plain_module`): what `torch.nn.utils.prune`
    has pruned in it is 0.

    Warns (`PyroBMRWarning`) of layers without a living unit.

    Raises:
        ModelError: the program is not a network, the posterior is not one of its own, or a value
            would not be finite.
    """
    if emptied := collapse(
        {name: site.alive for name, site in posterior.sites.items() if site.support == "real"}
    ):
        warn(emptied)
    if isinstance(program, nn.Module) and not isinstance(program, BayesianNetwork):
        net = _filled(program, posterior)
        if net is not None:
            check_network(net, "export")
            return net
    if not isinstance(program, BayesianNetwork):
        raise ModelError(
            f"export wants a BayesianNetwork, got {type(program).__name__}; for another program"
            " take its weights from posterior.point()"
        )
    missing = [name for name in program.priors if name not in posterior.sites]
    if missing:
        raise ModelError(
            f"the posterior has no site '{missing[0]}' of the network; its sites are:"
            f" {', '.join(posterior)}"
        )
    shapes = {name: p.shape for name, p in program.net.named_parameters()}
    for name in program.priors:
        if posterior[name].mean.shape != shapes[name]:
            raise ModelError(
                f"site '{name}' has shape {tuple(posterior[name].mean.shape)} in the posterior,"
                f" {tuple(shapes[name])} in the network; pass the program and the posterior of the"
                " same fit"
            )
    return _network(program, posterior.point(), "export")


@isolated()
@torch.no_grad()
def ensemble(
    program: BayesianNetwork,
    posterior: Posterior,
    *,
    draws: int = 8,
    seed: int = 0,
    example: Tensor | None = None,
) -> dict[str, Tensor]:
    """Name → (draws, ...), the state_dicts of exported networks whose weights are draws from the
    posterior: uncertainty that survives the export.

    With `example` (rows of the input) each draw is shrunk; pruned weights are 0 in every draw, so
    all have the shapes of the shrunk mean.

    Raises:
        ModelError: as `export`, a draw is not finite, draws shrink to different shapes, or are more
            than the memory that is free.
        ShrinkError: as `shrink`.
    """
    if not holds(lambda x: x >= 1, draws):
        raise ModelError(f"ensemble(draws={described(draws)}): at least 1 is wanted")
    numbers = [p for p in export(program, posterior).parameters()]  # with its checks
    size = sum(p.numel() * p.element_size() for p in numbers)
    check_memory(
        f"an ensemble of {draws} networks", 2 * draws * size, numbers[0].device, "take fewer draws"
    )
    generator = torch.Generator(
        device=next(iter(posterior.sites.values())).mean.device
    ).manual_seed(seed)
    nets = [_network(program, posterior.draw(generator), "ensemble") for _ in range(draws)]
    states = [(net if example is None else shrink(net, {}, example)).state_dict() for net in nets]
    shapes = [{name: t.shape for name, t in state.items()} for state in states]
    if any(other != shapes[0] for other in shapes):
        raise ModelError(
            "the draws shrink to different shapes, as a constant is 0 in some and folds only there;"
            " pass example=None, or prune the biases of dead units"
        )
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def _network(program: BayesianNetwork, values: dict[str, Tensor], what: str) -> nn.Module:
    with Values(values):
        weights = program.weights()
    net = module_copy(program.net).eval()
    _fill(net, weights)
    check_network(net, what)
    return net


def _filled(net: nn.Module, posterior: Posterior) -> nn.Module | None:
    """A plain copy of `net` at the posterior's point, whose sites have the names of its parameters
    or of those that it has when it is plain; else None.
    """
    point = posterior.point()
    if _names_parameters(net, posterior):
        net = module_copy(net)
        _fill(net, point)
        return plain_module(net).net.eval()
    plain, masks = plain_module(net)
    if not _names_parameters(plain, posterior):
        return None
    plain = module_copy(plain)
    _fill(
        plain,
        {name: value * masks[name] if name in masks else value for name, value in point.items()},
    )
    return plain.eval()


def _fill(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in net.named_parameters():
        parameter.grad = None
        if name in values:
            parameter.copy_(values[name])


def _names_parameters(net: nn.Module, posterior: Posterior) -> bool:
    shapes = {name: p.shape for name, p in net.named_parameters()}
    return all(
        name in shapes and site.mean.shape == shapes[name] for name, site in posterior.sites.items()
    )


@isolated()
@torch.no_grad()
def point_weights(program: Any, posterior: Posterior) -> dict[str, Tensor]:
    """Name → tensor at the posterior's point: the exported network's parameters and buffers, or any
    other program's weights and sites.

    A site that a prior declared is given as the weight it stands for (w, not the standardised w̄),
    without the hyper-parameters of that prior.
    """
    if isinstance(program, BayesianNetwork):
        return dict(export(program, posterior).state_dict())
    values, hyper = posterior.point(), set()
    for name, site in posterior.sites.items():
        if site.declared is not None:
            with Values(posterior.point()) as run:
                values[name] = site.declared.sample(name, tuple(site.mean.shape), site.mean)
            hyper |= run.latent.keys() - {name}
    return {name: value for name, value in values.items() if name not in hyper}


def save(
    weights: nn.Module | Mapping[str, Tensor],
    folder: str | Path,
    report: Mapping[str, Any] | None = None,
) -> None:
    """Writes `model.safetensors` (a state_dict) and `report.json` to `folder`, so that none is ever
    half there, nor one beside another of before.

    A module is saved as the plain one that it stands for (`plain_module`), so that the file loads
    where nothing is compiled, wrapped or pruned by hooks. `report` is kept as it is, beside the
    parameter names, shapes and numbers of non-zeros, and the SHA-256 of the file; to its `warnings`
    (`Reduction.warnings`) comes one of empty layers. Load with
    `net.load_state_dict(safetensors.torch.load_file(path))`.

    Raises:
        ModelError: a tensor is not finite or cannot be written, or the report is no JSON; nothing
            is written then.
        PyroBMRError: the folder cannot be written.
    """
    if not isinstance(weights, (nn.Module, Mapping)) or (
        isinstance(weights, Mapping) and not all(isinstance(t, Tensor) for t in weights.values())
    ):
        raise ModelError(
            "save: a network or a mapping from names to tensors is wanted, got"
            f" {type(weights).__name__}"
        )
    if isinstance(weights, nn.Module):
        plain = plain_module(weights).net
        tensors = dict(plain.state_dict())
        _check_tensors(tensors)
        check_network(plain, "save")
    else:
        tensors = dict(weights)
        _check_tensors(tensors)
        check_finite(tensors, "save")
    folder = Path(folder)
    about = {
        name: {
            "shape": list(t.shape),
            "dtype": str(t.dtype).removeprefix("torch."),
            "nonzero": int(t.count_nonzero()),
        }
        for name, t in tensors.items()
    }
    said = list(dict.fromkeys([*(report or {}).get("warnings", ()), *collapse_of(tensors)]))
    with replacing(folder, "report.json") as stage:
        # .clone(): tied parameters are stored once each, which safetensors wants
        write_atomically(
            stage / "model.safetensors",
            lambda path: save_file(
                {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, path
            ),
        )
        files = {name: {"sha256": sha256} for name, sha256 in digests(stage).items()}
        write_json(
            stage / "report.json",
            {
                "format": "pyro_bmr report 1",
                **(report or {}),
                "warnings": said,
                "files": files,
                "tensors": about,
            },
        )


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raises ModelError if safetensors has no place for one of them."""
    for name, tensor in tensors.items():
        if (
            nn.parameter.is_lazy(tensor)
            or tensor.is_meta
            or tensor.layout != torch.strided
            or tensor.is_quantized
            or tensor.dtype == torch.complex128
        ):
            kind = (
                "without a shape"
                if nn.parameter.is_lazy(tensor)
                else f"{tensor.dtype}, {tensor.layout}, on '{tensor.device}'"
            )
            raise ModelError(
                f"save: tensor '{name}' is {kind}; dense values of a dtype that safetensors knows"
                " are wanted, such as float32 or complex64"
            )
