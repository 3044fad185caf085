r"""Whether the grid that stands for a continuous mixture is wide and fine enough for given weights.

Owns `check_end`, `warn_of_end` and `check_spacing`, which warn. Imports torch only. Next:
`mixture_sums.py`.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from pyro_bmr.errors import PyroBMRWarning
from pyro_bmr.formulas.message import Message
from pyro_bmr.formulas.mixture_nodes import GRID_GAP, Nodes, exponent

END = 1e-4  # a grid ends too early for a weight if its widest node has more than this share
# a grid is too coarse for a group if one node has more than this share: the nodes are then two
# standard deviations of the group's posterior over log v apart, and its sum is off by 1 % or more
_ONE_NODE = 0.8
_SUMMED = 1 << 12  # weights at once in an array of all nodes


def check_end(
    delta_f: Tensor, data: Message, prior_var: Tensor, nodes: Nodes, row: Tensor | None
) -> None:
    """Warns of weights for which the grid ends too early: its widest node has more of them than a
    node in the tail of a grid may have.

    Its share follows from ΔF, to the rounding of ΔF. Where that leaves it open the nodes are summed
    again.
    """
    columns = [
        t.expand(delta_f.shape).reshape(-1).double()
        for t in (data.h, data.precision, prior_var, delta_f)
    ]
    h, precision, prior_var, gain = (t[columns[1] > 0] for t in columns)
    rows = None if row is None else row.expand(delta_f.shape).reshape(-1)[columns[1] > 0]
    v, log_w = (
        t[-1] if rows is None else t[-1][rows] for t in (nodes.variances, nodes.log_weights)
    )
    share = (
        log_w
        + 0.5 * ((1 + prior_var * precision) / (1 + v * precision)).log()
        + exponent(h, precision, prior_var, v)
        - gain
    )
    rounding = 8 * torch.finfo(delta_f.dtype).eps * (1 + gain.abs())
    beyond = share > math.log(END)
    for k in ((share - math.log(END)).abs() <= rounding).nonzero()[:, 0].split(_SUMMED):
        beyond[k] = _share_of_widest(
            h[k, None], precision[k, None], nodes, None if rows is None else rows[k]
        ) > math.log(END)
    warn_of_end(int(beyond.sum()), delta_f.numel(), "weights", float(nodes.variances[-1].max()))


def warn_of_end(beyond: int, of: int, what: str, widest: float) -> None:
    """Warns of weights or groups beyond a grid, if there are any."""
    if beyond:
        warnings.warn(
            f"{beyond} of {of} {what} lie where the mixture ends: beyond its widest Gaussian, of"
            f" standard deviation {widest**0.5:.3g}, it falls as a Gaussian and not as the prior it"
            " stands for, so that their ΔF and moments are off; give the mixture wider nodes",
            PyroBMRWarning,
            stacklevel=4,
        )


def check_spacing(weights: Tensor, nodes: Nodes, sizes: Tensor) -> None:
    """Warns of groups whose posterior over the scale is narrower than the distance of the nodes.

    `weights`: (nodes, groups), the probability of each node; `sizes`: entries of each group. Only
    nodes inside of a grid count: a mixture of a few Gaussians far apart is what the prior is, and
    at an end several nodes may be one.
    """
    if not nodes.grid or len(nodes.variances) < 3 or not weights.shape[1]:
        return
    gaps = nodes.variances.clamp(min=1e-300).log().diff()
    near = (gaps > GRID_GAP[0]) & (gaps < GRID_GAP[1])
    inside = torch.zeros_like(nodes.variances, dtype=torch.bool)
    inside[1:-1] = near[1:] & near[:-1]
    share, best = weights.max(0)
    coarse = inside[best] & (share > _ONE_NODE)
    if bool(coarse.any()):
        gap = float(gaps[best[coarse]].max())
        # the posterior of a scale that n weights share has the width √(2/n) in log v
        width = math.sqrt(2 / int(sizes[coarse].max()))
        warnings.warn(
            f"{int(coarse.sum())} of {weights.shape[1]} groups have a posterior narrower than the"
            f" grid of the mixture: its variances are {gap:.3g} apart in their logarithm, where"
            f" the largest of these groups determines it to {width:.3g}; their ΔF and moments are"
            " off; give the mixture nodes as close as that",
            PyroBMRWarning,
            stacklevel=3,
        )


def _share_of_widest(h: Tensor, precision: Tensor, nodes: Nodes, row: Tensor | None) -> Tensor:
    """The logarithm of the widest node's share of each weight, by a sum over all nodes; h and L are
    columns.
    """
    v, log_w = (t[None] if row is None else t.mT[row] for t in (nodes.variances, nodes.log_weights))
    terms = log_w - 0.5 * (1 + v * precision).log() + exponent(h, precision, v[:, -1:], v)
    return terms[:, -1] - terms.logsumexp(1)
