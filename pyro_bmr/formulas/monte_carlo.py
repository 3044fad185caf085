r"""Reduction between any two priors from draws of the posterior, Pareto-smoothed, with the
diagnostic k̂ of its own reliability.

Owns `monte_carlo_delta_f`, `pareto_smoothed` and `log_density`. Imports torch and numpy only. The
draws may come from a guide, from NUTS, or from elsewhere: the law ΔF = log E_q[p̃/p] asks for
nothing but an expectation. It fails where q hardly ever visits what p̃ favours, and k̂ says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError, described, warn
from pyro_bmr.formulas.mixture_grid import END, warn_of_end
from pyro_bmr.formulas.mixture_nodes import is_open_grid

_TRUSTED = 0.7


class MonteCarlo(NamedTuple):
    """`delta_f` in nats; its `standard_error`, by the effective sample size of the ratios in the
    order of the draws, so that it holds for a Markov chain, or for several one after the other;
    `khat`, the tail shape of the ratios; `log_weights` of the draws, normalised.

    Σ exp(log_weights) f(draw) is the mean of f under the reduced posterior.
    """

    delta_f: float
    standard_error: float
    khat: float
    log_weights: Tensor

    @property
    def trusted(self) -> bool:
        """Whether k̂ ≤ 0.7. Above it the answer is not to be trusted, whatever its standard
        error.
        """
        return self.khat <= _TRUSTED


def monte_carlo_delta_f(
    draws: Mapping[str, Tensor] | Tensor, prior: Any, reduced_prior: Any
) -> MonteCarlo:
    r"""ΔF when `prior` becomes `reduced_prior`, from draws of the posterior.

    .. math:: \Delta F = \log \frac1S \sum_s \frac{\tilde p(\theta_s)}{p(\theta_s)}, \qquad
        \theta_s \sim q

    with the largest ratios replaced by quantiles of the generalised Pareto distribution fitted to
    them.

    Args:
        draws: site → tensor with the draws along its first dimension, as `Predictive(guide,
            num_samples=S)()` and `MCMC.get_samples()` give; or one tensor.
        prior, reduced_prior: site → prior, or one prior for one tensor. A prior is anything with
            `log_prob` (a torch or Pyro distribution, a class of your own), with `mixture`
            (`Horseshoe`), or with `mean` and `var`. The two must name the same sites; those that
            stay as they were can be left out of both.

    Raises:
        ReductionError: a site has no draws or draws that never vary, a density has the wrong shape
            or is NaN, the reduced prior is a point, or the ratios are all 0.

    Example:
        >>> monte_carlo_delta_f(mcmc.get_samples(), {"w": Normal(0.0, 1.0)}, {"w": Laplace(0.0,
        ...     0.3)})
    """
    if isinstance(draws, Tensor):
        draws, prior, reduced_prior = (
            {"the draws": draws},
            {"the draws": prior},
            {"the draws": reduced_prior},
        )
    if set(prior) != set(reduced_prior) or not prior:
        raise ReductionError(
            f"prior, reduced_prior: expected the same sites, got {', '.join(prior) or 'none'}"
            f" and {', '.join(reduced_prior) or 'none'}"
        )
    missing = set(prior) - set(draws)
    if missing:
        raise ReductionError(
            f"site '{min(missing)}': no draws of it; there are draws of: {', '.join(draws)}"
        )
    sizes = {name: len(draws[name]) if draws[name].ndim else 0 for name in prior}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ReductionError(f"draws: expected as many draws of each site, got {sizes}")
    still = [
        name for name in prior if sizes[name] > 1 and bool((draws[name] == draws[name][:1]).all())
    ]
    if still:
        raise ReductionError(
            f"site '{still[0]}': its {sizes[still[0]]} draws are all the same, a point and no"
            " posterior; ΔF of a point says nothing of its width"
        )
    each = [
        _log_prob(reduced_prior[n], draws[n], n) - _log_prob(prior[n], draws[n], n) for n in prior
    ]
    return log_ratio_delta_f(torch.stack(each).sum(0))


def log_ratio_delta_f(log_ratio: Tensor) -> MonteCarlo:
    """The same from log p̃(θ_s) − log p(θ_s) of each draw, a vector. Two programs give it by
    `log_prior_ratio`.

    Warns (`PyroBMRWarning`) where k̂ is above 0.7, as with fewer than 25 draws.

    Example:
        >>> # above 0.7 the estimate is not to be trusted
        >>> log_ratio_delta_f(reduced.log_prob(draws) - prior.log_prob(draws)).khat
    """
    if not isinstance(log_ratio, Tensor):
        raise ReductionError(
            f"log ratios are a tensor, one for each draw; got {type(log_ratio).__name__}"
        )
    smoothed, khat = pareto_smoothed(log_ratio.double())
    total = smoothed.logsumexp(0)
    weights = smoothed - total
    spread = ((2 * weights).logsumexp(0).exp() - 1 / len(weights)).clamp(min=0).sqrt()
    answer = MonteCarlo(
        float(total) - math.log(len(weights)),
        float(spread) * math.sqrt(_draws_for_one(weights.exp())),
        khat,
        weights,
    )
    if not answer.trusted:
        warn(
            f"ΔF = {answer.delta_f:.4g} nats from {len(weights)} draws is not to be trusted: k̂ ="
            f" {khat:.2f}, above {_TRUSTED}, since few draws are where the reduced prior puts its"
            " mass; give more draws, or go there by priors in between"
        )
    return answer


def _draws_for_one(values: Tensor) -> float:
    """How many draws of a chain count as one independent draw, at least 1: 1 + 2Σρ_k over the lags,
    by Geyer's monotone sequence (1992, Stat. Sci. 7(4)).
    """
    n = len(values)
    autocov = torch.fft.irfft(torch.fft.rfft(values - values.mean(), 2 * n).abs().square())[:n]
    if n < 4 or float(autocov[0]) <= 0:
        return 1.0
    # positive and falling for a reversible chain, and then noise
    pairs = (autocov[: n // 2 * 2] / autocov[0]).view(-1, 2).sum(1)
    return max(float(2 * pairs.clamp(min=0).cummin(0).values.sum()) - 1, 1.0)


def pareto_smoothed(log_ratio: Tensor) -> tuple[Tensor, float]:
    """Log ratios whose largest are smoothed, and k̂; fewer than 25 draws are left as they are, with
    k̂ = ∞.

    Source: Vehtari, Simpson, Gelman, Yao & Gabry 2024, JMLR 25(72), algorithm 1; the fit of the
    tail: Zhang & Stephens 2009, Technometrics 51(3).

    Raises:
        ReductionError: `log_ratio` is not a vector of numbers below +∞, or all are −∞.
    """
    if (
        log_ratio.ndim != 1
        or bool((log_ratio.isnan() | log_ratio.isposinf()).any())
        or not bool(log_ratio.isfinite().any())
    ):
        raise ReductionError(
            "log ratios are a vector of numbers, some of them finite; got shape"
            f" {tuple(log_ratio.shape)}, {int(log_ratio.isnan().sum())} NaN,"
            f" {int(log_ratio.isposinf().sum())} +∞; the prior of the fit must allow every draw"
        )
    count = len(log_ratio)
    tail = math.ceil(min(0.2 * count, 3 * math.sqrt(count)))
    if tail < 5:
        return log_ratio, math.inf
    top = log_ratio.max()
    values, order = (log_ratio - top).sort()
    cutoff = values[-tail - 1].clamp(min=math.log(torch.finfo(values.dtype).tiny))
    excess = values[-tail:].exp() - cutoff.exp()
    if float(excess[-1] - excess[0]) <= 1e-12 * float(excess[-1].abs() + 1e-300):
        return log_ratio, 0.0  # no tail: the ratios are equal
    excess = excess.clamp(min=1e-300)
    shape, scale = _generalised_pareto(excess)
    p = (torch.arange(1, tail + 1, dtype=values.dtype, device=values.device) - 0.5) / tail
    quantiles = (
        -scale * torch.log1p(-p)
        if abs(shape) < 1e-12
        else scale / shape * torch.expm1(-shape * torch.log1p(-p))
    )
    smoothed = values.clone()
    # none above the largest that was drawn
    smoothed[-tail:] = (quantiles + cutoff.exp()).log().clamp(max=0.0)
    return torch.empty_like(log_ratio).scatter(0, order, smoothed) + top, shape


def _generalised_pareto(x: Tensor) -> tuple[float, float]:
    """(k, σ) of a generalised Pareto distribution from sorted exceedances, k drawn towards ½ by the
    weight of ten of them.
    """
    n = len(x)
    m = 30 + int(math.sqrt(n))
    b = (1 - (m / (torch.arange(1, m + 1, dtype=x.dtype, device=x.device) - 0.5)).sqrt()) / (
        3 * x[int(n / 4 + 0.5) - 1]
    ) + 1 / x[-1]
    k = torch.log1p(-b[:, None] * x).mean(1)
    profile = n * ((-b / k).log() - k - 1)
    weight = profile.softmax(0)
    weight = weight.where(weight >= 10 * torch.finfo(x.dtype).eps, 0)
    centre = (b * weight).sum() / weight.sum()
    shape = float(torch.log1p(-centre * x).mean())
    return (n * shape + 5) / (n + 10), float(-shape / centre)


def log_density(prior: Any, w: Tensor) -> Tensor:
    """log p(w), entry by entry, of anything with `log_prob`, with `mixture`, or with `mean` and
    `var`.

    Raises:
        ReductionError: it has none of them, or is a point.
    """
    if hasattr(prior, "log_prob"):
        return prior.log_prob(w)
    if hasattr(prior, "mixture"):
        variances, log_weights = (
            torch.as_tensor(np.asarray(a), dtype=torch.float64, device=w.device)
            for a in prior.mixture(None)
        )
        terms = (
            log_weights
            - 0.5 * (2 * math.pi * variances).log()
            - 0.5 * w.double()[..., None].square() / variances
        )
        total = terms.logsumexp(-1)
        widest = int(variances.argmax())
        if is_open_grid(variances.sort().values):
            warn_of_end(
                int((terms[..., widest] - total > math.log(END)).sum()),
                w.numel(),
                "weights",
                float(variances[widest]),
            )
        return total.to(w.dtype)
    if hasattr(prior, "mean") and hasattr(prior, "var"):
        mean, var = (
            torch.as_tensor(a, dtype=w.dtype, device=w.device) for a in (prior.mean, prior.var)
        )
        if not bool((var > 0).all()):
            raise ReductionError(
                "a point has no density and draws never hit it; use delta_f for the point spike, or"
                " a narrow Gaussian"
            )
        return -0.5 * (2 * math.pi * var).log() - 0.5 * (w - mean).square() / var
    raise ReductionError(
        f"{described(prior)} has no density here: it has neither log_prob, nor mixture, nor mean"
        " and var"
    )


def _log_prob(prior: Any, draws: Tensor, name: str) -> Tensor:
    """One number per draw."""
    try:
        value = log_density(prior, draws)
    except ReductionError as error:
        raise ReductionError(f"site '{name}': {error}") from None
    event = len(getattr(prior, "event_shape", ()))
    if value.shape != draws.shape[: draws.ndim - event]:
        raise ReductionError(
            f"site '{name}': expected a prior that broadcasts to one draw, got log densities of"
            f" shape {tuple(value.shape)} for draws of shape {tuple(draws.shape)}"
        )
    return value.reshape(len(draws), -1).sum(1, dtype=torch.float64)
