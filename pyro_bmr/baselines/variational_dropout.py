"""Sparse variational dropout (Molchanov, Ashukha & Vetrov 2017): a posterior N(θ, σ²) per weight
under a log-uniform prior; weights of large α = σ²/θ² are pruned.

Owns `VariationalDropoutOptions`, `variational_dropout` and `log_uniform_kl`. Next:
`signal_to_noise.py`.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_bmr.baselines.dropout import called
from pyro_bmr.baselines.magnitude import Gradual, Pruning
from pyro_bmr.baselines.options import is_between
from pyro_bmr.baselines.plain import Calibrated, MakeNetwork, trained_network
from pyro_bmr.baselines.training import Rows, Trained, train
from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import ModelError
from pyro_bmr.fitting.batches import device_of

if TYPE_CHECKING:
    import pandas as pd

_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695
_TINY = 1e-16  # beside variances, so that no gradient is infinite at zero


@dataclass(frozen=True)
class VariationalDropoutOptions(Gradual, Calibrated):
    """`threshold`: weights with log α above it are zero at the end. `kept` below 1: instead, the
    weights of largest log α are pruned during the training, on the schedule of `magnitude`, until
    that fraction of all parameters is left. `warm_up`: the part of the training over which the
    weight of the KL rises from 0 to 1. `log_variance`: log σ² at the start. `variance_rate`: by
    which the learning rate of log σ² is larger than that of the weights.
    """

    kept: float = 1.0
    threshold: float = 3.0
    warm_up: float = 0.3
    log_variance: float = -8.0
    variance_rate: float = 10.0

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {
            **super().rules(),
            "threshold": (is_between(self.threshold, -100, 100), "a number"),
            "warm_up": (is_between(self.warm_up, 0, 1), "0 <= warm_up <= 1"),
            "log_variance": (is_between(self.log_variance, -100, 100), "a number"),
            "variance_rate": (is_between(self.variance_rate, 0, 1e6), "a number >= 0"),
        }


def log_uniform_kl(log_alpha: Tensor) -> Tensor:
    r"""KL(N(θ, αθ²) ‖ log-uniform) per weight, nats, up to the constant that makes it 0 at α → ∞.

    .. math:: \mathrm{KL} \approx \tfrac12 \log(1 + \alpha^{-1}) + k_1 - k_1 \sigma(k_2 +
        k_3 \log\alpha)

    with k₁ = 0.63576, k₂ = 1.87320, k₃ = 1.48695. Source: Molchanov, Ashukha & Vetrov 2017, arXiv
    1701.05369, equation 14.
    """
    return 0.5 * F.softplus(-log_alpha) + _K1 * torch.sigmoid(-_K2 - _K3 * log_alpha)


class NoisyLayers:
    """σ² of the weights of linear layers and convolutions, and the hooks that add their noise to
    the outputs of the layers.

    An output is drawn from N(θ∗x + b, σ²∗x²), of a convolution too, whose outputs at different
    places are then independent, as in the source's own code: the local reparametrisation of Kingma,
    Salimans & Welling 2015 (arXiv 1506.02557) for the additive parametrisation of Molchanov et al.
    2017. Biases have none.
    """

    def __init__(self, layers: list[Any], log_variance: float) -> None:
        self.layers = layers
        self.log_variances = [
            nn.Parameter(torch.full_like(layer.weight, log_variance)) for layer in layers
        ]
        self.pruning = Pruning([layer.weight for layer in layers])

    def counts(self, net: nn.Module) -> tuple[int, int]:
        """How many parameters `net` has, and how many of them have no noise."""
        noisy = {id(layer.weight) for layer in self.layers}
        total = sum(p.numel() for p in net.parameters())
        return total, sum(p.numel() for p in net.parameters() if id(p) not in noisy)

    def log_alphas(self) -> list[Tensor]:
        """log α per weight, ±20 at most."""
        pairs = zip(self.layers, self.log_variances, strict=True)
        return [
            (log_var - (layer.weight.square() + _TINY).log()).clamp(-20, 20)
            for layer, log_var in pairs
        ]

    def kl(self) -> Tensor:
        """Summed over the weights that are kept, nats."""
        return torch.stack(
            [
                (log_uniform_kl(a) * mask).sum()
                for a, mask in zip(self.log_alphas(), self.pruning.masks, strict=True)
            ]
        ).sum()

    def noisy(self, stack: ExitStack) -> None:
        """Adds the noise until `stack` is closed."""
        for k, layer in enumerate(self.layers):

            def add(layer: Any, args: tuple[Tensor, ...], output: Tensor, k: int = k) -> Tensor:
                if not layer.training:
                    return output
                variance, squares = (
                    self.log_variances[k].exp() * self.pruning.masks[k],
                    args[0].square(),
                )
                spread = (
                    F.linear(squares, variance)
                    if isinstance(layer, nn.Linear)
                    else layer._conv_forward(squares, variance, None)
                )
                return output + (spread + _TINY).sqrt() * torch.randn_like(output)

            stack.callback(layer.register_forward_hook(add).remove)


def variational_dropout(
    make: MakeNetwork,
    data: Data,
    seed: int,
    options: VariationalDropoutOptions,
    progress: bool = False,
) -> Trained:
    """Sparse variational dropout on the weights of all linear layers and convolutions; biases and
    other parameters are point estimates.

    Prediction and export are of the means θ, pruned ones exactly 0, as in the source. `extra`:
    threshold_kept, the fraction of the parameters that the threshold would keep.

    Raises:
        ModelError: `kept` is less than the parameters that are no such weights.
    """
    clock = time.perf_counter()
    net, rows = make(seed), options.rows(data)
    noise = NoisyLayers(called(net, data.x_train[:2].to(device_of(net))), options.log_variance)
    total, rest = noise.counts(net)
    if options.kept * total < rest:
        raise ModelError(
            f"kept={options.kept}: {rest / total:.3g} of the parameters are biases and others that"
            " are not pruned; expected at least that"
        )
    history = _train_noisy(net, noise, rows, options, progress)
    kept = [
        (a <= options.threshold) & (mask > 0)
        for a, mask in zip(noise.log_alphas(), noise.pruning.masks, strict=True)
    ]
    if options.kept == 1:
        noise.pruning.masks = [
            part.to(mask) for part, mask in zip(kept, noise.pruning.masks, strict=True)
        ]
        noise.pruning.hold()
    extra = {"threshold_kept": (rest + sum(int(part.sum()) for part in kept)) / total}
    return trained_network(net, history, time.perf_counter() - clock, rows, options, extra)


def _train_noisy(
    net: nn.Module,
    noise: NoisyLayers,
    rows: Rows,
    options: VariationalDropoutOptions,
    progress: bool,
) -> pd.DataFrame:
    """Trains with the noise on, and prunes on the schedule of the options."""
    total, rest = noise.counts(net)

    def loss(outputs: Tensor, y: Tensor, done: float) -> Tensor:
        weight = min(done / options.warm_up, 1.0) if options.warm_up else 1.0
        return F.cross_entropy(outputs, y) + weight * noise.kl() / len(rows.x)

    def after(step: int, steps: int) -> None:
        target = options.due(step, steps)
        if target is None:
            noise.pruning.hold()
        else:
            scores = [(-a).exp() for a in noise.log_alphas()]
            noise.pruning.prune((target * total - rest) / (total - rest), scores)

    groups: list[dict[str, Any]] = [
        {"params": list(net.parameters())},
        {
            "params": noise.log_variances,
            "lr": options.learning_rate * options.variance_rate,
            "weight_decay": 0.0,
        },
    ]
    with ExitStack() as stack:
        noise.noisy(stack)
        return train(net, rows, options, progress, loss=loss, after=after, groups=groups)
