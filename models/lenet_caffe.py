"""LeNet-5 as in Caffe, with 20 and 50 channels and 500 units on images of 28×28: `--model
lenet_caffe`, or `--model lenet_caffe:8-16-64`.

It has valid 5×5 convolutions, max pooling and one ReLU before the outputs. Run it by itself: python
models/lenet_caffe.py
"""

import torch
from torch import nn

import pyro_bmr as bmr


def network(
    shape: tuple[int, int, int], sizes: tuple[int, int, int], outputs: int
) -> nn.Sequential:
    """LeNet-5 as in Caffe, for images of `shape` (channels, height, width), at least 16×16.

    Weights start as in He et al. 2015 (arXiv 1502.01852), biases at 0.
    """
    channels, height, width = shape
    first, second, third = sizes
    positions = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    net = nn.Sequential(
        nn.Conv2d(channels, first, 5), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * positions, third), nn.ReLU(),
        nn.Linear(third, outputs),
    )  # fmt: skip
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return net


def build(data: bmr.Data, prior: bmr.priors.Prior, sizes: str = "20-50-500") -> bmr.BayesianNetwork:
    shape = data.input_shape
    numbers = tuple(int(word) if word.isdecimal() else 0 for word in sizes.split("-"))
    if len(shape) != 3 or min(shape[1:]) < 16:
        raise bmr.errors.DataError(
            "lenet_caffe: expected images (channels, height, width) of at least 16×16, got rows of"
            f" shape {shape}"
        )
    if len(numbers) != 3 or min(numbers) < 1:
        raise bmr.errors.ModelError(
            "lenet_caffe: expected three sizes, as in lenet_caffe:20-50-500, got"
            f" lenet_caffe:{sizes}"
        )
    return bmr.BayesianNetwork(network(shape, numbers, data.outputs), prior, data.likelihood())


def main() -> None:
    torch.manual_seed(0)
    data = bmr.load("mnist")
    fit = bmr.fit(
        build(data, bmr.Gaussian()), data, epochs=5, reduce=bmr.Every(to=bmr.Gaussian(scale=0))
    )
    prediction = bmr.predict(fit.program, fit.posterior, data.x_test)
    print(
        f"accuracy {bmr.metrics.accuracy(prediction.probs, data.y_test):.3f} with"
        f" {fit.history['kept'].iloc[-1]:.1%} of the weights"
    )


if __name__ == "__main__":
    main()
