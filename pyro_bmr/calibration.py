"""One number fitted on held-out rows so that a predictive is neither too bold nor too timid: a temperature of logits, or a factor on posterior variances.

Owns `best_temperature` and `best_widening`. Next: `metrics.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pyro_bmr.posterior import Posterior
from pyro_bmr.prediction import predict


def best_temperature(logits: Tensor, y: Tensor) -> float:
    r"""The T > 0 with the least mean cross entropy of softmax(logits / T), between 0.05 and 20.

    The cross entropy is convex in 1/T, so that it has one minimum. Source: Guo et al. 2017, arXiv 1706.04599.
    """
    logits = logits.double()
    return math.exp(_golden_section(lambda t: float(F.cross_entropy(logits / math.exp(t), y.long())), math.log(0.05), math.log(20.0), 1e-4))


def best_widening(
    program: Callable[..., Any], posterior: Posterior, rows: tuple[Tensor, Tensor], *, most: float = 64.0, draws: int = 32, seed: int = 0
) -> float:
    r"""The factor c for `Posterior.widened` with the least NLL of held-out `rows` (x, y), between 1/`most` and `most`.

    .. math:: \hat c = \arg\min_c -\sum_i \log \tfrac1S \sum_s p(y_i \mid x_i, w_s), \qquad w_s = \mu + \sqrt{c}\,\sigma \epsilon_s

    with the same noise ε for every c. A posterior fitted at a temperature T < 1 finds better means and has variances near T times too small: c, of the order
    of 1/T, gives them back. Like the temperature of logits (Guo et al. 2017) it is one number on held-out rows; unlike it, it is spent where the data say
    little. Cold posteriors: Wenzel et al. 2020, arXiv 2002.02405; the same for a Laplace approximation: Ritter, Botev & Barber 2018, section 3.

    Args:
        draws, seed: as for `predict`. About 12 predictions are made.

    Raises:
        DataError, ModelError: as `predict`; or a site's draws follow those of its scales (`Posterior.widened`).

    Example:
        >>> factor = bmr.best_widening(fit.program, fit.posterior, (x_held, y_held))
        >>> prediction = bmr.predict(fit.program, fit.posterior.widened(factor), x_test)
    """
    x, y = rows

    def nll(log_factor: float) -> float:
        return -float(predict(program, posterior.widened(math.exp(log_factor)), x, draws=draws, seed=seed).log_prob(y).mean())

    return math.exp(_golden_section(nll, -math.log(most), math.log(most), 0.05))


def _golden_section(f: Callable[[float], float], low: float, high: float, within: float) -> float:
    """Where f, which falls and then rises in low … high, is least."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    f_a, f_b = f(a), f(b)
    while high - low > within:
        if f_a < f_b:
            high, b, f_b = b, a, f_a
            a = high - ratio * (high - low)
            f_a = f(a)
        else:
            low, a, f_a = a, b, f_b
            b = low + ratio * (high - low)
            f_b = f(b)
    return (low + high) / 2
