"""Calibration by one number from held-out rows: a temperature of logits, or a factor on posterior
variances.

Owns `best_temperature` and `temperature_scaled`, `best_widening` and `mean_nll`. Next:
`metrics.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.checks import check_arguments, check_labels
from pyro_bmr.data.batch import BatchChecks
from pyro_bmr.data.given import source_of
from pyro_bmr.data.inputs import Inputs
from pyro_bmr.data.row_sources import Stream, chunks
from pyro_bmr.errors import DataError, ModelError, PyroBMRWarning, described, holds
from pyro_bmr.formulas.line_search import line_maximum
from pyro_bmr.isolation import isolated
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.prediction.class_prediction import ClassPrediction, entropy
from pyro_bmr.prediction.predict import predict

_COLDEST, _HOTTEST = 0.05, 20.0
_CHUNK = 10_000  # rows that are read at once


@isolated()
def best_temperature(logits: Tensor, y: Tensor) -> float:
    r"""The T > 0 with the least mean cross entropy of softmax(logits / T), between 0.05 and 20.

    The cross entropy is convex in 1/T, so it has one minimum. If that is at an end of the range, a
    `PyroBMRWarning` says so. A class may be impossible, with the logit −∞, unless it is the label.
    Source: Guo et al. 2017, arXiv 1706.04599.

    Raises:
        DataError: logits are NaN or +∞, a label is out of range or impossible, or there are no
            rows.
    """
    check_labels(logits, y, "logits")
    logits, y = logits.double(), y.to(logits.device).long()
    _check_finite_loss(logits, y)
    gaps = logits - logits.gather(1, y[:, None])  # z_c − z_y
    possible = gaps.masked_fill(gaps.isneginf(), 0.0)

    def loss(coldness: float) -> float:
        return float((coldness * gaps).logsumexp(1).mean())

    def slope(coldness: float) -> tuple[float, float]:
        """The first and the second derivative of the loss."""
        probs = (coldness * gaps).softmax(1)
        mean = (probs * possible).sum(1)
        spread = (probs * (possible - mean[:, None]).square()).sum(1)
        return float(mean.mean()), float(spread.mean())

    hot, cold = 1 / _HOTTEST, 1 / _COLDEST
    coldness = _zero(slope, hot, cold)
    best = 1 / coldness
    if min(loss(hot), loss(cold)) <= loss(coldness) + 1e-12:
        warnings.warn(
            f"the best temperature, {best:.4g}, is at an end of the search from {_COLDEST} to"
            f" {_HOTTEST}: the rows do not determine it, as when no label is wrong;"
            " give more rows, or rows that were not trained on",
            PyroBMRWarning,
            stacklevel=3,
        )
    return best


def _check_finite_loss(logits: Tensor, y: Tensor) -> None:
    """Raises DataError if a row has an infinite cross entropy at any temperature."""
    bad = logits.isposinf().any(1) | logits.gather(1, y[:, None])[:, 0].isneginf()
    if bool(bad.any()):
        raise DataError(
            "logits: expected values below +inf, and the label's finite; first in row"
            f" {int(bad.nonzero()[0])} they are not, so no temperature has a finite loss"
        )


def temperature_scaled(prediction: ClassPrediction, temperature: float) -> ClassPrediction:
    r"""The prediction with its averaged class probabilities at another temperature τ.

    .. math:: p_c' = \frac{p_c^{1/\tau}}{\sum_k p_k^{1/\tau}}, \qquad
        p_c = \tfrac1S \sum_s p(c \mid x, w_s)

    Above 1 they are less certain; the most probable class is the same. `aleatoric` and `epistemic`
    keep their shares of the entropy. Guo et al. 2017, arXiv 1706.04599; after averaging rather than
    before: Rahaman & Thiery 2021, arXiv 2007.08792.

    Raises:
        ModelError: `temperature` is no finite number above 0, or `prediction` is not of classes.

    Example:
        >>> held = bmr.predict(fit.program, fit.posterior, x_held)
        >>> best = bmr.prediction.best_temperature(held.probs.log(), y_held)
        >>> bmr.prediction.temperature_scaled(bmr.predict(fit.program, fit.posterior, x), best)
    """
    if not isinstance(prediction, ClassPrediction):
        raise ModelError(
            "temperature_scaled: expected a ClassPrediction, got"
            f" {type(prediction).__name__}; predictions of other targets are widened"
            " (best_widening)"
        )
    positive = not isinstance(temperature, bool) and holds(lambda t: 0 < t < math.inf, temperature)
    check_arguments("temperature_scaled", positive, "a finite number > 0", temperature=temperature)
    probs = (prediction.probs.log() / temperature).softmax(-1)
    total = entropy(probs)
    before = prediction.aleatoric + prediction.epistemic
    share = (prediction.epistemic / before).nan_to_num(0.0)  # none of an entropy of 0
    return replace(prediction, probs=probs, aleatoric=(1 - share) * total, epistemic=share * total)


@isolated(autocast=True)
def best_widening(
    program: Callable[..., Any],
    posterior: Posterior,
    rows: Any,
    *,
    most: float = 64.0,
    draws: int = 32,
    seed: int = 0,
) -> float:
    r"""The factor c for `Posterior.widened` with the least NLL of held-out `rows` (x, y), between
    1/`most` and `most`, to within 2.5 %.

    .. math:: \hat c = \arg\min_c -\sum_i \log \tfrac1S \sum_s p(y_i \mid x_i, w_s), \qquad
        w_s = \mu + \sqrt{c}\,\sigma \epsilon_s

    with the same noise ε for every c. A posterior fitted at a temperature T < 1 has variances that
    are up to 1/T times too small. Like the temperature of logits (Guo et al. 2017), c is one number
    from held-out rows. Unlike it, c widens the predictive where the posterior is wide. Cold
    posteriors: Wenzel et al. 2020, arXiv 2002.02405. A Laplace approximation widened by held-out
    rows: Ritter, Botev & Barber 2018.

    Args:
        rows: a pair (x, y) of tensors, arrays or tables, a data set or a loader, as for `fit`.
        draws, seed: as for `predict`. Up to 20 predictions are made.

    Raises:
        DataError: `rows` are none, `most` no finite number above 1, or the likelihood
            of the rows is NaN.
        DataError, ModelError: as `predict`; or a site's draws follow those of its scales
            (`Posterior.widened`).

    Example:
        >>> factor = bmr.prediction.best_widening(fit.program, fit.posterior, (x_held, y_held))
        >>> prediction = bmr.predict(fit.program, fit.posterior.widened(factor), x_test)
    """
    source = source_of(rows, name="rows")
    if isinstance(source, Stream) and not source.again:
        raise DataError(
            f"rows: expected rows that can be read again, got {source.about}; give a loader, a data"
            " set or tensors"
        )
    if isinstance(most, bool) or not isinstance(most, (int, float)) or not 1 < most < math.inf:
        raise DataError(f"most={described(most)}: expected a finite number above 1")

    def nll(factor: float) -> float:
        batches = chunks(source, _CHUNK, BatchChecks())
        value = mean_nll(
            program,
            posterior.widened(factor),
            batches,
            torch.float64,
            draws=draws,
            seed=seed,
        )
        return _number(value, factor)

    return _least(nll, 1 / most, most, 0.05)


def mean_nll(
    program: Callable[..., Any],
    posterior: Posterior,
    batches: Iterable[tuple[Inputs, Tensor]],
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> float:
    """The mean negative log likelihood of all rows of `batches`, nats: of each entry of
    `Prediction.log_prob`, at the point of the posterior unless `settings` of `predict` say
    otherwise; summed in `dtype`.
    """
    means, counts = [], []
    for x, y in batches:
        log_p = predict(program, posterior, x, **{"draws": 0, **settings}).log_prob(y)
        means.append(-float(log_p.mean(dtype=dtype)))
        counts.append(log_p.numel())
    if len(means) == 1:
        return means[0]
    return sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)


def _number(value: float, factor: float) -> float:
    """The mean negative log likelihood of the rows, nats.

    Raises:
        DataError: it is NaN; the message has the `factor` on the variances.
    """
    if math.isnan(value):
        raise DataError(
            f"the log likelihood of the held-out rows is NaN with variances {factor:.3g} times"
            " as large; look for NaN in x and y"
        )
    return value


def _zero(slope: Callable[[float], tuple[float, float]], low: float, high: float) -> float:
    """Where a function that increases is 0, given with its derivative, in low … high; else the end
    that is nearer to it. Newton's steps, or half of the interval of log x where they do not halve.
    """
    if slope(high)[0] <= 0:  # first, as it is where logits are so far apart that both are 0
        return high
    if slope(low)[0] >= 0:
        return low
    at, step = math.sqrt(low * high), high - low
    while abs(step) > 1e-9 * at:
        value, derivative = slope(at)
        low, high = (low, at) if value > 0 else (at, high)
        newton = at - value / derivative if derivative > 0 else math.inf
        if not (low <= newton <= high and abs(newton - at) <= abs(step) / 2):
            newton = math.sqrt(low * high)
        at, step = newton, newton - at
    return at


def _least(f: Callable[[float], float], low: float, high: float, within: float) -> float:
    """Where f is least in low … high, to within the fraction `within`."""
    start, end = (torch.tensor(bound, dtype=torch.float64).log() for bound in (low, high))
    return float(
        line_maximum(
            lambda log: torch.tensor(-f(float(log.exp())), dtype=torch.float64),
            start,
            end,
            points=5,
            tolerance=within,
        ).exp()
    )
