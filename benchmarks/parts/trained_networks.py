"""Networks trained in plain torch on Fashion-MNIST until they no longer improve, kept in a folder.

Owns `trained`, `trained_on` and `rows`. 5,000 of the training rows are held out: settings are
chosen on them.
"""

from __future__ import annotations

import copy
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
    if not path.exists():
        _train(net, epochs, rate, train)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    net.load_state_dict(load_file(path))
    return net.eval().requires_grad_(False)


def trained_on(net: nn.Module, steps: int, rate: float, train: Rows) -> nn.Module:
    """A copy after some steps more, by the labels; weights that are zero stay so."""
    net = copy.deepcopy(net).train().requires_grad_(True)
    masks = [(p, p.detach() != 0) for p in net.parameters() if p.ndim > 1]
    adam = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps, pct_start=0.1)
    order = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(0))
    for index in order.split(128)[:steps]:
        adam.zero_grad()
        nn.functional.cross_entropy(net(train.x[index]), train.y[index]).backward()
        adam.step()
        schedule.step()
        for p, mask in masks:
            p.data.mul_(mask)
    return net.eval().requires_grad_(False)


def _train(net: nn.Module, epochs: int, rate: float, train: Rows) -> None:
    net.train()
    adam = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(train.x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for index in torch.randperm(len(train.x)).split(128):
            adam.zero_grad()
            nn.functional.cross_entropy(net(train.x[index]), train.y[index]).backward()
            adam.step()
            schedule.step()
