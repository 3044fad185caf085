"""The scales of parameters that have one number each and no other site, all evaluated at once: a
network has many of them, and an operation on one number costs as much as on hundreds.

Owns `LayerScales` and `layer_scales`. Next: `network_weights.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.fitting.unread_terms import Number, number_of
from pyro_bmr.fitting.written_weights import WrittenWeight


class LayerScales:
    r"""Parameters w = γ w̄ whose only scale is γ = uψ₀ xᵖ, one number, with the same p and the same
    density of log x for all of them.

    .. math:: \frac{\partial L}{\partial \bar w} = \gamma \frac{\partial L}{\partial w}, \qquad
        \frac{\partial L}{\partial \log x} = p \sum w \frac{\partial L}{\partial w}
    """

    def __init__(self, weights: list[WrittenWeight]) -> None:
        self.weights = weights
        sites = [w.form.factors[0] for w in weights]
        self.names = [s.name for s in sites]
        self.power, self.density = sites[0].power, sites[0].density
        self.each = [w.draws[name].view(1) for w, name in zip(weights, self.names, strict=True)]
        self.start = torch.stack([w.start for w in weights])
        self.logs = torch.empty_like(self.start)

    def weigh(self) -> None:
        """Evaluates the parameters at the draws."""
        torch.cat(self.each, out=self.logs)
        scales = torch.add(self.start, self.logs, alpha=self.power).exp_()
        for weight, scale in zip(self.weights, scales.unbind(), strict=True):
            weight.weigh_by(scale)

    def log_p(self) -> Number:
        """log p of the scales, nats."""
        return number_of(self.density.log_p(self.logs, None))

    def gradients(self, factor: float) -> dict[str, Tensor]:
        """Site → the gradient of L − `factor` · log p of the scales, flat; L has been
        differentiated down to the parameters.
        """
        found, products = {}, []
        for weight in self.weights:
            found[weight.name], product = weight.gradient_and_product()
            products.append(product)
        g = torch.stack(products).mul_(self.power)
        self.density.pull(self.logs, None, g, -factor)
        return found | dict(zip(self.names, g.split(1), strict=True))


def layer_scales(
    weights: Iterable[WrittenWeight],
) -> tuple[list[LayerScales], list[WrittenWeight]]:
    """The parameters that can be evaluated together, in as few groups as there are, and the
    others.
    """
    groups, others = defaultdict[Any, list[WrittenWeight]](list), []
    for weight in weights:
        if weight.has_one_scale:
            site = weight.form.factors[0]
            groups[site.power, site.density].append(weight)
        else:
            others.append(weight)
    return [LayerScales(group) for group in groups.values()], others
