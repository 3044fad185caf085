"""A recurrent classifier: a GRU (Cho et al. 2014, arXiv 1406.1078) that reads the rows of an image,
or the points of a curve, one after another.

`--model gru`, or `--model gru:64` for another width. Run it by itself: python models/gru.py
"""

import torch
from torch import Tensor, nn

import pyro_bmr as bmr


class Recurrent(nn.Module):
    """(rows, 1, length, features) or (rows, length) → the logits of the last state."""

    def __init__(self, features: int, width: int, outputs: int) -> None:
        super().__init__()
        self.features = features
        self.gru = nn.GRU(features, width, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x.reshape(x.size(0), -1, self.features))
        return self.head(states[:, -1])


def build(data: bmr.Data, prior: bmr.priors.Prior, sizes: str = "32") -> bmr.BayesianNetwork:
    shape = data.input_shape
    if len(shape) not in (1, 3) or (len(shape) == 3 and shape[0] != 1):
        raise bmr.errors.DataError(
            f"gru: expected images of one channel or curves, got rows of shape {shape}"
        )
    if not sizes.isdecimal() or int(sizes) < 1:
        raise bmr.errors.ModelError(
            f"gru: expected the width of the state, as in gru:64, got gru:{sizes}"
        )
    features = shape[-1] if len(shape) == 3 else 1
    net = Recurrent(features, int(sizes), data.outputs)
    return bmr.BayesianNetwork(net, prior, data.likelihood())


def main() -> None:
    torch.manual_seed(0)
    data = bmr.load("digits")
    fit = bmr.fit(
        build(data, bmr.Gaussian()),
        data,
        epochs=40,
        temperature=0.1,
        reduce=bmr.Every(2, to=bmr.Gaussian(scale=0)),
    )
    prediction = bmr.predict(fit.program, fit.posterior, data.x_test)
    print(
        f"accuracy {bmr.metrics.accuracy(prediction.probs, data.y_test):.3f} with"
        f" {fit.history['kept'].iloc[-1]:.1%} of the weights"
    )


if __name__ == "__main__":
    main()
