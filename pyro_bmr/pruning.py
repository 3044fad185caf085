"""Masks applied to any Pyro program, and the schedule of reductions during a fit.

Owns the effect handler `Masked`, the schedule `Every`, and `cubic`, the schedule of kept fractions.
A mask is a bool tensor in the shape of its site, True where the weight is kept. A pruned weight is
exactly zero and takes no part. Next: `prediction/predictive.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_bmr.checks import check_arguments
from pyro_bmr.errors import FitError, ReductionError, holds
from pyro_bmr.guides.latent_sites import base_distribution
from pyro_bmr.guides.site_wise import Drawn
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.priors import Gaussian, Prior
from pyro_bmr.reduction.attention_heads import Heads
from pyro_bmr.reduction.collapse import collapse
from pyro_bmr.reduction.groups import Block, NofM
from pyro_bmr.reduction.reduce import quiet_reduction
from pyro_bmr.reduction.result import Reduction
from pyro_bmr.tracing import does_not_split

_REDUCTIONS = 10  # in a fit, of those that fall between start and stop


class Masked(Messenger):
    """Prunes the sites of a program, a guide, or anything else that calls `pyro.sample`:
    `Masked(masks)(program)`.

    The program sees exactly 0 at every masked entry, and the entry's log density and KL divergence
    are exactly 0 there, so SVI, NUTS and Predictive all respect the mask. A guide in Pyro's auto
    style (`<site>_unconstrained`) is masked on both of its sites. Masks may be replaced between
    calls (`handler.masks = ...`).

    Raises:
        ReductionError: a mask is not bool, does not have its site's shape, or the site's density
            does not split over entries.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.masks = dict(masks)

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        mask = self.masks.get(
            name,
            (
                self.masks.get(name.removesuffix("_unconstrained"))
                if msg["infer"].get("is_auxiliary")
                else None
            ),
        )
        if mask is None or msg["is_observed"]:
            return
        fn = msg["fn"]
        if mask.dtype != torch.bool or mask.shape != fn.shape():
            raise ReductionError(
                f"mask of site '{name}': expected a bool tensor of shape {tuple(fn.shape())}, got"
                f" {mask.dtype} of shape {tuple(mask.shape)}"
            )
        if isinstance(fn, Drawn):
            msg["fn"] = fn.pruned(mask)
        elif isinstance(fn, dist.Delta):
            msg["fn"] = dist.Delta(fn.v.where(mask, 0), fn.log_density, event_dim=fn.event_dim)
        elif base_distribution(fn).event_shape:
            raise ReductionError(does_not_split(name, base_distribution(fn)))
        else:
            msg["fn"] = PrunedDistribution(base_distribution(fn).expand(fn.shape()), mask).to_event(
                fn.event_dim
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        # also where the value came from outside, as in Predictive
        if isinstance(base_distribution(msg["fn"]), PrunedDistribution):
            msg["value"] = msg["value"].where(base_distribution(msg["fn"]).kept, 0)


class PrunedDistribution(dist.TorchDistribution):
    r"""`base` where `kept` is True; the point 0 elsewhere.

    The log density of a masked entry is −½ v², which is 0 at its only admissible value v = 0. The
    quadratic matters for samplers that move in every coordinate: it keeps those of pruned entries
    near 0.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: Any, kept: Tensor, validate_args: Any = None) -> None:
        self.base_dist, self.kept = base, kept
        self.has_rsample = bool(base.has_rsample)
        super().__init__(base.batch_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base_dist.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> PrunedDistribution:
        return PrunedDistribution(self.base_dist.expand(batch_shape), self.kept.expand(batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.base_dist.sample(sample_shape).where(self.kept, 0)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.base_dist.rsample(sample_shape).where(self.kept, 0)

    def log_prob(self, value: Tensor) -> Tensor:
        # a pruned entry needs a value in the support of `base`; its density is not used
        admissible = value.where(self.kept, self.base_dist.sample())
        return self.base_dist.log_prob(admissible).where(self.kept, -0.5 * value.square())


@torch.distributions.kl.register_kl(PrunedDistribution, PrunedDistribution)  # type: ignore[untyped-decorator]
def _kl_pruned(q: PrunedDistribution, p: PrunedDistribution) -> Tensor:
    return torch.distributions.kl_divergence(q.base_dist, p.base_dist).where(p.kept, 0)


@dataclass(frozen=True)
class Every:
    """The schedule of the reductions of a fit: every `epochs` epochs after the fraction `start` of
    the fit. In a fit that finds out itself when it is done, ``epochs=None``, fractions are those of
    each cycle (`UntilConverged`).

    Args:
        epochs: the number of epochs between reductions; may be a fraction, such as 0.25. None for a
            tenth of the fit.
        to: the prior to reduce to, as in `reduce`. With the default, the point spike, a weight is
            pruned if the evidence increases without it.
        start: the fraction of the fit's epochs before the first reduction, so that the posterior
            depends on the data first (`fit` also has a warm-up of its own).
        threshold: nats, as in `reduce`.
        kept: a target instead of the evidence. The kept fraction falls on the cubic schedule of
            Zhu & Gupta 2017 (arXiv 1710.01878) from 1 at `start` to `kept` at `stop`; the weights
            with the largest spike ΔF are pruned first.
        stop: the fraction of the epochs at which the target is reached, or after which no weight is
            pruned by the evidence; in the remaining epochs the kept weights converge.
        per, heads: what is pruned as one, as in `reduce`. A fixed pattern, ``NofM(2, 4)``, applies
            from the first reduction on and needs no target.

    Example:
        >>> fit(program, data, epochs=20, reduce=Every(epochs=1, per="unit"))
    """

    epochs: float | None = None
    to: Prior | Mapping[str, Prior | None] = Gaussian(scale=0.0)
    start: float = 0.1
    threshold: float = 0.0
    kept: float | None = None
    stop: float = 0.75
    per: str | Block | Heads | NofM | Mapping[str, Tensor] = "weight"
    heads: int | Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        check = partial(check_arguments, "Every")
        positive = self.epochs is None or holds(lambda x: x > 0, self.epochs)
        check(positive, "a number of epochs > 0, or None", FitError, epochs=self.epochs)
        ordered = holds(lambda a, b: 0 <= a <= b <= 1, self.start, self.stop)
        expected = "0 <= start <= stop <= 1, as fractions of the fit"
        check(ordered, expected, FitError, start=self.start, stop=self.stop)
        known = holds(lambda t: not math.isnan(t), self.threshold)
        check(known, "a number of nats", FitError, threshold=self.threshold)
        fraction = self.kept is None or holds(lambda x: 0 <= x <= 1, self.kept)
        check(fraction, "a fraction between 0 and 1, or None", FitError, kept=self.kept)

    def is_due(self, step: int, total: int, steps_per_epoch: int) -> bool:
        """Whether a reduction is due after `step` of 1 … `total`."""
        if not self.start * total <= step <= self.stop * total + 0.5:
            return False
        if self.kept is not None and step == round(self.stop * total):
            return True
        interval = total / _REDUCTIONS if self.epochs is None else self.epochs * steps_per_epoch
        return step in (round(k * interval) for k in nearest(step / interval) if k >= 1)

    def target(self, done: float) -> float | None:
        """The fraction to keep after the fraction `done` of the fit; None if the evidence
        decides.
        """
        if self.kept is None:
            return None
        return cubic(self.kept, done, self.start, self.stop)

    def reduce(self, posterior: Posterior, done: float) -> Reduction:
        """The reduction of the fit's posterior at that point."""
        return quiet_reduction(
            posterior,
            self.to,
            self.per,
            threshold=self.threshold,
            kept=self.target(done),
            heads=self.heads,
        )

    def cautions(self, before: Mapping[str, Tensor], posterior: Posterior) -> tuple[str, ...]:
        """Messages about what may mislead in the posterior at the end of the fit: layers that were
        pruned whole, sites that a pattern left out. `before`: the masks at the start of the fit.
        """
        after = {
            name: site.kept for name, site in posterior.sites.items() if site.support == "real"
        }
        emptied = collapse(
            after, {name: before.get(name, torch.ones_like(mask)) for name, mask in after.items()}
        )
        left_out = (
            self.per.left_out({name: tuple(posterior[name].mean.shape) for name in posterior.masks})
            if isinstance(self.per, NofM)
            else None
        )
        return tuple(message for message in (emptied, left_out) if message)


def nearest(x: float) -> tuple[int, int, int]:
    """The whole numbers around `x`."""
    whole = round(x)
    return whole - 1, whole, whole + 1


def cubic(kept: float, done: float, start: float, stop: float) -> float:
    """The fraction to keep after the fraction `done` of a fit: kept + (1 − kept)(1 − t)³, where t
    goes from 0 at `start` to 1 at `stop`.

    Source: Zhu & Gupta 2017, arXiv 1710.01878.
    """
    t = min(max((done - start) / max(stop - start, 1e-12), 0.0), 1.0)
    return kept + (1 - kept) * (1 - t) ** 3
