r"""Reduction of Gaussian weights to a scale mixture of zero-mean Gaussians (horseshoe, Student-t,
Laplace), exact per weight by quadrature.

Owns `scale_mixture_reduction` (given the mixture), `grouped_reduction` (one local scale shared by a
group) and `best_scale` (the global scale by its evidence). Imports torch only. The mixture comes as
nodes, variances v_k and log weights log w_k with Σ w_k = 1:

    p̃(w) = Σ_k w_k N(w; 0, v_k).

A prior says its nodes by its method `mixture`. Sources: Carvalho, Polson & Scott 2010, Biometrika
97(2) (κ and the ½ rule); Piironen & Vehtari 2017, EJS 11(2) (the slab, which only changes the v_k).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.line_search import line_maximum
from pyro_bmr.formulas.message import Message
from pyro_bmr.formulas.mixture_grid import END, check_end, check_spacing, warn_of_end
from pyro_bmr.formulas.mixture_nodes import (
    exponent,
    mixture_nodes,
    sampled,
    terms_that_count,
    unit_of,
)
from pyro_bmr.formulas.mixture_sums import CHUNK, informed, mixture_sums, silenced

Mixture = Callable[[float], tuple[Any, Any]]  # global scale → (variances, log weights)


class ScaleMixtureReduction(NamedTuple):
    """Per weight: `delta_f` in nats (`grouped_reduction`: per group); `log_odds` = logit κ; reduced
    `mean` and `var`.

    κ = E[1/(1 + L v) | y] is the share of the estimate taken by the prior; a weight is pruned when
    it is above ½, that is, when the log odds are positive.
    """

    delta_f: Tensor
    log_odds: Tensor
    mean: Tensor
    var: Tensor

    @property
    def kappa(self) -> Tensor:
        """κ itself, between 0 and 1."""
        return torch.sigmoid(self.log_odds)


@torch.inference_mode(False)  # whose threads do not have the caller's mode
def scale_mixture_reduction(
    data: Message,
    prior_var: Tensor,
    variances: Any,
    log_weights: Any,
    scale_groups: Tensor | None = None,
) -> ScaleMixtureReduction:
    r"""ΔF, logit κ and reduced moments of weights with prior N(0, σ₀²) when that prior becomes the
    mixture Σ_k w_k N(0, v_k).

    .. math:: \Delta F = \log \sum_k w_k N(m; 0, v_k + 1/L) - \log N(m; 0, \sigma_0^2 + 1/L), \qquad
        \tilde\mu = h\,E\Big[\frac{v}{1 + Lv}\Big], \quad
        \tilde\sigma^2 = E\Big[\frac{v}{1 + Lv}\Big] + h^2\,\mathrm{Var}\Big[\frac{v}{1 + Lv}\Big]

    Exact given the nodes, in one pass over them; no [weights × nodes] array is made. A weight whose
    posterior is wider than its prior (L ≤ 0) has ΔF = 0, κ = 1 and the moments of the mixture
    itself. Beyond its widest node a mixture falls as a Gaussian: where nodes that look like the
    grid of a continuous prior end too early for a weight, a `PyroBMRWarning` says so.

    Args:
        data, prior_var: message and prior variance of each weight, of one shape.
        variances, log_weights: arrays of K nodes; with `scale_groups`, of shape (groups, K).
        scale_groups: which row of the nodes is that of each weight (an integer per weight), where
            global scales differ between groups.

    Raises:
        ReductionError: the nodes are no mixture, or the message is not finite.

    Example:
        >>> data = message(Diagonal(tensor([0.1, 2.0]), tensor([0.5, 0.5])), Diagonal(zeros(2),
        ...     ones(2)))
        >>> # above ½ for the first, below for the second
        >>> scale_mixture_reduction(data, ones(2), *Horseshoe().mixture(0.1)).kappa
        tensor([0.94, 0.38])
    """
    shape = data.h.shape
    prior_var = prior_var.expand(shape)
    unit = unit_of(prior_var)
    if unit != 1:  # v² and h² of very large or small weights would leave the floats
        data, prior_var = (
            Message(data.h * unit, data.precision * unit * unit),
            prior_var / unit / unit,
        )
        variances = np.asarray(variances, dtype=np.float64) / unit / unit
    nodes = mixture_nodes(variances, log_weights, data, scale_groups)
    columns = [
        t.expand(shape).reshape(-1).split(CHUNK) for t in (data.h, data.precision, prior_var)
    ]
    rows = (
        [None] * len(columns[0]) if scale_groups is None else scale_groups.reshape(-1).split(CHUNK)
    )
    out = [torch.empty(shape, dtype=data.h.dtype, device=data.h.device) for _ in range(4)]

    def fill(k: int) -> None:
        sums = mixture_sums(columns[0][k], columns[1][k], columns[2][k], nodes, rows[k])
        values = silenced(sums, columns[1][k], nodes, rows[k])
        for whole, value in zip(out, values, strict=True):
            whole.view(-1)[k * CHUNK : (k + 1) * CHUNK] = value

    # torch's own threads gain nothing on arrays that fit a cache
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(len(rows))))
    delta_f, log_odds, mean, var = out
    if nodes.open_end:
        check_end(delta_f, data, prior_var, nodes, scale_groups)
    return (
        ScaleMixtureReduction(*out)
        if unit == 1
        else ScaleMixtureReduction(delta_f, log_odds, mean * unit, var * unit * unit)
    )


def grouped_reduction(
    data: Message, prior_var: Tensor, variances: Any, log_weights: Any, groups: Tensor
) -> ScaleMixtureReduction:
    r"""The same when all weights of a group share one local scale: the nodes stand for the group's
    scale, given which its weights are independent.

    .. math:: \Delta F_g = \log \sum_k w_k \prod_{i \in g} \frac{N(m_i; 0, v_k + 1/L_i)}{N(m_i; 0,
        \sigma_{0i}^2 + 1/L_i)}

    `groups`: an integer from 0 for each weight. `delta_f` has one entry per group; κ is the mean
    over a group's weights, and each weight has its group's log odds. In double precision inside.
    The posterior of a scale that n weights share is narrow, 1/√(2n) in its logarithm: give nodes as
    close as that, `mixture(scale, together=n)` of the priors here. Of many nodes those that no
    group favours are passed over. If nodes that look like the grid of a continuous prior are too
    far apart for a group, a `PyroBMRWarning` says so.
    """
    shape, dtype, index = data.h.shape, data.h.dtype, groups.reshape(-1)
    data = Message(*informed(*(t.expand(shape).reshape(-1).double() for t in data)))
    (h, precision), prior_var = data, prior_var.expand(shape).reshape(-1).double()
    count = int(index.max()) + 1 if index.numel() else 0
    nodes = mixture_nodes(variances, log_weights, data, groups=index)

    def by_group(each: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=h.device).index_add_(0, index, each)

    def log_terms(some: Tensor) -> Tensor:
        v = nodes.variances[some, None]
        each = exponent(h, precision, nodes.variances[-1], v) - 0.5 * torch.log1p(v * precision)
        summed = torch.zeros(len(some), count, dtype=torch.float64, device=h.device)
        return summed.index_add_(1, index, each) + nodes.log_weights[some, None]

    evidence = terms_that_count(log_terms, len(nodes.variances), count, h)
    weights = evidence.softmax(0)
    delta_f = evidence.logsumexp(0) + by_group(
        0.5 * torch.log1p(prior_var * precision)
        + exponent(h, precision, prior_var, nodes.variances[-1])
    )
    if nodes.open_end:
        warn_of_end(int((weights[-1] > END).sum()), count, "groups", float(nodes.variances[-1]))
    members = torch.bincount(index, minlength=count)
    check_spacing(weights, nodes, members)
    kept, mean_away, square_away = (torch.zeros_like(h) for _ in range(3))
    best = nodes.variances[weights.argmax(0)][index]
    near = 1 / (1 + best * precision)
    for k in (weights > 1e-14).any(1).nonzero().flatten().tolist() if count else ():
        p, v = weights[k][index], float(nodes.variances[k])
        shrunk = 1 / (1 + v * precision)
        away = (v - best) * shrunk * near  # v/(1 + vL), counted from the likeliest node
        kept += p * shrunk
        mean_away += p * away
        square_away += p * away.square()
    mean_share = best * near + mean_away
    kappa, taken = (by_group(x) / members for x in (kept, precision * mean_share))
    var = mean_share + h.square() * (square_away - mean_away.square()).clamp(min=0)
    rest = (kappa.log() - taken.log())[index], h * mean_share, var
    return ScaleMixtureReduction(delta_f.to(dtype), *(x.view(shape).to(dtype) for x in rest))


def best_scale(
    data: Message,
    prior_var: Tensor,
    mixture: Mixture,
    log_hyper: Callable[[float], float],
    scale_groups: Tensor | None = None,
    groups: Tensor | None = None,
    gain: Callable[[Message, Tensor, float], Tensor] | None = None,
) -> Tensor:
    r"""The global scale τ that maximises Σ ΔF(τ) + log p(τ), to 1e-3 in log τ: one number, or one
    for each of `scale_groups`.

    Searched from e⁻¹² to e³ times the root mean square of the priors' scales. Of a layer with more
    than 8,192 weights that many at equal distances stand for all, of a group 512: one number needs
    no more. With `groups`, weights that share a local scale, all count. `gain`: ΔF of each weight
    in closed form, given the message, the prior's variance and the scale, where there is one.
    """
    h, precision, var = (
        t.expand(data.h.shape).reshape(-1) for t in (data.h, data.precision, prior_var)
    )
    if groups is not None and scale_groups is not None:
        raise ReductionError(
            "best_scale: expected scale_groups or groups, got both; give one of the two"
        )
    n, rows = h.numel(), None if scale_groups is None else scale_groups.reshape(-1)
    count = 1 if rows is None else int(rows.max()) + 1
    index = torch.zeros(n, dtype=torch.long, device=h.device) if rows is None else rows
    sizes = torch.bincount(index, minlength=count).double()
    if groups is None:
        taken = sampled(rows, n, h.device)
        h, precision, var, index = h[taken], precision[taken], var[taken], index[taken]
    # each sampled weight stands for so many
    factor = sizes / torch.bincount(index, minlength=count)

    def sums(scales: list[float]) -> Tensor:
        if groups is not None:
            given = grouped_reduction(Message(h, precision), var, *mixture(scales[0]), groups)
            return given.delta_f.double().sum()[None]
        if gain is not None and rows is None:
            each = gain(Message(h, precision), var, scales[0])
            return factor * each.sum(dtype=torch.float64)[None]
        mixtures = [mixture(s) for s in scales]
        each = _gains(Message(h, precision), var, mixtures, None if rows is None else index)
        total = torch.zeros(count, dtype=torch.float64, device=h.device)
        return factor * total.index_add_(0, index, each)

    def objective(log_scale: Tensor) -> Tensor:
        scales = log_scale.exp().tolist()
        return sums(scales) + torch.tensor(
            [log_hyper(s) for s in scales], dtype=torch.float64, device=h.device
        )

    centre = torch.full(
        (count,), math.log(float(var.double().mean().sqrt())), dtype=torch.float64, device=h.device
    )
    scale = line_maximum(objective, centre - 12, centre + 3).exp()
    return scale if rows is not None else scale[0]


def _gains(
    data: Message, var: Tensor, mixtures: list[tuple[Any, Any]], index: Tensor | None
) -> Tensor:
    """ΔF of each weight in float64; `index`: the number of its mixture, None if there is one."""
    unit = unit_of(var)
    v, log_w = mixtures[0] if index is None else zip(*mixtures, strict=True)
    scaled = Message(data.h * unit, data.precision * unit**2)
    nodes = mixture_nodes(np.asarray(v) / unit**2, log_w, scaled, index)
    columns = [t.split(CHUNK) for t in (*scaled, var / unit**2)]
    rows = [None] * len(columns[0]) if index is None else index.split(CHUNK)
    return torch.cat(
        [
            mixture_sums(h, precision, prior_var, nodes, row, moments=False)[0].double()
            for h, precision, prior_var, row in zip(*columns, rows, strict=True)
        ]
    )
