"""A causal transformer over a sequence, the rows of an image or the points of a curve: `--model
transformer`.

Each token attends to those before it; the last one is classified. Other sizes are set by `--model
transformer:DIM-DEPTH-HEADS-RATIO`. Run it by itself: python models/transformer.py
"""

import torch
from torch import Tensor, nn

import pyro_bmr as bmr


class CausalTransformer(nn.Module):
    """(rows, 1, length, features) or (rows, length) → the logits of the last token."""

    def __init__(
        self, length: int, features: int, dim: int, depth: int, heads: int, ratio: int, outputs: int
    ) -> None:
        super().__init__()
        self.features = features
        self.embedding = nn.Linear(features, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, length, dim))
        layer = nn.TransformerEncoderLayer(
            dim,
            heads,
            ratio * dim,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, outputs)
        self.register_buffer("future", torch.ones(length, length, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x.reshape(x.size(0), -1, self.features)) + self.position
        return self.head(self.norm(self.encoder(x, mask=self.future))[:, -1])


def build(data: bmr.Data, prior: bmr.priors.Prior, sizes: str = "32-2-4-2") -> bmr.BayesianNetwork:
    shape = data.input_shape
    if len(shape) not in (1, 3) or (len(shape) == 3 and shape[0] != 1):
        raise bmr.errors.DataError(
            f"transformer: expected images of one channel or curves, got rows of shape {shape}"
        )
    numbers = [int(word) if word.isdecimal() else 0 for word in sizes.split("-")]
    if len(numbers) != 4 or min(numbers) < 1 or numbers[0] % numbers[2]:
        raise bmr.errors.ModelError(
            "transformer: expected dimension, depth, heads (a divisor of the dimension) and ratio,"
            f" as in transformer:32-2-4-2, got transformer:{sizes}"
        )
    length, features = (shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1)
    dim, depth, heads, ratio = numbers
    net = CausalTransformer(length, features, dim, depth, heads, ratio, data.outputs)
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
