"""What reductions during a fit have taken from the likelihood.

Owns `lost_likelihood`. Next: `fit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

# nats for each observed number; of a likelihood of more than one nat, this part
_MUCH = 0.2


def lost_likelihood(
    history: Sequence[Mapping[str, float]], numbers: int, target: float | None
) -> str | None:
    """What to say where the evidence decided, and the expected log likelihood at the end of the fit
    is far below that before the first reduction; else None.

    The bound may rise all the same, since the KL divergence falls: for few data, or a prior that
    fits badly, it says that the data do not pay for the weights. Whoever wants predictions should
    know.

    Args:
        history: the rows of `Fit.history`.
        numbers: how many numbers the fit observes, of all rows.
        target: the fraction of the weights that was asked for; None where the evidence decides.
    """
    if target is not None or not history:
        return None
    whole = history[0]["kept"]
    before = list(takewhile(lambda row: row["kept"] == whole, history))
    first, last = (rows[-1]["expected_log_likelihood"] / numbers for rows in (before, history))
    if first - last <= _MUCH * max(1.0, abs(first)) or history[-1]["kept"] == whole:
        return None
    return (
        f"the reductions took {first - last:.2g} nats for each observed number from the expected"
        f" log likelihood: {first:.3g} before the first, {last:.3g} at the end. Where predictions"
        " matter more than the evidence, give Every a target (kept=), reduce later (start=), or fit"
        " at a temperature below 1 or under Gaussian('layer')"
    )
