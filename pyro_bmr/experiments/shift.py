"""Scores of predictions away from the training distribution: on corrupted test images of five
severities, and on images of another data set.

Owns the corruptions (`CORRUPTIONS`, `corrupted`) and `shifted_scores`. The protocol follows
Hendrycks & Dietterich 2019 (arXiv 1903.12261) and Ovadia et al. 2019 (arXiv 1906.02530); the
corruptions here are simpler, and their levels the library's own, for small images. Next:
`recipe.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_bmr.checks import check_tensor
from pyro_bmr.data.data_set import Data
from pyro_bmr.data.named import load, sources
from pyro_bmr.errors import DataError, described
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.predict import ClassPrediction, Prediction

Corruption = Callable[[Tensor, float, torch.Generator], Tensor]
_OTHERS = {"fashion-mnist": "mnist", "mnist": "fashion-mnist"}
_ROWS = 2000


def _noise(x: Tensor, level: float, generator: torch.Generator) -> Tensor:
    return x + level * torch.randn(x.shape, generator=generator, device=generator.device)


def _blur(x: Tensor, level: float, generator: torch.Generator) -> Tensor:
    width = level * x.shape[2]
    radius = math.ceil(3 * width)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / width).square())
    kernel = kernel / kernel.sum()
    flat = x.flatten(0, 1)[:, None]
    rows = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))
    return F.conv2d(
        F.pad(rows, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1)
    ).view_as(x)


def _contrast(x: Tensor, level: float, generator: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + (1 - level) * (x - mean)


def _brightness(x: Tensor, level: float, generator: torch.Generator) -> Tensor:
    return x + level


def _rotation(x: Tensor, level: float, generator: torch.Generator) -> Tensor:
    angle = math.radians(level) * _signs(len(x), generator)
    zero = torch.zeros_like(angle)
    return _moved(
        x,
        torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1).view(
            -1, 2, 3
        ),
    )


def _translation(x: Tensor, level: float, generator: torch.Generator) -> Tensor:
    across, down = (2 * level * _signs(len(x), generator) for _ in range(2))  # the grid is 2 wide
    one, zero = torch.ones_like(across), torch.zeros_like(across)
    return _moved(x, torch.stack([one, zero, across, zero, one, down], 1).view(-1, 2, 3))


def _pixel_dropout(x: Tensor, level: float, generator: torch.Generator) -> Tensor:
    gone = torch.rand(len(x), 1, *x.shape[2:], generator=generator, device=generator.device) < level
    return torch.where(gone, x.amin((2, 3), keepdim=True), x)


def _occlusion(x: Tensor, level: float, generator: torch.Generator) -> Tensor:
    height, width = x.shape[2:]
    centre = 0.25 + 0.5 * torch.rand(len(x), 2, 1, generator=generator, device=generator.device)
    down, across = ((torch.arange(size) + 0.5) / size for size in (height, width))
    inside = ((down - centre[:, 0]).abs() < level / 2)[:, :, None] & (
        (across - centre[:, 1]).abs() < level / 2
    )[:, None]
    return torch.where(inside[:, None], x.mean((2, 3), keepdim=True), x)


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, float, float, float, float]]] = {
    "gaussian-noise": (_noise, (0.2, 0.4, 0.6, 0.8, 1.0)),
    "blur": (_blur, (0.03, 0.045, 0.06, 0.08, 0.1)),
    "contrast": (_contrast, (0.2, 0.4, 0.55, 0.7, 0.8)),
    "brightness": (_brightness, (0.2, 0.4, 0.6, 0.8, 1.0)),
    "rotation": (_rotation, (10.0, 20.0, 30.0, 40.0, 50.0)),
    "translation": (_translation, (0.03, 0.06, 0.09, 0.12, 0.15)),
    "pixel-dropout": (_pixel_dropout, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "occlusion": (_occlusion, (0.15, 0.25, 0.35, 0.45, 0.55)),
}
"""Name → what it does, and its level at severities 1 … 5. Units: noise and brightness, the standard
deviation of the training pixels; blur (its scale) and translation (in both directions), the height
or width of the image; contrast, the fraction of it that is lost; rotation, degrees; pixel dropout,
the probability that a pixel has the least value of its image; occlusion, the side of a square with
the mean of its image, in parts of the image's.
"""


def corrupted(x: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """The images `x` (n, channels, height, width), standardised, with one of the `CORRUPTIONS` at a
    severity from 1 to 5. What is random about an image (noise, direction, place) follows from the
    seed and is the same at all severities.

    Raises:
        DataError: `x` is no tensor of images, or there is no such corruption or severity.
    """
    check_tensor(x, "corrupted: x")
    if x.ndim != 4 or not x.is_floating_point():
        raise DataError(
            "corrupted: expected images (n, channels, height, width) of floating numbers, got"
            f" {x.dtype} of shape {tuple(x.shape)}"
        )
    if name not in CORRUPTIONS:
        raise DataError(f"no corruption '{name}'; the corruptions are: {', '.join(CORRUPTIONS)}")
    corruption, levels = CORRUPTIONS[name]
    if not isinstance(severity, int) or not 1 <= severity <= len(levels):
        raise DataError(
            f"severity: expected a whole number from 1 to {len(levels)}, got {described(severity)}"
        )
    return corruption(x, levels[severity - 1], torch.Generator().manual_seed(seed))


def shifted_scores(
    predict: Callable[[Tensor], Prediction], data: Data, *, rows: int = _ROWS, seed: int = 0
) -> dict[str, float]:
    """Scores of a prediction under shift, on `rows` test images that the seed draws.

    - shift_nll_1 … shift_nll_5, shift_ece_1 … shift_ece_5: negative log likelihood (nats per image)
      and expected calibration error (20 bins of equal mass) at each severity, each the mean over
      the `CORRUPTIONS`;
    - ood_auroc: by how well the predictive entropy tells test images from those of another data
      set, as `metrics.auroc`: Fashion-MNIST from MNIST and the other way round, if both are
      installed. The other images are standardised by the moments of the training images.

    What has no meaning for the data is NaN: all of it without classes or images, the last one for
    other data sets.
    """
    names = [
        f"shift_{measure}_{severity}" for measure in ("nll", "ece") for severity in range(1, 6)
    ] + ["ood_auroc"]
    scores = dict.fromkeys(names, math.nan)
    if data.classes is None or data.x_test.ndim != 4:
        return scores
    index = torch.randperm(
        len(data.x_test), generator=torch.Generator().manual_seed(seed), device="cpu"
    )[:rows]
    x, y = data.x_test[index], data.y_test[index]
    for severity in range(1, 6):
        nll, ece = 0.0, 0.0
        for name in CORRUPTIONS:
            prediction = _classes(predict(corrupted(x, name, severity, seed)))
            nll -= float(prediction.log_prob(y).double().mean()) / len(CORRUPTIONS)
            ece += metrics.ece(prediction.probs, y, 20, "mass") / len(CORRUPTIONS)
        scores[f"shift_nll_{severity}"], scores[f"shift_ece_{severity}"] = nll, ece
    other = _other_images(data, rows, seed)
    if other is not None:
        inside, outside = (
            metrics.predictive_entropy(_classes(predict(images)).probs) for images in (x, other)
        )
        scores["ood_auroc"] = metrics.auroc(inside, outside)
    return scores


def _other_images(data: Data, rows: int, seed: int) -> Tensor | None:
    """Test images of the other data set on the scale of `data`; None if there are none of its
    shape. Both sets have pixels from 0 to 255, so that the least and the largest value of the
    training images fix the map from one standardisation to the other.
    """
    name = _OTHERS.get(data.name.split(" ")[0])
    if name is None or not sources()[name].installed():
        return None
    other = load(name)
    if other.x_test.shape[1:] != data.x_test.shape[1:]:
        return None
    index = torch.randperm(
        len(other.x_test), generator=torch.Generator().manual_seed(seed), device="cpu"
    )[:rows]
    (low, high), (own_low, own_high) = (
        images.aminmax() for images in (other.x_train, data.x_train)
    )
    return own_low + (other.x_test[index] - low) * ((own_high - own_low) / (high - low))


def _classes(prediction: Prediction) -> ClassPrediction:
    if not isinstance(prediction, ClassPrediction):
        raise DataError(
            f"shifted_scores: expected predictions of classes, got {type(prediction).__name__}"
        )
    return prediction


def _signs(rows: int, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, (rows,), generator=generator, device=generator.device) - 1


def _moved(x: Tensor, maps: Tensor) -> Tensor:
    """The images under affine maps of their coordinates, bilinear; what comes in from outside has
    the least value of the image.
    """
    low = x.amin((2, 3), keepdim=True)
    return low + F.grid_sample(
        x - low, F.affine_grid(maps.to(x), list(x.shape), align_corners=False), align_corners=False
    )
