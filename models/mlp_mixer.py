"""An MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601) on images padded to whole patches:
`--model mlp_mixer`, `--model mlp_mixer:paper`.

Other sizes are set by `--model mlp_mixer:PATCH-DIM-DEPTH-TOKEN-CHANNEL`. The last two are the
widths of the hidden layers over tokens and over channels. Run it by itself: python
models/mlp_mixer.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyro_bmr as bmr

PRESETS = {"small": "4-32-2-32-64", "paper": "4-256-6-512-512"}


def pad_to(
    shape: tuple[int, int, int], patch: int, side: int | None = None
) -> tuple[nn.Module, int]:
    """A layer that pads images with zeros to whole patches, or to `side`; the number of patches."""
    height, width = (side or -(-size // patch) * patch for size in shape[1:])
    top, left = (height - shape[1]) // 2, (width - shape[2]) // 2
    pad = nn.ZeroPad2d((left, width - shape[2] - left, top, height - shape[1] - top))
    patches = (height // patch) * (width // patch)
    return (pad if (height, width) != shape[1:] else nn.Identity()), patches


class MixerBlock(nn.Module):
    """A hidden layer over the tokens of each channel, then one over the channels of each token.

    Each follows a norm, and its output is added to its input.
    """

    def __init__(self, tokens: int, dim: int, token_width: int, channel_width: int) -> None:
        super().__init__()
        self.norm_tokens = nn.LayerNorm(dim)
        self.tokens_in = nn.Linear(tokens, token_width)
        self.tokens_out = nn.Linear(token_width, tokens)
        self.norm_channels = nn.LayerNorm(dim)
        self.channels_in = nn.Linear(dim, channel_width)
        self.channels_out = nn.Linear(channel_width, dim)

    def forward(self, x: Tensor) -> Tensor:
        by_channel = self.norm_tokens(x).transpose(1, 2)
        x = x + self.tokens_out(F.gelu(self.tokens_in(by_channel))).transpose(1, 2)
        return x + self.channels_out(F.gelu(self.channels_in(self.norm_channels(x))))


class Mixer(nn.Module):
    """Patches → tokens → blocks → the logits of the mean token."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        patch: int,
        dim: int,
        depth: int,
        widths: tuple[int, int],
        outputs: int,
        side: int | None = None,
    ) -> None:
        super().__init__()
        self.pad, tokens = pad_to(shape, patch, side)
        self.patch = nn.Conv2d(shape[0], dim, patch, patch)
        self.blocks = nn.Sequential(*(MixerBlock(tokens, dim, *widths) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(self.pad(x)).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def build(data: bmr.Data, prior: bmr.priors.Prior, sizes: str = "small") -> bmr.BayesianNetwork:
    shape = data.input_shape
    if len(shape) != 3:
        raise bmr.errors.DataError(
            f"mlp_mixer: expected images (channels, height, width), got rows of shape {shape}"
        )
    words = PRESETS.get(sizes, sizes).split("-")
    numbers = [int(word) if word.isdecimal() else 0 for word in words]
    if len(numbers) != 5 or min(numbers) < 1:
        raise bmr.errors.ModelError(
            f"mlp_mixer: expected {', '.join(PRESETS)} or five numbers, as in"
            f" mlp_mixer:{PRESETS['small']}, got mlp_mixer:{sizes}"
        )
    patch, dim, depth, tokens, channels = numbers
    side = 32 if sizes == "paper" else None
    net = Mixer(shape, patch, dim, depth, (tokens, channels), data.outputs, side)
    return bmr.BayesianNetwork(net, prior, data.likelihood())


def main() -> None:
    torch.manual_seed(0)
    data = bmr.load("digits")
    fit = bmr.fit(
        build(data, bmr.Gaussian(), "2-32-2-32-64"),
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
