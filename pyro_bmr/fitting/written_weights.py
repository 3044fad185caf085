"""The weights of a network from the draws of its sites, and the way back from the gradient of the
weights to that of the draws, written out for the priors that have a form.

Owns `WrittenWeight`, one parameter. Next: `layer_scales.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_bmr.fitting.live_network import Cut
from pyro_bmr.fitting.sums import dot
from pyro_bmr.fitting.unread_terms import Number, number_of
from pyro_bmr.priors.tiers import spread, tier_shape
from pyro_bmr.priors.weight_form import ScaleSite, WeightForm


class WrittenWeight:
    r"""One parameter w = γ w̄, with the scale γ of its form.

    With h = w ∂L/∂w, summed over the weights that share a γ, and κ = ∂log g/∂log ψ = 1 − g²/c²
    (1 without a slab),

    .. math:: \frac{\partial L}{\partial \bar w} = \gamma \frac{\partial L}{\partial w}, \qquad
        \frac{\partial L}{\partial \log x_t} = p_t \sum \kappa h, \qquad
        \frac{\partial L}{\partial \log c} = \sum (1 - \kappa) h, \qquad
        \frac{\partial L}{\partial \operatorname{logit} z} = \sum (1 - z) h

    Args:
        form: of the prior.
        name: of the parameter, and of the site w̄.
        draws: site → its draw on the unconstrained line, flat, of kept entries; views.
        leaf: the draw of w̄ in the shape of the parameter, 0 where it is pruned.
        kept: the indices of the kept entries of w̄ in the leaf, or its size for an entry that it
            does not have; None for all.
        point: whether the density is that of the constrained values, without Jacobians. The draw
            of w̄ then stays; else w may take its place.
        cut: the entries that the leaf has, if it is that of a smaller network.
    """

    def __init__(
        self,
        form: WeightForm,
        name: str,
        draws: Mapping[str, Tensor],
        leaf: Tensor,
        kept: Tensor | None = None,
        point: bool = False,
        cut: Cut | None = None,
    ) -> None:
        shape = tuple(leaf.shape) if cut is None else cut.shape
        self.form, self.name, self.kept, self.point, self.cut = form, name, kept, point, cut
        self.beyond: Tensor | None = None
        if cut is not None and kept is not None and bool((kept == leaf.numel()).any()):
            self.beyond = kept == leaf.numel()
            self.near = kept.masked_fill(self.beyond, 0)
        self.standardised, self.flat = leaf.detach(), draws[name]
        self.draws = {
            s.name: draws[s.name].view(tier_shape(shape, s.tier, s.block)) for s in form.scale_sites
        }
        self.shapes = {s.name: _over_weights(shape, s) for s in form.factors}
        self.shape = torch.broadcast_shapes((), *self.shapes.values())
        in_place = not form.factors or not (point or (form.density is not None and kept is None))
        self.leaf = leaf if in_place else torch.empty_like(leaf, requires_grad=True)
        self.scale = self.bare = self.weight = self.leaf.detach()
        self.indicators = [s for s in form.factors if s.unit_interval]
        powers = (s for s in form.factors if not s.unit_interval)
        self.powers = sorted(powers, key=lambda s: self.draws[s.name].numel())
        # the scale is found from log(uψ), or with a slab from −2 log(uψ), as the slab has it
        self.times = 1.0 if form.slab is None else -2.0
        self.start = self.weight.new_tensor(self.times * math.log(form.unit * form.inner))
        # the densities, with the draws of the site and of the one that it depends on; the sites on
        # which others depend come last
        densities = {name: form.density, **{s.name: s.density for s in form.scale_sites}}
        self.densities = [
            (site, d, self.draws.get(site, self.flat), self.draws.get(d.parent or ""))
            for site, d in densities.items()
            if d is not None
        ]
        self.passive = not form.factors and form.density is None

    @property
    def sites(self) -> list[str]:
        """The sites of the parameter."""
        return [self.name, *self.draws]

    @property
    def has_one_scale(self) -> bool:
        """Whether one number, a power of a positive site, is all that the form has beside w̄."""
        return (
            not self.point
            and not self.shape
            and len(self.powers) == 1
            and len(self.draws) == 1
            and self.form.slab is None
            and self.form.density is None
        )

    def weigh(self) -> None:
        """Evaluates the parameter at the draws."""
        if self.form.factors:
            scale = self._scale()
            self.weigh_by(scale if self.cut is None else self.cut.taken(scale))

    def weigh_by(self, scale: Tensor) -> None:
        """Has w = γ w̄, γ being the `scale`."""
        self.scale = scale
        torch.mul(self.standardised, scale, out=self.weight)

    def _scale(self) -> Tensor:
        """γ, in the shape that the factors have together."""
        form, log = self.form, self.start
        for s in self.powers:
            u = spread(self.draws[s.name], s.tier, s.block)
            log = torch.add(log, u, alpha=self.times * s.power)
        self.bare = scale = log.exp()
        if form.slab is not None:  # 1/√((uψ)⁻² + (uc)⁻²)
            scale.add_(self._slab()).rsqrt_()
        for s in self.indicators:
            scale = scale * spread(self.draws[s.name].sigmoid(), s.tier, s.block)
        return scale

    def _slab(self) -> float | Tensor:
        """(uc)⁻²."""
        slab, unit = self.form.slab, self.form.unit
        if isinstance(slab, ScaleSite):
            return torch.mul(self.draws[slab.name], -2 * slab.power).exp_().div_(unit**2)
        assert slab is not None
        return (unit * slab) ** -2

    def gradients(self, factor: float) -> dict[str, Tensor]:
        """Site → the gradient of L − `factor` · log p of the sites whose density is written out,
        flat; L has been differentiated down to the weights.
        """
        g = self._gradient()
        found = self._of_scales(g) if self.form.factors else {}
        found[self.name] = self._of_standardised(g)
        for site, density, u, parent in self.densities:
            if site not in found:
                found[site] = torch.zeros_like(u)
            up = density.pull(u, parent, found[site], -factor)
            if up is not None and density.parent is not None:
                found[density.parent] = up.mul_(-factor)
        if self.point:
            self._drop_jacobians(found, factor)
        return {site: each.reshape(-1) for site, each in found.items()}

    def gradient_and_product(self) -> tuple[Tensor, Tensor]:
        """∂L/∂w̄, flat, and Σ w ∂L/∂w, where γ is one number without a density here."""
        g = self._gradient()
        product = dot(g, self.weight)
        return self._of_standardised(g), product

    def _gradient(self) -> Tensor:
        """∂L/∂w, which it takes from the leaf."""
        g, self.leaf.grad = self.leaf.grad, None
        return torch.zeros_like(self.weight) if g is None else g

    def _of_standardised(self, g: Tensor) -> Tensor:
        """The gradient of the kept entries of w̄; 0 for those that the leaf does not have. It takes
        the place of `g` = ∂L/∂w.
        """
        g = (g.mul_(self.scale) if self.form.factors else g).reshape(-1)
        if self.kept is None:
            return g
        if self.beyond is None:
            return g.index_select(0, self.kept)
        if not len(g):
            return torch.zeros_like(self.flat)
        return g.index_select(0, self.near).masked_fill_(self.beyond, 0)

    def _of_scales(self, g: Tensor) -> dict[str, Tensor]:
        """Site → the gradient of L, of the factors and the slab; `g` is ∂L/∂w."""
        slab, found = self.form.slab, dict[str, Tensor]()
        # h, in the shape of γ
        if not self.shape:
            h = dot(g, self.weight)
        elif self.cut is None:
            h = (g * self.weight).sum_to_size(self.shape)
        else:
            h = (g * self.weight).sum_to_size(self.cut.summed_shape(self.shape))
            h = self.cut.grown(h, self.shape)
        for s in self.indicators:
            each = self._summed(h, s)
            found[s.name] = each - each * self.draws[s.name].sigmoid()
        if isinstance(slab, ScaleSite):
            bound = (h * self.bare).mul_(self.bare).mul_(self._slab())  # (1 − κ) h
            found[slab.name] = bound.sum() * slab.power
            h = h.sub_(bound)
        elif slab is not None:
            h = h.addcmul_(h * self.bare, self.bare, value=-float(self._slab()))
        for s in self.powers:
            each = self._summed(h, s)
            found[s.name] = each if s.power == 1 and s is self.powers[-1] else each * s.power
        return found

    def _summed(self, h: Tensor, s: ScaleSite) -> Tensor:
        """The entries of `h` summed over those that share a scale of `s`."""
        shape = self.draws[s.name].shape
        if not shape:
            return h.sum() if self.shape else h
        each = h.sum_to_size(self.shapes[s.name])
        if s.block > 1:
            axis = 0 if s.tier == "unit" else 1
            each = each.unflatten(axis, (-1, s.block)).sum(axis + 1)
        return each

    def log_p(self) -> Number:
        """log p of the sites whose density is written out, nats."""
        total: Number = 0.0
        for _, density, u, parent in self.densities:
            total += number_of(density.log_p(u, parent))
        if self.point:
            for s in self.form.scale_sites:
                u = self.draws[s.name]
                log = -logsigmoid(u) - logsigmoid(-u) if s.unit_interval else -u
                total += number_of(log.sum())
        return total

    def _drop_jacobians(self, found: dict[str, Tensor], factor: float) -> None:
        """Leaves the Jacobians out of the densities whose gradients are in `found`."""
        for s in self.form.scale_sites:
            found[s.name].add_(factor)
            if s.unit_interval:
                found[s.name].sub_(self.draws[s.name].sigmoid(), alpha=2 * factor)


def _over_weights(shape: tuple[int, ...], s: ScaleSite) -> tuple[int, ...]:
    """The shape of the scales of a site once they are spread over the weights."""
    rows = tier_shape(shape, s.tier, s.block)
    axis = {"unit": 0, "input": 1}.get(s.tier)
    return tuple(n * s.block if k == axis else n for k, n in enumerate(rows))
