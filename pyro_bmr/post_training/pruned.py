"""`Pruned`: a network that was pruned after its training, and what that did.

Owns `Pruned` and the posteriors before and after. Next: `prune.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyro_bmr.checks import check_arguments, is_whole
from pyro_bmr.errors import holds
from pyro_bmr.formulas import HeldMatrixNormal, MatrixNormal, held_var
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.held_evidence import log_det_bounds
from pyro_bmr.post_training.layer import Layer
from pyro_bmr.post_training.measure import write
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.site import Site
from pyro_bmr.priors import Gaussian
from pyro_bmr.reduction.reduced_site import SiteReduction
from pyro_bmr.reduction.result import Reduction

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Pruned:
    """What `prune` gives.

    `net`: a plain network with exact zeros; the original is not changed. `reduction`: the posterior
    `before` and after, with masks; `shrink` and `deploy` take these. `rounds`: one row per round:
    kept, delta_f (nats), predicted_rise, divergence and held_out_rise (nats per row). `rises`:
    weight → the part of the predicted rise that is its layer's. `layers`: weight → the posterior of
    its layer, with its bias. `stopped`: why the last rounds were left out, or
    None.
    """

    net: nn.Module
    reduction: Reduction
    rounds: tuple[Mapping[str, float], ...]
    rises: Mapping[str, float]
    layers: Mapping[str, Layer]
    stopped: str | None = None

    def __repr__(self) -> str:
        size = sum(mask.numel() for mask in self.masks.values())
        said = [f"{len(self.masks)} layers", f"{self.kept:.1%} of {size:,} weights kept"]
        said += ["stopped early"] if self.stopped else []
        return f"Pruned({', '.join(said)})"

    @property
    def masks(self) -> dict[str, Tensor]:
        """Weight → bool tensor, True where it is kept."""
        return {name: mask for name, mask in self.reduction.masks.items() if name in self.rises}

    @property
    def kept(self) -> float:
        """The fraction of the weights that is kept; biases do not count."""
        masks = list(self.masks.values())
        return sum(int(m.count_nonzero()) for m in masks) / sum(m.numel() for m in masks)

    def draws(self, count: int, *, widening: float = 1.0, seed: int = 0) -> Iterator[nn.Module]:
        r"""Networks with weights drawn from the posterior given the zeros, the weight and the bias
        of a layer together; what has no factors stays at its point.

        `prediction.predict_networks` averages their predictions.

        Args:
            widening: the factor on the covariance, from held-out rows. 1/T is not the posterior at
                T = 1: directions that only the prior determines are then 1/T too wide, which ruins
                some networks (docs/results/pretrained.md).

        Raises:
            ModelError: `count` or `widening` is not > 0.

        Example:
            >>> predict_networks(pruned.draws(16), Categorical(), x_test).probs
        """
        check_arguments("draws", is_whole(count, 1), "a whole number > 0", count=count)
        positive = holds(lambda c: 0 < c < math.inf, widening)
        check_arguments("draws", positive, "a finite number > 0", widening=widening)
        return self._drawn(count, widening, seed)

    def _drawn(self, count: int, widening: float, seed: int) -> Iterator[nn.Module]:
        generator = torch.Generator().manual_seed(seed)
        streams = [layer.draws(count, widening, generator) for layer in self.layers.values()]
        for drawn in zip(*streams, strict=True):
            net = copy.deepcopy(self.net)
            for layer in drawn:
                write(net, layer.values())
            yield net

    def table(self) -> pd.DataFrame:
        """One row per layer: layer, size, kept (fraction), delta_f (nats) and predicted_rise (nats
        per row).
        """
        import pandas as pd

        rows = [
            (
                name,
                mask.numel(),
                float(mask.double().mean()),
                self.reduction.sites[name].delta_f,
                self.rises[name],
            )
            for name, mask in self.masks.items()
        ]
        return pd.DataFrame(rows, columns=["layer", "size", "kept", "delta_f", "predicted_rise"])

    def history(self) -> pd.DataFrame:
        """`rounds` as a table."""
        import pandas as pd

        return pd.DataFrame(list(self.rounds))


def reduction_of(
    before: Mapping[str, Layer],
    after: Mapping[str, Layer],
    gains: Mapping[str, float],
    temperature: float,
    rows: int,
) -> Reduction:
    """The posterior of the trained network, and that of the pruned one."""
    first = {name: site for layer in before.values() for name, site in _sites(layer).items()}
    results = {}
    for name, layer in after.items():
        for site_name, site in _sites(layer).items():
            start = first[site_name]
            spike = before[name].delta_f() if site_name == name else torch.zeros_like(start.mean)
            drop = spike.masked_fill(~site.kept, torch.inf)
            gain = gains[name] if site_name == name else 0.0
            wider = int((site.var[site.kept] > layer.scale**2).sum())
            results[site_name] = SiteReduction(gain, spike, drop, site, wider)
    origin = Posterior(first, temperature, rows)
    done = replace(origin, sites={name: result.site for name, result in results.items()})
    return Reduction(results, done, origin)


def _sites(layer: Layer) -> dict[str, Site]:
    """The weight and the bias of a layer as sites, each with its marginal."""
    prior = Gaussian(layer.scale)
    width, held = layer.columns, layer.held[:, : layer.columns]
    mean, cols = layer.mean[:, :width], layer.col_cov[:width, :width]
    parts = mean, layer.row_cov, cols
    if layer.turned:
        parts, held = (mean.mT, cols, layer.row_cov), held.mT
    joint: MatrixNormal | HeldMatrixNormal = MatrixNormal(*parts)
    mask = None
    if bool(held.any()):
        joint = _given_zeros(*parts, held)
        mask = (~held).reshape(layer.shape)
    shape = layer.shape
    moments = joint.mean.reshape(shape), joint.marginal_var.reshape(shape)
    sites = {layer.name: _site(*moments, prior, mask, joint)}
    if layer.bias is not None:
        last = layer.mean[:, -1:]
        of_bias = MatrixNormal(last, layer.row_cov, layer.col_cov[-1:, -1:])
        var = of_bias.marginal_var.flatten()
        sites[layer.bias] = _site(last.flatten(), var, prior, None, of_bias)
    return sites


def _given_zeros(mean: Tensor, row_cov: Tensor, col_cov: Tensor, held: Tensor) -> HeldMatrixNormal:
    """MN(mean, row_cov, col_cov) given the zeros, where the mean is zero there already."""
    zero = mean.new_zeros((), dtype=torch.float64)
    bounds = log_det_bounds(row_cov, col_cov, held, work=0)
    return HeldMatrixNormal(
        mean,
        held_var(row_cov, col_cov, held)[0],
        row_cov,
        col_cov,
        mean,
        held,
        torch.zeros_like(mean),
        zero,
        zero.new_tensor(bounds),
        zero,
    )


def _site(
    mean: Tensor,
    var: Tensor,
    prior: Gaussian,
    mask: Tensor | None,
    joint: MatrixNormal | HeldMatrixNormal,
) -> Site:
    moments = Diagonal(mean.new_zeros(()), mean.new_tensor(float(prior.scale) ** 2))
    return Site(mean.clone(), var.clone(), moments, prior, mask=mask, joint=joint)
