"""Speech that espeak-ng makes, as the spectrograms that resemblyzer reads.

Owns `utterances` and `equal_error_rate`. `apt-get install espeak-ng` brings the voices.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

RATE, WINDOW, HOP, BANDS, FRAMES = 16_000, 400, 160, 40, 160  # resemblyzer's


def voices() -> list[str]:
    """The variants of espeak-ng, in the order of their names."""
    said = subprocess.run(
        ["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True
    ).stdout
    return sorted(set(re.findall(r"!v/([A-Za-z0-9_]+)\s*$", said, re.MULTILINE)))


def utterances(names: Sequence[str], texts: Sequence[str], each: int) -> tuple[Tensor, Tensor]:
    """(rows, FRAMES, BANDS) and the number of the voice of each row: `each` texts for each voice,
    from its first sound on.
    """
    rows, of = [], []
    for number, name in enumerate(names):
        for k in range(each):
            text = texts[(number * each + k) % len(texts)]
            spectrogram = _spectrogram(_spoken(name, text))
            if len(spectrogram) >= FRAMES:
                rows.append(spectrogram[:FRAMES])
                of.append(number)
    return torch.stack(rows), torch.tensor(of)


def _spoken(name: str, text: str) -> Tensor:
    """Sound at 16 kHz with a level of −30 dB, from its first loud sample on."""
    call = ["espeak-ng", "-v", f"en+{name}", "--stdout", text]
    file = subprocess.run(call, capture_output=True, check=True).stdout
    rate = int.from_bytes(file[24:28], "little")  # of a WAV file, whose samples begin at byte 44
    sound = resample_poly(np.frombuffer(file[44:], "<i2") / 2**15, RATE, rate)
    loud = np.flatnonzero(np.abs(sound) > 0.02)
    sound = torch.from_numpy(sound[loud[0] :] if len(loud) else sound).float()
    return sound * 10 ** (-30 / 20) / sound.square().mean().sqrt().clamp(min=1e-6)


def _spectrogram(sound: Tensor) -> Tensor:
    """Power in mel bands, (frames, BANDS)."""
    window = torch.hann_window(WINDOW)
    power = torch.stft(sound, WINDOW, HOP, window=window, return_complex=True).abs().square()
    return (_bands() @ power).mT


def _bands() -> Tensor:
    """Triangles of equal area on Slaney's scale: linear up to 1 kHz, logarithmic above."""
    step = np.log(6.4) / 27
    top = 15 + np.log(RATE / 2 / 1000) / step
    marks = np.linspace(0, top, BANDS + 2)
    edges = torch.from_numpy(
        np.where(marks < 15, 200 / 3 * marks, 1000 * np.exp(step * (marks - 15)))
    )
    at = torch.linspace(0, RATE / 2, WINDOW // 2 + 1).double()
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangle = torch.minimum((at - low) / (mid - low), (high - at) / (high - mid)).clamp(min=0)
    return (triangle * 2 / (high - low)).float()


def equal_error_rate(similarities: Tensor, same: Tensor) -> float:
    """Where as many pairs of one voice are below a limit as pairs of two voices above it."""
    order = similarities.argsort(descending=True)
    hits = same[order].double().cumsum(0) / same.sum()
    alarms = (~same[order]).double().cumsum(0) / (~same).sum()
    k = int((1 - hits - alarms).abs().argmin())
    return float((1 - hits[k] + alarms[k]) / 2)
