"""The noise of a `MeanField` fit: a normal vector for each step, at a small part of the cost of
drawing one.

Owns `Noise`. Next: `unread_terms.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS_PER_BATCH, _OFFSETS = 32, 1 << 12


class Noise:
    r"""Standard-normal vectors, one per step, as a function of (seed, step).

    A batch of size + 4096 numbers serves 32 steps: each takes the window at a random offset of its
    own, with a random sign. Each step's vector is exactly N(0, I), each of its entries is new in
    every step, and its mean given all earlier steps is exactly 0, so the gradient stays unbiased.
    What the steps of a batch share is the size of a number, at entries that lie the difference of
    their offsets apart.
    """

    def __init__(self, like: Tensor, seed: int) -> None:
        self.size, self.seed, self.number = like.numel(), seed, -1
        self.generator, self.choice = torch.Generator(device=like.device), torch.Generator()
        self.batch = torch.empty(0, dtype=like.dtype, device=like.device)
        self.windows: list[tuple[int, float]] = []

    def release(self) -> None:
        """Frees the memory of the batch until it is drawn again."""
        self.number = -1
        self.batch = self.batch.new_empty(0)

    def at(self, step: int) -> tuple[Tensor, float]:
        """The numbers and the sign of `step`."""
        number, turn = divmod(step, _STEPS_PER_BATCH)
        if number != self.number:
            if len(self.batch) == 0:
                self.batch = self.batch.new_empty(self.size + _OFFSETS)
            self.number = number
            self.choice.manual_seed(2 * (self.seed * 1_000_003 + number))
            self.generator.manual_seed(2 * (self.seed * 1_000_003 + number) + 1)
            self.batch.normal_(generator=self.generator)
            order = torch.randperm(_OFFSETS, generator=self.choice, device="cpu")
            offsets = order[:_STEPS_PER_BATCH].tolist()
            signs = (
                2.0 * torch.randint(2, (_STEPS_PER_BATCH,), generator=self.choice, device="cpu") - 1
            ).tolist()
            self.windows = list(zip(offsets, signs, strict=True))
        offset, sign = self.windows[turn]
        return self.batch[offset : offset + self.size], sign
