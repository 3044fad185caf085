r"""What the data said of each weight, as a Gaussian factor, and ΔF from it.

Owns `Message`, `message` and `log_evidence_ratio`. Imports torch only. Next: `covariance.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.formulas.diagonal import diagonals, rounded
from pyro_bmr.formulas.ratios import Ratios, gain


class Message(NamedTuple):
    """What the data said of each weight, as the Gaussian factor exp(h w − ½ L w²) in w = θ − η."""

    h: Tensor
    precision: Tensor  # L


def message(q: Any, p: Any, about: Tensor | float | None = None) -> Message:
    r"""The data's factor in the posterior: L = P − Π and h = P(μ − η), for weights counted from the
    prior mean.

    `about`: another point e from which they are counted; then h = P(μ − e) + Π(e − η), which is the
    same factor in w = θ − e.

    Raises:
        ReductionError: as `delta_f`, or the message is outside the range of its dtype.
    """
    dtype, q, p, _ = diagonals(q, p, p)
    precision = (p.var - q.var) / p.var / q.var
    h = (q.mean - (p.mean if about is None else about)) / q.var
    h = h if about is None else h + (about - p.mean) / p.var
    return Message(
        rounded(h.to(dtype), dtype, "the message"),
        rounded(precision.to(dtype), dtype, "the message"),
    )


def log_evidence_ratio(
    data: Message, prior_var: Tensor, reduced_var: Tensor, shift: Tensor | float = 0.0
) -> Tensor:
    r"""ΔF per element between N(0, σ₀²) and N(e, v) given the message exp(h w − ½ L w²); safe at v
    = 0.

    .. math:: \Delta F = -\tfrac12 \log\frac{1 + vL}{1 + \sigma_0^2 L}
        + \frac{h^2 (v - \sigma_0^2)}{2 (1 + vL)(1 + \sigma_0^2 L)} + \frac{2he - Le^2}{2 (1 + vL)}

    Where the posterior is wider than its prior (L ≤ 0) the data said nothing: the message counts as
    h = L = 0 unless v = 0, which needs no L. A message of large means and small variances, h ≈ Le,
    has lost what `delta_f` sees in the moments themselves.
    """
    h, precision, p, v, e = (
        torch.as_tensor(t, device=data.h.device).double()
        for t in (*data, prior_var, reduced_var, shift)
    )
    silent = (precision <= 0) & (v > 0)
    h, precision = h.masked_fill(silent, 0.0), precision.masked_fill(silent, 0.0)
    full, root = 1 + p * precision, p.sqrt()  # p/s
    at_e = (p * (h - e * precision) - e) / (full * root)  # (μ − e)/√p
    return gain(
        Ratios(1 / full, p * precision / full, v / p, (p - v) / p, h * root / full, e / root, at_e)
    ).to(data.h.dtype)
