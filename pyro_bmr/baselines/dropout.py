"""MC dropout (Gal & Ghahramani 2016): dropout in training and in prediction, averaged over draws.

Owns `DropoutOptions`, `dropout`, `dropped_out`, and `called`, which finds the layers that a network
runs. Next: `variational_dropout.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_bmr.baselines.options import Budget, is_between
from pyro_bmr.baselines.plain import MakeNetwork
from pyro_bmr.baselines.training import Trained, held_out, outputs_of, train
from pyro_bmr.checks import is_whole
from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import ModelError
from pyro_bmr.fitting.batches import device_of
from pyro_bmr.prediction.predict import Prediction, prediction_of

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class DropoutOptions(Budget):
    """`dropout`: the probability by which an input of a layer is zero. `draws`: of the masks, in
    prediction.
    """

    dropout: float = 0.2
    draws: int = 32

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {
            **super().rules(),
            "dropout": (is_between(self.dropout, 0, 1) and self.dropout < 1, "0 <= dropout < 1"),
            "draws": (is_whole(self.draws, 1), "a whole number >= 1"),
        }


@torch.no_grad()
def called(net: nn.Module, x: Tensor) -> list[Any]:
    """The linear layers and convolutions that `net(x)` calls as modules, in the order of their
    first call. Others of the network, such as the output projection of torch's attention, are used
    by their parameters alone, and no hook on them runs.
    """
    found: dict[nn.Module, None] = {}
    modes = {module: module.training for module in net.modules()}
    with ExitStack() as stack:
        for module in net.modules():
            if isinstance(module, _WEIGHTED):
                stack.callback(
                    module.register_forward_pre_hook(
                        lambda layer, args: found.setdefault(layer)
                    ).remove
                )
        net.eval()(x)
    for module, mode in modes.items():
        module.training = mode
    return list(found)


@contextmanager
def dropped_out(net: nn.Module, rate: float, x: Tensor) -> Iterator[None]:
    """Inside, each input of every linear layer but the first layer of the network is 0 with
    probability `rate` and else divided by 1 − `rate`, in evaluation mode too; outside, the network
    is as it was. `x`: some rows, to see which layers there are.

    Raises:
        ModelError: the network has no such layer.
    """
    layers = [layer for layer in called(net, x)[1:] if isinstance(layer, nn.Linear)]
    if not layers:
        raise ModelError(
            "dropout: expected a network with a Linear layer after its first layer, got"
            f" {type(net).__name__} without"
        )
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.register_forward_pre_hook(
                lambda layer, args: (F.dropout(args[0], rate, training=True), *args[1:])
            )
            stack.callback(hook.remove)
        yield


def dropout(
    make: MakeNetwork, data: Data, seed: int, options: DropoutOptions, progress: bool = False
) -> Trained:
    """A network trained with dropout on the inputs of its hidden and last linear layers, whose
    class probabilities are averaged over draws of the masks.

    The exported network is the deterministic one, without dropout. Source: Gal & Ghahramani 2016,
    arXiv 1506.02142.
    """
    clock = time.perf_counter()
    net = make(seed)
    few = data.x_train[:2].to(device_of(net))
    with dropped_out(net, options.dropout, few):
        history = train(net, held_out(data, None), options, progress)
    net.eval()

    def predict(x: Tensor) -> Prediction:
        with torch.random.fork_rng(), dropped_out(net, options.dropout, few):
            torch.manual_seed(seed)
            return prediction_of(
                ((outputs_of(net, x).softmax(1)[None],) for _ in range(options.draws)),
                options.draws,
            )

    return Trained(
        predict,
        dict(net.state_dict()),
        net,
        history,
        options.batch_size,
        time.perf_counter() - clock,
    )
