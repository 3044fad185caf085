"""What a prediction scores that ignores the inputs.

Owns `base_rates`. Next: `measures.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.data.data_set import Data
from pyro_bmr.data.targets import kind_of
from pyro_bmr.errors import PyroBMRError
from pyro_bmr.experiments.scores import scores
from pyro_bmr.guides.latent_sites import latent_sites
from pyro_bmr.likelihoods.likelihood import read_inputs
from pyro_bmr.likelihoods.weighted import unweighted
from pyro_bmr.prediction.of_outputs import prediction_of_outputs
from pyro_bmr.tracing import Values, likelihood_of

_STEPS = 200  # of L-BFGS, at most; a constant output takes some tens


def base_rates(data: Data) -> dict[str, float]:
    """The scores of a prediction that ignores x, in the target's units: the class frequencies of
    the training rows, or a Normal of the mean and standard deviation of their targets. A class that
    no training row has costs infinitely many nats.

    Under another likelihood, the constant output and the noise, cut points or concentration of most
    likelihood in the training rows. What the likelihood reads from x, such as an exposure, is known
    to this prediction too. Empty for a likelihood that is not of this library.
    """
    if data.family is not None:
        return {} if kind_of(data.family) == "own" else _of_likelihood(data)
    train, test = data.y_train, data.y_test
    if data.classes is not None:
        rates = torch.bincount(train.long(), minlength=data.classes).double() / len(train)
        right = (test == rates.argmax()).double().mean()
        return {"base_accuracy": float(right), "base_nll": -float(rates[test].log().mean())}
    mean, std = train.double().mean(), train.double().std(correction=0)
    errors = (test.double() - mean).square().mean()
    nll = 0.5 * (errors / std.square() + (2 * math.pi * std.square()).log())
    scale = float(data.target_scale)
    return {
        "base_rmse": float(errors.sqrt()) * scale,
        "base_nll": float(nll) + math.log(scale),
    }


def _of_likelihood(data: Data) -> dict[str, float]:
    likelihood: Any = data.likelihood()
    output, values = constant_fit(likelihood, data)
    _, read = read_inputs(likelihood, data.x_test)
    read = {name: column.double() for name, column in read.items()}
    prediction = prediction_of_outputs(
        likelihood, _outputs(likelihood, output, data.y_test), read, values
    )
    try:
        found = scores(prediction, data)
    except PyroBMRError:  # no distribution function, or no moment
        return {}
    return {f"base_{name}": found[name] for name in ("accuracy", "rmse", "nll") if name in found}


@torch.enable_grad()
def constant_fit(likelihood: Any, data: Data) -> tuple[Tensor, dict[str, Tensor]]:
    """The output that is the same for all rows, and the values of the latent sites of the
    likelihood, of most likelihood in the training rows; float64.
    """
    _, read = read_inputs(likelihood, data.x_train)
    read = {name: column.double() for name, column in read.items()}
    y = data.y_train.double() if data.y_train.is_floating_point() else data.y_train
    output = torch.zeros(_shape(likelihood, data), dtype=torch.float64, requires_grad=True)
    latents = (
        latent_sites(likelihood.observe, _outputs(likelihood, output, y), y, **read)
        if getattr(likelihood, "inferred", ())
        else []
    )
    free = [latent.start.double().requires_grad_() for latent in latents]

    def values() -> dict[str, Tensor]:
        return {
            latent.name: u if latent.transform is None else latent.transform(u)
            for latent, u in zip(latents, free, strict=True)
        }

    parameters = [output, *free]
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=_STEPS,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,  # of nats per row
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        with Values(values()) as run:
            likelihood.observe(_outputs(likelihood, output, y), y, **read)
        nats = -likelihood_of(run) / len(y)
        nats.backward()
        return nats

    optimiser.step(loss)
    return output.detach(), {name: value.detach() for name, value in values().items()}


def _shape(likelihood: Any, data: Data) -> tuple[int, ...]:
    """The shape of what a network returns for a row, without the positions of classes."""
    inner = unweighted(likelihood)
    if kind_of(likelihood) == "classes":
        return (data.outputs,)
    *others, last = data.y_train.shape[1:] or (1,)
    return *others, last * (2 if getattr(inner, "noise", None) == "network" else 1)


def _outputs(likelihood: Any, output: Tensor, y: Tensor) -> Tensor:
    """The constant `output` for each row of y, as a network returns it."""
    if kind_of(likelihood) != "classes":
        return output.expand(len(y), *output.shape)
    rows = output.expand(*y.shape, len(output))
    return rows.movedim(-1, 1) if unweighted(likelihood).class_axis == 1 else rows
