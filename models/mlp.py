"""A multilayer perceptron of any sizes on flattened inputs: `--model mlp` (300-100 hidden units) or
`--model mlp:500-500`.

Run it by itself: python models/mlp.py
"""

import math

import torch
from torch import nn

import pyro_bmr as bmr


def network(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Flatten, then Linear and ReLU for each hidden layer, then Linear.

    Weights start as in He et al. 2015 (arXiv 1502.01852), biases at 0.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for size in hidden:
        layers += [nn.Linear(inputs, size), nn.ReLU()]
        inputs = size
    net = nn.Sequential(*layers, nn.Linear(inputs, outputs))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


def build(data: bmr.Data, prior: bmr.priors.Prior, sizes: str = "300-100") -> bmr.BayesianNetwork:
    hidden = tuple(int(word) if word.isdecimal() else 0 for word in sizes.split("-"))
    if min(hidden) < 1:
        raise bmr.errors.ModelError(
            f"mlp: expected the sizes of hidden layers, as in mlp:300-100, got mlp:{sizes}"
        )
    net = network(math.prod(data.input_shape), hidden, data.outputs)
    return bmr.BayesianNetwork(net, prior, data.likelihood())


def main() -> None:
    torch.manual_seed(0)
    data = bmr.load("digits")
    fit = bmr.fit(
        build(data, bmr.Gaussian()), data, epochs=60, reduce=bmr.Every(to=bmr.Gaussian(scale=0))
    )
    prediction = bmr.predict(fit.program, fit.posterior, data.x_test)
    print(
        f"accuracy {bmr.metrics.accuracy(prediction.probs, data.y_test):.3f} with"
        f" {fit.history['kept'].iloc[-1]:.1%} of the weights"
    )


if __name__ == "__main__":
    main()
