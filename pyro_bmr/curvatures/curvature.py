r"""`curvature`: the curvature of the loss of a trained network, from one pass over data.

Owns `curvature`. `Posterior.from_curvature` makes a posterior of it. Next: `posteriors/site.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_bmr.checks import check_arguments, is_whole
from pyro_bmr.curvatures.factors import Curvature
from pyro_bmr.curvatures.network_batches import batches, evaluation, own_rows
from pyro_bmr.curvatures.passes import Pass
from pyro_bmr.curvatures.ranks import Ranks
from pyro_bmr.curvatures.scores import FISHERS, Loss
from pyro_bmr.data.inputs import rows_in
from pyro_bmr.errors import ModelError
from pyro_bmr.isolation import isolated, seed_generators, seed_of
from pyro_bmr.likelihoods.likelihood import Likelihood
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
    groups, `nn.MultiheadAttention`, `nn.Embedding`, recurrent layers and cells, which are run step
    by step, and products in the code of a `forward`. Parameters that are used in another way, such
    as those of norm layers, `nn.Bilinear` and parametrizations, have the exact diagonal, and
    `Curvature.table` says why.

    In a process group of torch.distributed, every process calls it with the same arguments, runs
    its part of the rows, and gets the curvature of all of them.

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
    wanted = wanted_parameters(net, only)
    if structure == "kronecker":
        check_factors(wanted)
    given = {name: torch.as_tensor(value) for name, value in (values or {}).items()}
    run = Pass(net, Loss(likelihood, given), fisher, draws, wanted, structure == "kronecker")
    ranks = Ranks.of_group(next(iter(wanted.values())).device)
    seed_generators(seed_of(seed, ranks.rank))
    rows, shown = 0, progress and ranks.rank == 0
    with evaluation(net), tqdm(disable=not shown, unit="row", desc="curvature") as bar:
        every = batches(net, data, fisher == "empirical", batch_size, size)
        for count, x, y in own_rows(every, ranks, seed, "curvature"):
            rows += count
            bar.update(count)
            if rows_in(x):
                run.add(x, y)
    run.sum_over(ranks)
    return run.result(rows, rows if size is None else size)


def wanted_parameters(net: nn.Module, only: Collection[str] | None) -> dict[str, nn.Parameter]:
    """Name → parameter, of those that the patterns name."""
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


def check_factors(wanted: Mapping[str, nn.Parameter]) -> None:
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
    check_likelihood(likelihood, values)


def check_likelihood(likelihood: Any, values: Mapping[str, Any] | None) -> None:
    """Raises ModelError if a site of the likelihood has no value."""
    inferred = getattr(likelihood, "inferred", ())
    if missing := [name for name in inferred if name not in (values or {})]:
        raise ModelError(
            f"likelihood: {type(likelihood).__name__} infers {', '.join(map(repr, missing))}, and a"
            f" trained network has no value for it; give values={{'{missing[0]}': ...}}, or a"
            " number in the likelihood, such as Normal(noise=0.3)"
        )
