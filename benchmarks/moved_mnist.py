"""MNIST with every training image at five places, one pixel to each side: `python
benchmarks/moved_mnist.py`, for `study_mnist_moved.toml`.

Writes results/mnist-moved.npz: 300,000 training images, the copies of one place after those of
another, and the test images as they are. With `--held-out` a sixth of the images, drawn once and
for all, is x_val, as it is, no copy of it is trained on, and the file is
results/mnist-moved-held-out.npz.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import pyro_bmr as bmr

OUT = Path("results")


def moved(images: np.ndarray) -> np.ndarray:
    """The images (n, channels, height, width) as they are, then one pixel to the left, right, up
    and down, 0 coming in: (5n, channels, height, width).
    """
    height, width = images.shape[2:]
    framed = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    corners = ((1, 1), (1, 2), (1, 0), (2, 1), (0, 1))
    return np.concatenate(
        [framed[:, :, top : top + height, left : left + width] for top, left in corners]
    )


def grey(x: np.ndarray) -> np.ndarray:
    """Grey values 0 … 255 of images whose least value is black and whose greatest is white."""
    return np.round((x - x.min()) / (x.max() - x.min()) * 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--held-out", action="store_true")
    data = bmr.load("mnist")
    x, y = grey(data.x_train.numpy()), data.y_train.numpy()
    arrays = {"x_test": grey(data.x_test.numpy()), "y_test": data.y_test.numpy()}
    name = "mnist-moved.npz"
    if parser.parse_args().held_out:
        name = "mnist-moved-held-out.npz"
        order = np.random.default_rng(0).permutation(len(x))
        held, rest = order[: len(x) // 6], order[len(x) // 6 :]
        arrays |= {"x_val": x[held], "y_val": y[held]}
        x, y = x[rest], y[rest]
    OUT.mkdir(exist_ok=True)
    np.savez(OUT / name, x_train=moved(x), y_train=np.tile(y, 5), **arrays)


if __name__ == "__main__":
    main()
