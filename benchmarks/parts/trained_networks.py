"""Networks trained in plain torch on Fashion-MNIST until they no longer improve, kept in a folder.

Owns `trained`, `trained_on`, `rows`, and the training loop, `descend`. 5,000 of the training rows
are held out: settings are chosen on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.models import lenet, mlp, mlp_mixer, resnet, vit

# builder, epochs, largest learning rate
RECIPES = {
    "mlp": (mlp.build, 15, 1e-3),
    "lenet": (lenet.build, 15, 2e-3),
    "vit": (vit.build, 15, 2e-3),
    "resnet": (resnet.build, 8, 4e-3),
    "mixer": (mlp_mixer.build, 15, 3e-3),
}


class Rows(NamedTuple):
    x: Tensor
    y: Tensor


def rows() -> dict[str, Rows]:
    """The rows for training, those held out, and the test rows."""
    data = bmr.load("fashion-mnist")
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    held, rest = order[:5000], order[5000:]
    return {
        "train": Rows(data.x_train[rest], data.y_train[rest]),
        "held": Rows(data.x_train[held], data.y_train[held]),
        "test": Rows(data.x_test, data.y_test),
    }


def trained(name: str, seed: int, folder: Path, train: Rows) -> nn.Module:
    """The network of that name, from its file if there is one."""
    build, epochs, rate = RECIPES[name]
    torch.manual_seed(seed)
    net = build(bmr.load("fashion-mnist"), bmr.Gaussian()).net
    path = folder / f"{name}-{seed}.safetensors"
    return stored(net, path, lambda: descend(net, train, epoch_batches(train, epochs), rate))


def stored(net: nn.Module, path: Path, train: Callable[[], None]) -> nn.Module:
    """`net` with the weights of the file; without one it is trained and the file is written."""
    if not path.exists():
        train()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    net.load_state_dict(load_file(path))
    return net.eval().requires_grad_(False)


def trained_on(net: nn.Module, steps: int, rate: float, train: Rows) -> nn.Module:
    """A copy after some steps more, by the labels; weights that are zero stay so."""
    net = copy.deepcopy(net).requires_grad_(True)
    masks = [(p, p.detach() != 0) for p in net.parameters() if p.ndim > 1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batches = epoch_batches(train, -(-steps * 128 // len(train.x)))[:steps]
    descend(net, train, batches, rate, masks)
    return net.eval().requires_grad_(False)


def epoch_batches(train: Rows, epochs: int, size: int = 128) -> list[Tensor]:
    """The rows of each step, in another order in each epoch."""
    return [part for _ in range(epochs) for part in torch.randperm(len(train.x)).split(size)]


def descend(
    net: nn.Module,
    train: Rows,
    batches: Sequence[Tensor],
    rate: float,
    masks: Iterable[tuple[nn.Parameter, Tensor]] = (),
) -> None:
    """A step of AdamW for each batch, up to `rate` and down again. Entries of a parameter that its
    mask leaves out stay zero.
    """
    net.train()
    adam = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adam, rate, total_steps=len(batches), pct_start=0.1
    )
    for index in batches:
        adam.zero_grad()
        logits = net(train.x[index]).flatten(0, -2)  # of sequences each place is a row
        nn.functional.cross_entropy(logits, train.y[index].flatten()).backward()
        adam.step()
        schedule.step()
        for p, mask in masks:
            p.data.mul_(mask)
