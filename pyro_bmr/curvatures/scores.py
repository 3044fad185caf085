r"""The gradients at the output of a network whose outer products are its curvature: of targets
drawn from the network, of the data's own, or the columns of a root of the Hessian.

Owns `Loss` and `output_gradients`. Next: `network_batches.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import DataError, ModelError
from pyro_bmr.likelihoods import Categorical
from pyro_bmr.likelihoods.support import check_observed, is_target
from pyro_bmr.tracing import Values, likelihood_of

FISHERS = ("true", "empirical", "gauss-newton")
_MOST_OUTPUTS = 512  # numbers of a row whose Hessian is formed


@dataclass(frozen=True)
class Loss:
    """−log p(y | output) of a likelihood whose own latent sites have the given `values`."""

    likelihood: Any
    values: Mapping[str, Tensor]

    def nll(self, output: Tensor, y: Tensor, read: Mapping[str, Tensor]) -> Tensor:
        """Summed over the rows of the batch, nats."""
        if hasattr(self.likelihood, "log_prob") and not getattr(self.likelihood, "inferred", ()):
            return -self.likelihood.log_prob(output, y, **read)  # type: ignore[no-any-return]
        values = {name: value.to(output) for name, value in self.values.items()}
        with Values(values) as run:
            self.likelihood.observe(output, y, **read)
        return -likelihood_of(run)

    @torch.no_grad()
    def check(self, output: Tensor, y: Tensor | None, read: Mapping[str, Tensor]) -> None:
        """Raises DataError unless the output and the targets, if there are any, go together: their
        shapes, and y in the support, such as 0 … classes − 1. Of a likelihood of one's own only a
        site that has y itself is looked at.
        """
        if type(self.likelihood) is Categorical and _classes(self.likelihood, output) < 2:
            raise DataError(
                "Categorical: expected at least two classes, got an output of shape"
                f" {tuple(output.shape)}; give the network an output for each class, or take"
                " Bernoulli() for one of yes or no"
            )
        if y is None:
            return
        values = {name: value.to(output) for name, value in self.values.items()}
        with torch.random.fork_rng(), Values(values) as run:
            self.likelihood.observe(output, y, **read)
        for name, site in run.observed.items():
            if is_target(site["value"], y):
                with suppress(NotImplementedError):  # a distribution without a support
                    check_observed(name, site["fn"], y, y)

    @torch.no_grad()
    def drawn(self, output: Tensor, y: Tensor | None, read: Mapping[str, Tensor]) -> Tensor:
        """Targets drawn from the network; a target of y that is not observed stays so."""
        if bool(output.isnan().any()):
            raise ModelError(
                "data: the outputs of the network are not finite: some are NaN, of which no targets"
                " can be drawn; look for NaN in x and in the weights"
            )
        values = {name: value.to(output) for name, value in self.values.items()}
        with Values(values):
            labels: Tensor = self.likelihood.observe(output.detach(), None, **read)
        if y is None:
            return labels
        ignored = getattr(self.likelihood, "ignore_index", None)
        if ignored is not None:
            labels = labels.where(y != ignored, ignored)
        if getattr(self.likelihood, "missing", "refuse") == "ignore":
            labels = labels.where(~y.isnan(), torch.nan)
        return labels


def output_gradients(
    loss: Loss,
    fisher: str,
    draws: int,
    output: Tensor,
    y: Tensor | None,
    read: Mapping[str, Tensor],
) -> Iterator[Tensor]:
    r"""Gradients g of the shape of the output with Σ g gᵀ the curvature at the output, row by row.

    - "true": g = ∇ −log p(ŷ | output) / √draws with ŷ drawn from the network.
    - "empirical": the same with ŷ = y, once.
    - "gauss-newton": the columns of H^½, H the Hessian of −log p(y | output), negative
      eigenvalues left out, the largest first.
    """
    leaf = output.detach().requires_grad_()
    if fisher == "gauss-newton":
        y = loss.drawn(output, None, read) if y is None else y
        yield from _hessian_roots(loss.nll(leaf, y, read), leaf)
        return
    for _ in range(draws if fisher == "true" else 1):
        target = y if fisher == "empirical" else loss.drawn(output, y, read)
        assert target is not None
        scale = draws**-0.5 if fisher == "true" else 1.0
        yield torch.autograd.grad(loss.nll(leaf, target, read), leaf)[0] * scale


def _hessian_roots(nll: Tensor, output: Tensor) -> Iterator[Tensor]:
    width = output[0].numel()
    if width > _MOST_OUTPUTS:
        raise ModelError(
            f"fisher='gauss-newton': expected at most {_MOST_OUTPUTS} outputs a row, got {width};"
            " take fisher='true', whose draws cost one backward pass each"
        )
    slope = torch.autograd.grad(nll, output, create_graph=True)[0].flatten(1)
    columns = []
    for k in range(width):
        (column,) = torch.autograd.grad(
            slope[:, k].sum(), output, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        columns.append(column.flatten(1).double())
    hessian = torch.stack(columns, -1)
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    root = vectors * values.clamp_min(0).sqrt()[:, None]
    for k in reversed(range(width)):  # the largest first
        yield root[:, :, k].reshape(output.shape).to(output.dtype)


def _classes(likelihood: Categorical, output: Tensor) -> int:
    axis = 1 if likelihood.class_axis == 1 else -1
    return output.shape[axis] if output.ndim > 1 else 2  # other shapes are refused elsewhere
