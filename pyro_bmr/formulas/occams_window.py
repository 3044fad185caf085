r"""The smallest model of those that are nearly as probable as the best: which weights go although
the evidence is slightly for them.

Owns `window_shift`. Imports torch only. Next: `line_search.py`.
"""

from __future__ import annotations

import math

from torch import Tensor


def window_shift(gain: Tensor, decisions: int) -> float:
    r"""How many nats are to be added to each `gain` so that the weights with a positive sum are
    those to prune.

    gᵢ is what the log evidence gains without weight i. The weights with gᵢ ≤ 0 are pruned from the
    weakest on while the evidence that they cost together, Σ −gᵢ, is at most log n nats. That is
    Occam's window (Madigan & Raftery 1994, JASA 89(428)): of all models that are nearly as probable
    as the best, the smallest.

    The width follows from the number n of decisions. A weight that is zero has a Bayes factor
    above k with a probability below 1/k,

    .. math:: P\Big(\frac{p(y \mid w_i)}{p(y \mid w_i = 0)} \ge k \,\Big|\, w_i = 0\Big) \le
        \frac{1}{k}

    by Markov's inequality, since the factor has mean 1. So among n such weights some have a factor
    of up to about n by chance. Without the window a prior that is close to zero itself, as a
    horseshoe is, keeps weights of noise at two standard deviations.

    Args:
        gain: of each decision, nats; +∞ for what is pruned already, −∞ for what is kept for sure.
        decisions: n, those that are pruned already included.

    Returns:
        The shift, 0 if no weight is added: half-way between the last weight that is pruned and the
        first that is kept.

    Example:
        >>> gain = tensor([0.4, -0.3, -1.5, -20.0])
        >>> gain + window_shift(gain, 10) > 0
        tensor([True, True, True, False])
    """
    losses = (-gain[(gain <= 0) & gain.isfinite()]).double().sort().values
    count = int((losses.cumsum(0) <= math.log(max(decisions, 1))).sum())
    if count == 0:
        return 0.0
    last = float(losses[count - 1])
    following = float(losses[count]) if count < len(losses) else last + 1.0
    return (last + following) / 2
