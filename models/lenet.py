"""LeNet-5 with 6 and 16 channels and 120 and 84 units on images padded to 32×32: `--model lenet`,
or `--model lenet:18-48-360-256` for other sizes.

It has valid 5×5 convolutions, average pooling and tanh; `--model lenet:6-16-120-84-relu` has
maximum pooling and ReLU. Run it by itself: python models/lenet.py
"""

import torch
from torch import nn

import pyro_bmr as bmr


def network(
    shape: tuple[int, int, int], sizes: tuple[int, int, int, int], outputs: int, relu: bool = False
) -> nn.Sequential:
    """LeNet-5 for images of `shape` (channels, height, width), at most 32×32."""
    act, pool = (nn.ReLU, nn.MaxPool2d) if relu else (nn.Tanh, nn.AvgPool2d)
    channels, height, width = shape
    first, second, third, fourth = sizes
    top, left = (32 - height) // 2, (32 - width) // 2
    return nn.Sequential(
        nn.ZeroPad2d((left, 32 - width - left, top, 32 - height - top)),
        nn.Conv2d(channels, first, 5), act(), pool(2),
        nn.Conv2d(first, second, 5), act(), pool(2),
        nn.Flatten(),
        nn.Linear(second * 25, third), act(),
        nn.Linear(third, fourth), act(),
        nn.Linear(fourth, outputs),
    )  # fmt: skip


def build(
    data: bmr.Data, prior: bmr.priors.Prior, sizes: str = "6-16-120-84"
) -> bmr.BayesianNetwork:
    shape = data.input_shape
    words = sizes.removesuffix("-relu").split("-")
    numbers = tuple(int(word) if word.isdecimal() else 0 for word in words)
    if len(shape) != 3 or shape[1] > 32 or shape[2] > 32:
        raise bmr.errors.DataError(
            "lenet: expected images (channels, height, width) of at most 32×32, got rows of shape"
            f" {shape}"
        )
    if len(numbers) != 4 or min(numbers) < 1:
        raise bmr.errors.ModelError(
            "lenet: expected four sizes, as in lenet:6-16-120-84 or lenet:6-16-120-84-relu, got"
            f" lenet:{sizes}"
        )
    net = network(shape, numbers, data.outputs, relu=sizes.endswith("-relu"))
    return bmr.BayesianNetwork(net, prior, data.likelihood())


def main() -> None:
    torch.manual_seed(0)
    data = bmr.load("digits")
    fit = bmr.fit(
        build(data, bmr.Gaussian()), data, epochs=30, reduce=bmr.Every(to=bmr.Gaussian(scale=0))
    )
    prediction = bmr.predict(fit.program, fit.posterior, data.x_test)
    print(
        f"accuracy {bmr.metrics.accuracy(prediction.probs, data.y_test):.3f} with"
        f" {fit.history['kept'].iloc[-1]:.1%} of the weights"
    )


if __name__ == "__main__":
    main()
