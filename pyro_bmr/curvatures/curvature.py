r"""`curvature`: the curvature of the loss of a trained network, from one pass over data.

Owns `curvature`. `Posterior.from_curvature` makes a posterior of it. Next: `posteriors/site.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_bmr.checks import check_arguments, is_whole
from pyro_bmr.curvatures.factors import Curvature, LayerCurvature
from pyro_bmr.curvatures.network_batches import batches, evaluation, output_of
from pyro_bmr.curvatures.recorder import Recorder
from pyro_bmr.curvatures.row_squares import row_squares
from pyro_bmr.curvatures.scores import FISHERS, Loss, output_gradients
from pyro_bmr.data.inputs import Inputs, called, rows_in
from pyro_bmr.errors import ModelError
from pyro_bmr.isolation import isolated, seed_generators
from pyro_bmr.likelihoods.likelihood import Likelihood, read_inputs
from pyro_bmr.memory import check_memory
from pyro_bmr.networks.lifting import check_network

Fisher = Literal["true", "empirical", "gauss-newton"]
Structure = Literal["kronecker", "diagonal"]


@isolated()
def curvature(
    net: nn.Module,
    data: Any,
    likelihood: Likelihood,
    structure: Structure = "kronecker",
    *,
    fisher: Fisher = "true",
    draws: int = 1,
    only: Collection[str] | None = None,
    values: Mapping[str, float | Tensor] | None = None,
    size: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Curvature:
    r"""The curvature of −log p(data | parameters) of a trained network, from one pass over `data`.

    .. math:: H_\text{layer} \approx G \otimes A, \qquad G = \sum_{\text{rows, positions}} g g^T,
        \qquad A = \operatorname{mean}_{\text{rows, positions}} a a^T

    a is the input of a layer, with a 1 for its bias, and g the gradient at its output. Positions
    where g is 0 count in neither, since the loss does not depend on them. A weight that is used
    several times has the sums over its uses. Sources: Martens & Grosse 2015; Grosse & Martens 2016
    for convolutions; Eschenhagen et al. 2023 for shared weights ("expand").

    Every call of a torch function with a parameter is seen: those of `nn.Linear`, convolutions with
    groups, `nn.MultiheadAttention`, `nn.Embedding`, and products in the code of a `forward`.
    Parameters that are used in another way, such as those of norm layers, recurrent layers and
    parametrizations, have the exact diagonal, and `Curvature.table` says why.

    Args:
        net: any module; it runs in evaluation mode and is not changed.
        data: what `fit` takes. With ``fisher="true"`` inputs alone are enough.
        likelihood: what `BayesianNetwork` takes. Its own latent sites need `values`.
        structure: "kronecker", or "diagonal" for the exact diagonal of every parameter.
        fisher: "true": targets are drawn from the network. "empirical": those of the data.
            "gauss-newton": the Hessian of the likelihood, exactly, at as many backward passes a
            batch as a row has outputs.
        draws: of the targets of each row, for "true".
        only: patterns of the names of parameters; by default all that require a gradient, or all
            if none does.
        values: of the likelihood's own sites, such as ``{"noise": 0.3}``.
        size: N, if it is not the number of rows of `data`: sums are scaled to it.
        batch_size: rows of a forward pass.
        seed: of the drawn targets.

    Raises:
        ModelError: a pattern matches nothing, a site of the likelihood has no value, the factors
            need more memory than there is, or the curvature is not finite.
        DataError: there are no targets where they are needed, or the data are malformed.

    Example:
        >>> found = curvature(net, loader, Categorical())
        >>> weights = {name: p for name, p in net.named_parameters() if name in found}
        >>> Posterior.from_curvature(weights, found, Gaussian(0.1), rows=found.rows)
    """
    _check(net, likelihood, structure, fisher, draws, batch_size, values)
    wanted = _wanted(net, only)
    if structure == "kronecker":
        _check_factors(wanted)
    given = {name: torch.as_tensor(value) for name, value in (values or {}).items()}
    run = _Pass(net, Loss(likelihood, given), fisher, draws, wanted, structure == "kronecker")
    seed_generators(seed)
    rows = 0
    with evaluation(net), tqdm(disable=not progress, unit="row", desc="curvature") as bar:
        for x, y in batches(net, data, fisher == "empirical", batch_size):
            run.add(x, y)
            rows += rows_in(x)
            bar.update(rows_in(x))
    return run.result(rows, rows if size is None else size)


@dataclass
class _Pass:
    """One pass over the data: what it has summed so far."""

    net: nn.Module
    loss: Loss
    fisher: str
    draws: int
    wanted: Mapping[str, nn.Parameter]
    kronecker: bool

    def __post_init__(self) -> None:
        anchor = next(iter(self.wanted.values())).detach().new_zeros((), requires_grad=True)
        names = {id(parameter): name for name, parameter in self.wanted.items()}
        self.recorder = Recorder(names if self.kronecker else {}, anchor)
        self.squares: dict[str, Tensor] = {}

    def add(self, x: Inputs, y: Tensor | None) -> None:
        """Adds a batch."""
        inputs, read = read_inputs(self.loss.likelihood, x)
        with self.recorder.watching():
            output = output_of(called(self.net, inputs))
        others = {name: p for name, p in self.wanted.items() if name not in self._in_layers()}
        for g in output_gradients(self.loss, self.fisher, self.draws, output, y, read):
            if self.recorder.factors and output.requires_grad:
                torch.autograd.grad(
                    output, self.recorder.anchor, g, retain_graph=True, allow_unused=True
                )
                self.recorder.counting = False
            if others:
                for name, square in row_squares(self.net, others, inputs, g, output_of).items():
                    self.squares[name] = self.squares.get(name, 0) + square

    def _in_layers(self) -> set[str]:
        """The parameters that have Kronecker factors."""
        others, factors = self.recorder.others, self.recorder.factors
        weights = {name for name in factors if name not in others}
        biases = {factors[name].bias for name in weights}
        return weights | {name for name in biases if name is not None and name not in others}

    def result(self, seen: int, rows: int) -> Curvature:
        """The curvature of `rows` rows from those that were `seen`.

        Raises:
            ModelError: a number of it is not finite.
        """
        inside, scale = self._in_layers(), rows / seen
        layers = {
            name: LayerCurvature(
                name,
                f.bias if f.bias in inside else None,
                f.outputs * scale,
                _without_bias(f.inputs, f.bias is not None and f.bias not in inside)
                / max(f.count, 1),
                tuple(self.wanted[name].shape),
                f.turned,
                f.uses,
            )
            for name, f in self.recorder.factors.items()
            if name in inside
        }
        diagonals = {name: square * scale for name, square in self.squares.items()}
        why = {name: self.recorder.others.get(name, "diagonal asked for") for name in diagonals}
        if self.kronecker:
            why |= {
                name: "not seen in the forward pass"
                for name in diagonals
                if name not in self.recorder.others
            }
        found = Curvature(layers, diagonals, why, rows)
        _check_finite(found)
        return found


def _without_bias(inputs: Tensor, left_out: bool) -> Tensor:
    return inputs[:-1, :-1] if left_out else inputs


def _wanted(net: nn.Module, only: Collection[str] | None) -> dict[str, nn.Parameter]:
    parameters = {name: p for name, p in net.named_parameters() if p.is_floating_point()}
    if not parameters:
        raise ModelError(f"net: expected a module with parameters, got {type(net).__name__}")
    if only is None:
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        return trained or parameters
    patterns = [only] if isinstance(only, str) else list(only)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise ModelError(
                f"only: '{pattern}' matches no parameter; the parameters are:"
                f" {', '.join(parameters)}"
            )
    return {
        name: p
        for name, p in parameters.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _check_factors(wanted: Mapping[str, nn.Parameter]) -> None:
    """Raises ModelError if the factors of all matrices need more memory than there is."""
    sides = [
        side
        for parameter in wanted.values()
        if parameter.ndim > 1
        for side in (len(parameter), parameter[0].numel() + 1)
    ]
    like = next(iter(wanted.values()))
    width = torch.promote_types(like.dtype, torch.float32).itemsize
    check_memory(
        "the Kronecker factors of the network",
        width * sum(side * side for side in sides),
        like.device,
        "leave wide layers out with only=[...], or take structure='diagonal'",
    )


def _check(
    net: Any,
    likelihood: Any,
    structure: Any,
    fisher: Any,
    draws: Any,
    batch_size: Any,
    values: Mapping[str, Any] | None,
) -> None:
    check = check_arguments
    check("curvature", isinstance(net, nn.Module), "a torch.nn.Module", net=net)
    check_network(net)
    ok = not isinstance(likelihood, type) and hasattr(likelihood, "observe")
    check("curvature", ok, "Categorical() or anything with its observe", likelihood=likelihood)
    known = structure in ("kronecker", "diagonal")
    check("curvature", known, "'kronecker' or 'diagonal'", structure=structure)
    check("curvature", fisher in FISHERS, " or ".join(map(repr, FISHERS)), fisher=fisher)
    check("curvature", is_whole(draws, 1), "a whole number > 0", draws=draws)
    check("curvature", is_whole(batch_size, 1), "a whole number > 0", batch_size=batch_size)
    inferred = getattr(likelihood, "inferred", ())
    if missing := [name for name in inferred if name not in (values or {})]:
        raise ModelError(
            f"likelihood: {type(likelihood).__name__} infers {', '.join(map(repr, missing))}, and a"
            f" trained network has no value for it; give values={{'{missing[0]}': ...}}, or a"
            " number in the likelihood, such as Normal(noise=0.3)"
        )


def _check_finite(found: Curvature) -> None:
    for name, layer in found.layers.items():
        if not bool(layer.outputs.isfinite().all() & layer.inputs.isfinite().all()):
            raise _infinite(name)
    for name, diagonal in found.diagonals.items():
        if not bool(diagonal.isfinite().all()):
            raise _infinite(name)


def _infinite(name: str) -> ModelError:
    return ModelError(
        f"'{name}': its curvature is not finite; the data or the outputs of the network have NaN or"
        " infinite values"
    )
