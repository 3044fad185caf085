"""A vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) on images padded to whole
patches: `--model vit`, `--model vit:paper`.

Other sizes are set by `--model vit:PATCH-DIM-DEPTH-HEADS-RATIO`, where RATIO is the width of the
hidden layer over DIM. Run it by itself: python models/vit.py
"""

import torch
from torch import Tensor, nn

import pyro_bmr as bmr

PRESETS = {"small": "4-32-2-4-2", "paper": "4-256-6-8-2"}


def pad_to(
    shape: tuple[int, int, int], patch: int, side: int | None = None
) -> tuple[nn.Module, int]:
    """A layer that pads images with zeros to whole patches, or to `side`; the number of patches."""
    height, width = (side or -(-size // patch) * patch for size in shape[1:])
    top, left = (height - shape[1]) // 2, (width - shape[2]) // 2
    pad = nn.ZeroPad2d((left, width - shape[2] - left, top, height - shape[1] - top))
    patches = (height // patch) * (width // patch)
    return (pad if (height, width) != shape[1:] else nn.Identity()), patches


class ViT(nn.Module):
    """Patches → tokens with a class token in front → encoder → the logits of the class token."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        ratio: int,
        outputs: int,
        side: int | None = None,
    ) -> None:
        super().__init__()
        self.pad, tokens = pad_to(shape, patch, side)
        self.patch = nn.Conv2d(shape[0], dim, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens + 1, dim))
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

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(self.pad(x)).flatten(2).transpose(1, 2)
        token = self.token.expand(x.size(0), -1, -1)
        tokens = torch.cat([token, patches], 1) + self.position
        return self.head(self.norm(self.encoder(tokens))[:, 0])


def build(data: bmr.Data, prior: bmr.priors.Prior, sizes: str = "small") -> bmr.BayesianNetwork:
    shape = data.input_shape
    if len(shape) != 3:
        raise bmr.errors.DataError(
            f"vit: expected images (channels, height, width), got rows of shape {shape}"
        )
    words = PRESETS.get(sizes, sizes).split("-")
    numbers = [int(word) if word.isdecimal() else 0 for word in words]
    if len(numbers) != 5 or min(numbers) < 1:
        raise bmr.errors.ModelError(
            f"vit: expected {', '.join(PRESETS)} or five numbers, as in vit:{PRESETS['small']}, got"
            f" vit:{sizes}"
        )
    patch, dim, depth, heads, ratio = numbers
    if dim % heads:
        raise bmr.errors.ModelError(
            f"vit: expected a dimension that is a multiple of the number of heads, {heads}, got"
            f" {dim} in vit:{sizes}"
        )
    side = 32 if sizes == "paper" else None
    net = ViT(shape, patch, dim, depth, heads, ratio, data.outputs, side)
    return bmr.BayesianNetwork(net, prior, data.likelihood())


def main() -> None:
    torch.manual_seed(0)
    data = bmr.load("digits")
    fit = bmr.fit(
        build(data, bmr.Gaussian(), "2-32-2-4-2"),
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
