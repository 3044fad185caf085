"""Several draws of a network at many rows, with the products of the inputs and the weights of all
draws as one product.

A layer that reads the inputs themselves multiplies the same rows by another matrix in each draw.
One product with the matrices side by side has the same sums, and is faster. Of antithetic draws,
which come in pairs (`weight_pairs.py`), nearly every second matrix is not needed. Owns
`SharedProducts` and `parameters_of_draws`. Next: `predict.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyro_bmr.data.inputs import Inputs, parts_of, pieces, rows_in
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.prediction.observed_site import ObservedSite, another_distribution
from pyro_bmr.prediction.predictive import Parameters
from pyro_bmr.prediction.weight_pairs import WeightPairs, weight_pairs
from pyro_bmr.tracing import Values

_DRAWS = 8  # an even number; with more, there is little to gain
_KEPT = 1 << 26  # bytes of the weights and the answers of the draws that are computed together
_MULTIPLE = 16  # of outputs; other products of matrices take 1.4 times as long
_LEAST_INPUTS = 64  # of an output; with fewer, a product costs less than a difference of two
_LEAST_ROWS = 256  # in a block; with fewer, the calls themselves take the time
_LEAST_WORK = 10_000_000  # rows times weights; with less, `torch.func.vmap` is faster
# the axis of the result that belongs to the rows of the weight
_PRODUCTS: dict[Any, int] = {F.linear: -1, torch.conv1d: 1, torch.conv2d: 1, torch.conv3d: 1}
_GROUPS = 6  # the place of this argument of a convolution

T = TypeVar("T")


class SharedProducts(TorchFunctionMode):
    """Computes a product of the inputs with a parameter for all `draws` (parameter → tensor, each)
    when the first of them asks. `current` is the number of the draw that runs.

    An argument is known to be the inputs by its place in memory: it is a view of a tensor of the
    block of rows (`of`), into which nothing was written since. Every other call is as it is
    without this mode.

    Args:
        fixed: tensors that are the same in every draw, such as biases that are point estimates.
        values: of the latent sites at each draw, which may be antithetic.
    """

    def __init__(
        self,
        draws: Sequence[Mapping[str, Tensor]],
        fixed: Sequence[Tensor],
        values: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        super().__init__()
        self.draws, self.values, self.current = draws, values, 0
        self.pairs: dict[str, WeightPairs | None] = {}
        self.names = {id(tensor): name for draw in draws for name, tensor in draw.items()}
        self.fixed = {id(tensor) for tensor in fixed}
        self.joined: dict[Any, Tensor] = {}
        self.versions: dict[int, int] = {}
        self.found: dict[Any, Sequence[Tensor]] = {}

    def of(self, block: Inputs) -> SharedProducts:
        """Begins with the rows of `block`, which must stay in memory until the next."""
        self.found = {}
        self.versions = {
            part.untyped_storage().data_ptr(): part._version for part in parts_of(block).values()
        }
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in _PRODUCTS or kwargs or not self._is_shared(*args):
            return func(*args, **(kwargs or {}))
        x, weight, *others = args
        place = x.data_ptr(), x.dtype, tuple(x.shape), x.stride()
        bias = others[0] if others else None
        of_bias = None if bias is None else self.names.get(id(bias), id(bias))
        key = func, place, self.names[id(weight)], of_bias, str(others[1:])
        if key not in self.found:
            self.found[key] = self._products(func, x, weight, bias, others[1:])
        # a copy, since the network may write into it and ask again
        return self.found[key][self.current].clone(memory_format=torch.contiguous_format)

    def _products(
        self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, others: Sequence[Any]
    ) -> Sequence[Tensor]:
        """What the call gives in each draw."""
        axis, biases = _PRODUCTS[func], self._each(bias)
        # differences of products of lower precision would lose more of it
        lower = torch.is_autocast_enabled(x.device.type)
        cheap = weight[0].numel() < _LEAST_INPUTS
        pairs = None if lower or cheap else self._pairs_of(weight)
        weights = self._each(weight) if pairs is None else pairs.weights
        assert weights is not None
        multiple = _MULTIPLE if func is F.linear else 1
        key = self.names[id(weight)], lower, multiple
        if key not in self.joined:
            self.joined[key] = _joined(weights, multiple)
        count, size = len(weights), len(weight)
        joined_bias = None if biases is None or pairs is not None else _joined(biases, multiple)
        products = func(x, self.joined[key], joined_bias, *others)
        each = products.narrow(axis, 0, count * size).chunk(count, axis)
        return each if pairs is None else pairs.both(each, biases, axis)

    def _pairs_of(self, weight: Tensor) -> WeightPairs | None:
        """The draws of a parameter as pairs, if they are antithetic."""
        name = self.names[id(weight)]
        if name not in self.pairs:
            sites = [draw[name] for draw in self.values if name in draw]
            weights = [draw[name] for draw in self.draws]
            self.pairs[name] = weight_pairs(weights, sites)
        return self.pairs[name]

    def _each(self, parameter: Tensor | None) -> Sequence[Tensor] | None:
        """A parameter in every draw."""
        name = None if parameter is None else self.names.get(id(parameter))
        if name is None:
            return None if parameter is None else [parameter] * len(self.draws)
        return [draw[name] for draw in self.draws]

    def _is_shared(self, *args: Any) -> bool:
        """Whether these are the inputs, a parameter of the draw, and no or a known bias."""
        if len(args) < 2 or id(args[1]) not in self.names or args[0].is_inference():
            return False
        if args[1].ndim < 2:
            return False
        x, bias, groups = args[0], args[2] if len(args) > 2 else None, args[_GROUPS:] or (1,)
        if groups[0] != 1 or not (bias is None or id(bias) in self.names.keys() | self.fixed):
            return False
        return bool(self.versions.get(x.untyped_storage().data_ptr()) == x._version)


def _joined(each: Sequence[Tensor], multiple: int) -> Tensor:
    """The rows of several tensors, one after the other, and zeros up to a multiple of so many
    rows.
    """
    if len(each) == 1:
        return each[0]
    rows = sum(map(len, each))
    return torch.cat([*each, each[0].new_zeros(-rows % multiple, *each[0].shape[1:])])


def parameters_of_draws(
    site: ObservedSite, values: Iterator[dict[str, Tensor]], alone: Parameters
) -> Iterator[Parameters]:
    """The parameters of the observed site of a `BayesianNetwork` at each of the draws `values`,
    with the rows first; `alone`: those of the draw before them, which may be one of a pair.
    """
    program = site.program
    assert isinstance(program, BayesianNetwork)
    parameters = dict(program.net.named_parameters())
    size = 2 * sum(t.numel() * t.element_size() for t in (*alone, *parameters.values()))
    count = max(min(_DRAWS, _KEPT // max(size, 1) // 2 * 2), 1)
    for group in _groups(values, count):
        weights = [_weights(program, draw) for draw in group]
        shared = SharedProducts(weights, list(parameters.values()), group)
        found: list[list[Parameters]] = [[] for _ in group]
        for block in pieces(site.x, max(site.batch_size // count, 1)):
            with shared.of(block):
                for k, draw in enumerate(group):
                    shared.current = k
                    part = site.parameters([site.reached(draw, block, weights[k])])
                    if part is None:
                        raise another_distribution(site.name)
                    found[k].append(part)
        for parts in found:
            yield tuple(torch.cat(tensors)[None] for tensors in zip(*parts, strict=True))


def _groups(values: Iterator[T], count: int) -> Iterator[list[T]]:
    """The first of `values`, whose pair began before them, and then `count` at a time."""
    for size in chain((1,), repeat(count)):
        group = list(islice(values, size))
        if not group:
            return
        yield group


def shares_products(site: ObservedSite) -> bool:
    """Whether `parameters_of_draws` can be asked, and pays."""
    program, rows = site.program, rows_in(site.x)
    if not isinstance(program, BayesianNetwork) or site.writes:
        return False
    work = rows * sum(p.numel() for p in program.net.parameters())
    return min(rows, site.batch_size // _DRAWS) >= _LEAST_ROWS and work >= _LEAST_WORK


def _weights(program: BayesianNetwork, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter → its weight at the values of the latent sites."""
    with Values(values):
        return program.weights()
