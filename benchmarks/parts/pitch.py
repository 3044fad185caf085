"""torchcrepe, which tells the pitch of a sound, on tones whose pitch is known.

Owns `Logits`, `tones`, `right`, `live_filters` and `by_norm`.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

FILTERS = (128, 16, 16, 16, 32, 64)  # of torchcrepe tiny
BINS, FIRST_BIN = 360, 1997.3794084376191  # of 20 cents, from 10 Hz


class Logits(nn.Module):
    """torchcrepe before its last sigmoid."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        x = net.layer(net.embed(x), net.conv6, net.conv6_BN)
        return net.classifier(x.permute(0, 2, 1, 3).reshape(-1, net.in_features))  # type: ignore[no-any-return]


def tones(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sounds of 1,024 samples at 16 kHz, and their pitch in Hz: 50 to 1,500 Hz, up to ten harmonics
    of random amplitudes and phases, in noise of −5 to 20 dB.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    at, number = torch.arange(1024) / 16_000, torch.arange(1, 11)
    pitch = 50 * 30 ** draw(rows, 1)
    amplitude = (0.3 + 0.7 * draw(rows, 1)) ** (number - 1) * (0.2 + 0.8 * draw(rows, 10))
    amplitude = amplitude * (pitch * number < 7800)
    phase = 2 * math.pi * draw(rows, 10)
    angle = 2 * math.pi * (pitch * number)[:, :, None] * at + phase[:, :, None]
    wave = (amplitude[:, :, None] * angle.sin()).sum(1)
    noise = torch.randn(rows, 1024, generator=generator) * 10 ** ((5 - 25 * draw(rows, 1)) / 20)
    wave = wave / wave.std(1, keepdim=True) + noise
    return (wave - wave.mean(1, keepdim=True)) / wave.std(1, keepdim=True), pitch[:, 0]


@torch.no_grad()
def right(net: nn.Module, x: Tensor, pitch: Tensor) -> float:
    """The share of tones within 50 cents, by the mean of the bins around the highest."""
    probs = torch.cat([net(part).sigmoid() for part in x.split(250)])
    near = (probs.argmax(1)[:, None] + torch.arange(-4, 5)).clamp(0, BINS - 1)
    weights = probs.gather(1, near)
    cents = (weights * (FIRST_BIN + 20 * near)).sum(1) / weights.sum(1)
    return float(((cents - 1200 * (pitch / 10).log2()).abs() < 50).double().mean())


def live_filters(net: nn.Module) -> int:
    """The filters that something reads and that have weights."""
    total, values = 0, dict(net.named_parameters())
    for layer, count in enumerate(FILTERS, 1):
        own = values[f"net.conv{layer}.weight"].flatten(1).any(1)
        if layer < len(FILTERS):
            read = values[f"net.conv{layer + 1}.weight"].transpose(0, 1).flatten(1).any(1)
        else:
            read = values["net.classifier.weight"].any(0).view(-1, count).any(0)
        total += int((own & read).sum())
    return total


def by_norm(net: nn.Module, kept: float) -> nn.Module:
    """Of each layer the filters of the largest norm, with their bias."""
    out = copy.deepcopy(net)
    for layer, count in enumerate(FILTERS, 1):
        weight, bias = (out.get_parameter(f"net.conv{layer}.{name}") for name in ("weight", "bias"))
        order = weight.flatten(1).norm(dim=1).argsort()
        gone = order[: count - round(kept * count)]
        weight.data[gone], bias.data[gone] = 0, 0
    return out
