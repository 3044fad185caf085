r"""Which weights stay under a spike-and-slab prior whose inclusion probability is learned from the weights themselves.

Owns the two answers, `mean_field_inclusion` (cheap, any size) and `exact_inclusion` (a one-dimensional integral). Imports torch only.
Given is each weight's ΔF_i, the log of r_i = p(y | w_i = 0) / p(y | w_i in the slab), in nats:

    p(w_i) = π slab(w_i) + (1 − π) spike(w_i),   π ~ Beta(α₀, β₀),   evidence gain = log E_π[ ∏ᵢ (π + (1 − π) rᵢ) ].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_QUADRATURE_NODES = 257
_TAIL_NATS = 40.0  # the integrand is followed on each side until it has fallen by this much


class Inclusion(NamedTuple):
    """`probability`: of each weight being in the slab, the shape of ΔF. `log_evidence_gain`: of the whole layer over all slab, nats.
    `log_odds`: ζ, the ΔF above which a weight goes; for the exact answer, that of a weight whose probability is ½ given the posterior mean of π."""

    probability: Tensor
    log_evidence_gain: Tensor
    log_odds: Tensor


def mean_field_inclusion(delta_f: Tensor, alpha: float = 1.0, beta: float = 1.0, tolerance: float = 1e-6, max_iterations: int = 500) -> Inclusion:
    r"""The fixed point of the mean-field update over inclusion and π, started at even odds (ζ = 0); the gain is its lower bound.

    .. math:: \rho_i = \sigma(\zeta - \Delta F_i), \quad \zeta = \psi(\alpha_0 + \textstyle\sum\rho) - \psi(\beta_0 + \sum(1 - \rho))

    Source: Marković, Friston & Kiebel 2024, IEEE Access 12 (arXiv 2309.12095), there with four rounds instead of convergence.
    """
    d = delta_f.flatten()
    zeta = d.new_zeros(())
    for _ in range(max_iterations):
        included = torch.sigmoid(zeta - d).sum()
        a, b = alpha + included, beta + d.numel() - included
        updated = torch.digamma(a) - torch.digamma(b)
        done = bool((updated - zeta).abs() <= tolerance * (1 + updated.abs()))
        zeta = updated
        if done:
            break
    total = torch.digamma(a + b)
    log_slab, log_spike = torch.digamma(a) - total, torch.digamma(b) - total
    fit = torch.logaddexp(log_slab.expand_as(d), log_spike + d).sum()
    a0, b0 = d.new_tensor(alpha), d.new_tensor(beta)
    kl = _log_beta(a0, b0) - _log_beta(a, b) + (a - a0) * log_slab + (b - b0) * log_spike
    return Inclusion(torch.sigmoid(zeta - delta_f), fit - kl, zeta)


def exact_inclusion(delta_f: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Inclusion:
    r"""Inclusion probabilities E[π / (π + (1 − π) rᵢ) | y] and log evidence gain by quadrature over logit π.

    The integrand in t = logit π is analytic and falls at least as fast as exp(−min(α, β)|t|), so the trapezoid rule converges
    exponentially; against enumeration over all 2ⁿ subsets the error is below 1e-10. Cost: 257 passes over the weights.
    """
    d = delta_f.flatten().double()

    def log_integrand(t: Tensor) -> Tensor:
        log_pi, log_not = torch.nn.functional.logsigmoid(t), torch.nn.functional.logsigmoid(-t)
        terms = torch.stack([torch.logaddexp(lp.expand_as(d), ln + d).sum() for lp, ln in zip(log_pi, log_not, strict=True)])
        return terms + alpha * log_pi + beta * log_not  # the Jacobian π(1 − π) is in the exponents

    nodes = _support(log_integrand, d)
    log_weights = log_integrand(nodes)
    log_mass = log_weights.logsumexp(0)
    step = (nodes[1] - nodes[0]).log()
    gain = log_mass + step - _log_beta(d.new_tensor(alpha), d.new_tensor(beta))
    weights = (log_weights - log_mass).exp()
    probability = torch.zeros_like(d)
    for t, weight in zip(nodes, weights, strict=True):
        probability += weight * torch.sigmoid(t - d)
    mean_pi = (weights * torch.sigmoid(nodes)).sum()
    return Inclusion(probability.view_as(delta_f).to(delta_f.dtype), gain.to(delta_f.dtype), torch.logit(mean_pi).to(delta_f.dtype))


def _support(log_integrand, d: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Equidistant nodes over the part of the line where the integrand is within exp(−40) of its peak, however narrow that is."""
    low, high = -200.0, 200.0
    for _ in range(12):
        nodes = torch.linspace(low, high, 65, dtype=d.dtype, device=d.device)
        values = log_integrand(nodes)
        inside = (values > values.max() - _TAIL_NATS).nonzero().flatten()
        first, last = max(int(inside[0]) - 1, 0), min(int(inside[-1]) + 1, 64)
        low, high = float(nodes[first]), float(nodes[last])
        if last - first > 32:
            break
    return torch.linspace(low, high, _QUADRATURE_NODES, dtype=d.dtype, device=d.device)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
