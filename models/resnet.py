"""A small residual network (He et al. 2016, arXiv 1512.03385) on images of any size: `--model
resnet`, or `--model resnet:16-32-64` for other widths.

There is one block for each width, and the image is halved between them. `--model
resnet:16-32-group` has group norm, which does not depend on the batch, instead of batch norm. Run
it by itself: python models/resnet.py
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyro_bmr as bmr

Norm = Callable[[int], nn.Module]


class Block(nn.Module):
    """Two 3×3 convolutions with a skip connection.

    The skip connection is a 1×1 convolution where the width or the size of the image changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_first, self.norm_second = norm(outputs), norm(outputs)
        self.straight = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Conv2d(inputs, outputs, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_second(self.second(F.relu(self.norm_first(self.first(x)))))
        return F.relu(self.straight(x) + y)


class ResNet(nn.Module):
    """A 3×3 convolution, a block per width, and the logits of the mean over the image."""

    def __init__(self, channels: int, widths: tuple[int, ...], outputs: int, norm: Norm) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.norm = norm(widths[0])
        strides = [1, *[2] * (len(widths) - 1)]
        steps = zip(itertools.pairwise((widths[0], *widths)), strides, strict=True)
        self.blocks = nn.Sequential(*(Block(a, b, stride, norm) for (a, b), stride in steps))
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def build(data: bmr.Data, prior: bmr.priors.Prior, sizes: str = "16-32") -> bmr.BayesianNetwork:
    shape = data.input_shape
    if len(shape) != 3:
        raise bmr.errors.DataError(
            f"resnet: expected images (channels, height, width), got rows of shape {shape}"
        )
    words = sizes.split("-")
    grouped = words[-1] == "group"
    widths = tuple(int(word) if word.isdecimal() else 0 for word in words if word != "group")
    if not widths or min(widths) < 1 or (grouped and any(width % 4 for width in widths)):
        raise bmr.errors.ModelError(
            "resnet: expected widths, as in resnet:16-32, or multiples of 4 and the word group, as"
            f" in resnet:16-32-group, got resnet:{sizes}"
        )
    norm: Norm = partial(nn.GroupNorm, 4) if grouped else nn.BatchNorm2d
    net = ResNet(shape[0], widths, data.outputs, norm)
    return bmr.BayesianNetwork(net, prior, data.likelihood())


def main() -> None:
    torch.manual_seed(0)
    data = bmr.load("digits")
    fit = bmr.fit(
        build(data, bmr.Gaussian()),
        data,
        epochs=20,
        temperature=0.1,
        reduce=bmr.Every(1, to=bmr.Gaussian(scale=0)),
    )
    prediction = bmr.predict(fit.program, fit.posterior, data.x_test)
    print(
        f"accuracy {bmr.metrics.accuracy(prediction.probs, data.y_test):.3f} with"
        f" {fit.history['kept'].iloc[-1]:.1%} of the weights"
    )


if __name__ == "__main__":
    main()
