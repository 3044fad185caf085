"""All parameters of a network that are written out, at the draws of a `MeanField` fit: in the
network itself, or in the one that pruning has left of it.

Owns `NetworkWeights`, `whole_weights` and `live_weights`. Next: `step.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import Tensor

from pyro_bmr.data.inputs import Inputs
from pyro_bmr.fitting.flat_vectors import FlatVectors
from pyro_bmr.fitting.layer_scales import LayerScales, layer_scales
from pyro_bmr.fitting.live_network import LiveNetwork, LiveNetworks
from pyro_bmr.fitting.network import Network
from pyro_bmr.fitting.unread_terms import Number
from pyro_bmr.fitting.written_weights import WrittenWeight
from pyro_bmr.networks.placed_weights import PlacedWeights


class NetworkWeights:
    """Parameter → its `WrittenWeight`, and the network that is called with them.

    `given`: parameter → its weight, a leaf of autograd. `active`: those that have something to do
    in a step. `scattered`: parameter → the flat tensor into which its kept entries are put; empty
    where the flat vectors do that.
    """

    def __init__(
        self,
        written: Mapping[str, WrittenWeight],
        placed: PlacedWeights | None,
        live: LiveNetwork | None = None,
        scattered: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.written, self.placed, self.live = written, placed, live
        self.scattered = scattered or {}
        places = None if live is None else live.placed.places
        self.given = {n: w.leaf for n, w in written.items() if places is None or n in places}
        # without a smaller network, all but the weights that are their sites, with a divergence in
        # closed form
        scales, others = layer_scales(
            w for w in written.values() if live is not None or not w.passive
        )
        self.active: list[LayerScales | WrittenWeight] = [*scales, *others]

    @property
    def sites(self) -> set[str]:
        """The sites of all parameters."""
        return {site for w in self.written.values() for site in w.sites}

    def weigh(self, flat: FlatVectors) -> None:
        """Evaluates the weights at the draw of `flat`."""
        if self.live is not None:
            self.live.follow()
        for name, tensor in self.scattered.items():
            tensor.scatter_(0, self._places(name), flat.draw[flat.parts[name]])
        for w in self.active:
            w.weigh()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the network is called with: the weights, and the point estimates that are cut."""
        return self.given if self.live is None else {**self.given, **self.live.point_estimates()}

    def settle(self) -> None:
        """Brings the buffers of the whole network up to date, after a run."""
        if self.live is not None:
            self.live.give_back()

    def _places(self, name: str) -> Tensor:
        places = self.written[name].kept
        assert places is not None
        return places

    def log_p(self) -> Number:
        """log p of the sites whose density is written out, nats."""
        return sum(w.log_p() for w in self.active)

    def gradients(self, factor: float) -> dict[str, Tensor]:
        """Those of every active weight (`WrittenWeight.gradients`)."""
        found: dict[str, Tensor] = {}
        for w in self.active:
            found |= w.gradients(factor)
        return found


def whole_weights(network: Network | None, flat: FlatVectors) -> NetworkWeights:
    """The parameters whose prior has a form, and whose scales are not pruned."""
    if network is None:
        return NetworkWeights({}, None)
    draws = {name: flat.draw[part] for name, part in flat.parts.items()}
    whole = {s.name for s in flat.guide.latents if len(draws[s.name]) == s.shape.numel()}
    kept = flat.kept or {}
    written = {
        name: WrittenWeight(form, name, draws, flat.leaves[name], kept.get(name))
        for name, form in network.forms.items()
        if whole.issuperset(site.name for site in form.scale_sites)
    }
    return NetworkWeights(written, PlacedWeights(network.net))


def live_weights(networks: LiveNetworks, flat: FlatVectors, x: Inputs) -> NetworkWeights | None:
    """The parameters as the smaller network has them that pruning has left, if it pays to have one
    (`LiveNetworks.after`); `x`: what the program gets.
    """
    network = networks.network
    live = networks.after({name: flat.mask_of(name) for name in network.forms}, x)
    if live is None or flat.kept is None:
        return None
    draws = {name: flat.draw[part] for name, part in flat.parts.items()}
    written, scattered = {}, {}
    for name, form in network.forms.items():
        cut = live.cuts[name]
        size = prod(cut.small)
        tensor = scattered[name] = flat.draw.new_zeros(size + 1)  # the last is for what is cut off
        leaf = tensor[:size].view(cut.small).detach().requires_grad_()
        places = cut.places(flat.kept[name])
        written[name] = WrittenWeight(form, name, draws, leaf, places, cut=cut)
    return NetworkWeights(written, live.placed, live, scattered)
