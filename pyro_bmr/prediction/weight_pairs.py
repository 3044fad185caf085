"""Draws of a weight in antithetic pairs, and their products with the same inputs.

Owns `WeightPairs` and `weight_pairs`. Next: `shared_products.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TOLERANCE = 16  # units of rounding of the largest entry
_MOST = 64  # times as large as a draw may be what it is the difference of


@dataclass(frozen=True)
class WeightPairs:
    r"""Pairs of draws of a weight, w₁ = γ₁ (c + d) and w₂ = γ₂ (c − d).

    All pairs have the same c, and γ is a number, or one for each output. So for inputs x

    .. math:: x w_2^\top = 2 \gamma_2\, x c^\top - \frac{\gamma_2}{\gamma_1}\, x w_1^\top

    `weights`: c and the first of each pair. `twice` and `ratios`: 2γ₂ and γ₂/γ₁ of each pair.
    """

    weights: Sequence[Tensor]
    twice: Sequence[Tensor]
    ratios: Sequence[Tensor]

    def both(
        self, products: Sequence[Tensor], biases: Sequence[Tensor] | None, axis: int
    ) -> list[Tensor]:
        """The products with every draw, plus its bias, from those with the `weights`.

        `axis`: that of the outputs.
        """
        centre, *firsts = products
        found: list[Tensor] = []
        for k, (first, twice, ratio) in enumerate(
            zip(firsts, self.twice, self.ratios, strict=True)
        ):
            second = torch.mul(centre, _along(twice, centre, axis))
            second.addcmul_(first, _along(ratio, centre, axis), value=-1)
            if biases is not None:
                first = first + _along(biases[2 * k], centre, axis)
                second.add_(_along(biases[2 * k + 1], centre, axis))
            found += [first, second]
        return found


def weight_pairs(weights: Sequence[Tensor], sites: Sequence[Tensor]) -> WeightPairs | None:
    """The `weights` of several draws as pairs, `sites` being the draws of the site of the weight, w̄
    where w = γ w̄; None if they are no antithetic pairs up to rounding, or γ is not the same for all
    entries of an output.
    """
    if len(weights) < 2 or len(weights) % 2 or len(sites) != len(weights):
        return None
    if any(w.shape != site.shape or w.is_complex() for w, site in zip(weights, sites, strict=True)):
        return None
    centre = (sites[0] + sites[1]) / 2
    for first, second in zip(sites[2::2], sites[3::2], strict=True):
        if not _equal(centre, (first + second) / 2, first):
            return None
    scales = [_scale(w, site) for w, site in zip(weights, sites, strict=True)]
    twice, ratios = list[Tensor](), list[Tensor]()
    for one, other, first, second in zip(
        scales[::2], scales[1::2], weights[::2], weights[1::2], strict=True
    ):
        if one is None or other is None or not bool((one != 0).all()):
            return None
        double, ratio = 2 * other, other / one
        terms = _largest(centre) * double.abs() + _largest(first) * ratio.abs()
        if not bool((terms <= _MOST * _largest(second)).all()):
            return None
        twice.append(double)
        ratios.append(ratio)
    return WeightPairs([centre, *weights[::2]], twice, ratios)


def _scale(weight: Tensor, site: Tensor) -> Tensor | None:
    """γ of each output, where w = γ w̄; None if there is none."""
    if weight is site or torch.equal(weight, site):
        return weight.new_ones(1)
    w, bare = weight.flatten(1), site.flatten(1)
    largest = bare.abs().argmax(1, keepdim=True)
    scale = w.gather(1, largest) / bare.gather(1, largest)
    scale = scale.where(bare.gather(1, largest) != 0, 1.0)
    return scale[:, 0] if _equal(w, scale * bare, w) else None


def _largest(weight: Tensor) -> Tensor:
    """The largest size of an entry of each output."""
    return weight.abs().flatten(1).amax(1)


def _equal(one: Tensor, other: Tensor, like: Tensor) -> bool:
    """Whether two tensors are equal up to rounding of numbers as large as those of `like`."""
    bound = _TOLERANCE * torch.finfo(one.dtype).eps * like.abs().amax()
    return bool((one - other).abs().amax() <= bound)


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """`values`, one for each place of an axis of `like`, so that they broadcast against it."""
    return values.view(-1, *[1] * (like.ndim - 1 - axis % like.ndim))
