"""From a posterior to a plain network with exact zeros.

Owns `export` (an `nn.Module`), `ensemble` (draws of it) and `point_weights` (tensors of any
program). Next: `weights_file.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmr.errors import ModelError, described, holds, warn
from pyro_bmr.exporting.finite import check_network
from pyro_bmr.isolation import isolated
from pyro_bmr.memory import check_memory
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.networks.plain_module import module_copy, plain_module
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.weights import declared_weights
from pyro_bmr.reduction.collapse import collapse
from pyro_bmr.shrinking.plan import shrink_each
from pyro_bmr.tracing import Values


@isolated()
@torch.no_grad()
def export(program: nn.Module, posterior: Posterior) -> nn.Module:
    """The plain network at the posterior's point: a copy of `program.net` whose lifted parameters
    are their posterior means, pruned ones exactly 0.

    A weight that is a scale times a standardised site is taken at the scale's median. The copy has
    no hooks and needs no Pyro; it can be copied, pickled and trained. It has the original's size:
    `shrink` makes it smaller, `save` in `weights_file.py` writes it to disk. Parameters that were
    not lifted are those of `program.net`, so pass `fit.program`.

    `program` may also be a plain module, for a posterior whose sites have the names of its
    parameters (`Posterior.from_curvature` and the like). The result is then a plain copy
    (`plain_module`) with the posterior's point in place of those parameters. What
    `torch.nn.utils.prune` has pruned in it is 0.

    Warns (`PyroBMRWarning`) of layers with all units pruned.

    Raises:
        ModelError: the program is not a network, the posterior is of another program, or a value
            would not be finite.
    """
    _warn_of_empty_layers(posterior)
    if isinstance(program, nn.Module) and not isinstance(program, BayesianNetwork):
        net = _filled(program, posterior)
        if net is not None:
            check_network(net, "export")
            return net
    if not isinstance(program, BayesianNetwork):
        raise ModelError(
            f"export: expected a BayesianNetwork, got {type(program).__name__}; for another program"
            " take its weights from posterior.point()"
        )
    _check_sites(program, posterior)
    return _network(program, posterior.point(), "export")


def _warn_of_empty_layers(posterior: Posterior) -> None:
    masks = {name: site.kept for name, site in posterior.sites.items() if site.support == "real"}
    if emptied := collapse(masks):
        warn(emptied)


def _check_sites(program: BayesianNetwork, posterior: Posterior) -> None:
    """Checks that the posterior has a site of the right shape for each lifted parameter."""
    missing = [name for name in program.priors if name not in posterior.sites]
    if missing:
        raise ModelError(
            f"the posterior has no site '{missing[0]}' of the network; its sites are:"
            f" {', '.join(posterior)}"
        )
    shapes = {name: tuple(p.shape) for name, p in program.net.named_parameters()}
    for name in program.priors:
        shape = tuple(posterior[name].mean.shape)
        if shape != shapes[name]:
            raise ModelError(
                f"site '{name}': expected the shape {shapes[name]} of the network, got {shape} in"
                " the posterior; pass the program and the posterior of the same fit"
            )


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
    """Name → (draws, ...): stacked state_dicts of networks with draws of the posterior for weights.

    They keep the uncertainty of the posterior where there is no Pyro. They come in antithetic
    pairs (`Posterior.draws`): the first and the second, the third and the fourth, and so on. With
    `example` (rows of the input) each draw is shrunk; pruned weights are 0 in every draw, so all
    draws have the shapes of the shrunk mean.

    Raises:
        ModelError: as `export`; a draw is not finite; draws shrink to different shapes; or the free
            memory is too small for the draws.
        ShrinkError: as `shrink`.
    """
    if not holds(lambda x: x >= 1, draws):
        raise ModelError(f"ensemble: expected draws of at least 1, got draws={described(draws)}")
    numbers = list(export(program, posterior).parameters())  # with the checks of export
    size = 2 * draws * sum(p.numel() * p.element_size() for p in numbers)
    check_memory(f"an ensemble of {draws} networks", size, numbers[0].device, "take fewer draws")
    device = next(iter(posterior.sites.values())).mean.device
    generator = torch.Generator(device=device).manual_seed(seed)
    nets = [_network(program, v, "ensemble") for v in posterior.draws(draws, generator)]
    nets = nets if example is None else shrink_each(nets, example)
    states = [net.state_dict() for net in nets]
    shapes = [{name: t.shape for name, t in state.items()} for state in states]
    if any(other != shapes[0] for other in shapes):
        raise ModelError(
            "the draws shrink to different shapes: a constant that is 0 in some draws is folded"
            " only there; pass example=None, or prune the biases of pruned units"
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
    """A plain copy of `net` at the posterior's point.

    None if the sites do not have the names of its parameters, nor those of its plain form.
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
    _fill(plain, {name: x * masks[name] if name in masks else x for name, x in point.items()})
    return plain.eval()


def _fill(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in net.named_parameters():
        parameter.grad = None
        if name in values:
            parameter.copy_(values[name])


def _names_parameters(net: nn.Module, posterior: Posterior) -> bool:
    shapes = {name: p.shape for name, p in net.named_parameters()}
    return all(shapes.get(name) == site.mean.shape for name, site in posterior.sites.items())


@isolated()
@torch.no_grad()
def point_weights(program: Any, posterior: Posterior) -> dict[str, Tensor]:
    """Name → tensor at the posterior's point.

    For a network these are the parameters and buffers of the exported one, for any other program
    its weights and sites. A site that a prior declared is returned as its weight (w, not the
    standardised w̄), without the hyper-parameters of that prior.
    """
    if isinstance(program, BayesianNetwork):
        return dict(export(program, posterior).state_dict())
    return declared_weights(posterior.sites, posterior.point())
