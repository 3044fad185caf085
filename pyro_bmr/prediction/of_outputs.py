"""The prediction of a likelihood at what plain networks return.

Owns `prediction_of_outputs`, and `predict_networks`, the average over several networks. Next:
`predict.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmr.curvatures.network_batches import evaluation, output_of
from pyro_bmr.data.inputs import called, in_dtype_of, pieces
from pyro_bmr.errors import ModelError
from pyro_bmr.guides.latent_sites import base_distribution
from pyro_bmr.likelihoods.likelihood import OBSERVED, read_inputs
from pyro_bmr.prediction.observed_site import marker_of, unmarked
from pyro_bmr.prediction.predictive import MixturePrediction, Prediction, prediction_of
from pyro_bmr.tracing import Values


@torch.no_grad()
def prediction_of_outputs(
    likelihood: Any,
    outputs: Tensor,
    read: Mapping[str, Tensor] | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> Prediction:
    """The distribution of the targets given the outputs of a network, one row each.

    Args:
        read: what the likelihood reads from x, by name.
        values: of its latent sites.
    """
    return _averaged([_distribution(likelihood, outputs, read, values)])


@torch.no_grad()
def predict_networks(
    networks: Iterable[nn.Module],
    likelihood: Any,
    x: Any,
    *,
    values: Mapping[str, float | Tensor] | None = None,
    batch_size: int = 1000,
) -> Prediction:
    r"""The predictive averaged over plain networks, such as the draws of a pruned one.

    .. math:: p(y \mid x) = \tfrac1S \sum_s p(y \mid f_s(x))

    Args:
        networks: one at a time; they need not be in memory together.
        x: the inputs of all rows, a tensor, or a tuple or a dict of tensors.
        values: of the latent sites of the likelihood.
        batch_size: rows at once.

    Returns:
        As `predict`.

    Raises:
        ModelError: there are no networks.

    Example:
        >>> predict_networks(pruned.draws(16), Categorical(), x_test).probs
    """
    inputs, read = read_inputs(likelihood, x)
    fixed = {name: torch.as_tensor(value) for name, value in (values or {}).items()}
    found = []
    for net in networks:
        with evaluation(net):
            own = (in_dtype_of(net, part) for part in pieces(inputs, batch_size))
            rows = [output_of(called(net, part)) for part in own]
        found.append(_distribution(likelihood, torch.cat(rows), read, fixed))
    if not found:
        raise ModelError("networks: expected at least one, got none")
    return _averaged(found)


def _distribution(
    likelihood: Any,
    outputs: Tensor,
    read: Mapping[str, Tensor] | None,
    values: Mapping[str, Tensor] | None,
) -> Any:
    with Values(dict(values or {})) as run:
        likelihood.observe(outputs, None, **(read or {}))
    return run.observed[OBSERVED]["fn"]


def _averaged(found: list[Any]) -> Prediction:
    bases, marker = [unmarked(base_distribution(fn)) for fn in found], marker_of(found[0])
    if isinstance(bases[0], torch.distributions.Categorical):
        return prediction_of([(base.probs[None],) for base in bases], len(bases), marker)
    if isinstance(bases[0], torch.distributions.Normal):
        parts = [(base.loc[None], base.scale[None]) for base in bases]
        return prediction_of(parts, len(bases), marker)
    return MixturePrediction([[fn] for fn in found], -len(found[0].shape()))
