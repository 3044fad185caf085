"""The methods of a study by name. A method trains a network on a data set with one seed.

Owns `METHODS`, `method_named` and `network_of`; `Trained` and the baselines are in `baselines/`.
Next: `measures.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pyro_bmr.baselines import (
    BASELINES,
    OF_REAL_TARGETS,
    EverySignalToNoise,
    Trained,
    options_of,
)
from pyro_bmr.data.data_set import Data
from pyro_bmr.errors import ModelError, OptionError, described
from pyro_bmr.experiments.models import Build
from pyro_bmr.experiments.recipe import Fitted, fit_by_route
from pyro_bmr.experiments.settings import ROUTES, Settings
from pyro_bmr.experiments.temperature_trials import at_scale
from pyro_bmr.exporting import export, point_weights
from pyro_bmr.likelihoods.weighted import unweighted
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.prediction.predict import predict
from pyro_bmr.priors import Gaussian
from pyro_bmr.priors.names import prior_from_name
from pyro_bmr.pruning import Every

__all__ = ["METHODS", "Method", "Trained", "method_named"]

Method = Callable[[Build, Data, int, Mapping[str, Any], bool], Trained]
"""(build, data, seed, options, progress) → what was trained. Options that the method does not know
are an OptionError, raised before `build` is called.
"""


def _of_route(name: str, route: str, every: Callable[..., Every] = Every) -> Method:
    known = ("prior", *Settings.__dataclass_fields__)

    def run(
        build: Build, data: Data, seed: int, options: Mapping[str, Any], progress: bool
    ) -> Trained:
        if unknown := set(options) - set(known):
            raise OptionError(name, unknown, known)
        given = dict(options)
        prior = given.pop("prior", "gaussian")
        if isinstance(prior, str | int | float):
            prior = prior_from_name(str(prior))
        if every is EverySignalToNoise and not isinstance(prior, Gaussian):
            raise ModelError(
                f"{name}: expected a Gaussian prior, such as gaussian or gaussian:0.1, got"
                f" {described(prior)}"
            )
        settings = Settings(**given)
        fitted = fit_by_route(build, data, prior, route, seed, settings, progress, every)
        return _trained(fitted, settings, 0 if route == "map" else settings.draws)

    return run


def _trained(fitted: Fitted, settings: Settings, draws: int) -> Trained:
    fit, posterior = fitted.fit, fitted.posterior
    return Trained(
        lambda x: at_scale(
            predict(fit.program, posterior, x, draws=draws, seed=fit.seed), fitted.scale
        ),
        point_weights(fit.program, posterior),
        export(fit.program, posterior) if isinstance(fit.program, BayesianNetwork) else None,
        fit.history,
        settings.batch_size,
        fit.seconds,
        float(fit.history["elbo"].iloc[-1]),
        fitted.delta_f,
        _chosen(fitted),
        fit=fit,
        declared=fitted.declared,
        reduction=fitted.reduction,
        cautions=fitted.cautions,
        trials={} if fitted.trials is None else dict(fitted.trials.nll),
    )


def _chosen(fitted: Fitted) -> dict[str, float]:
    """What was found on held-out rows."""
    widen = {} if fitted.widen == 1 else {"widen": fitted.widen}
    if fitted.trials is None:
        return widen
    noise = {} if fitted.trials.noise is None else {"noise": fitted.trials.noise}
    return {**widen, "temperature": fitted.fit.temperature, "scale": fitted.scale, **noise}


def _of_baseline(name: str) -> Method:
    train, kind = BASELINES[name]

    def run(
        build: Build, data: Data, seed: int, options: Mapping[str, Any], progress: bool
    ) -> Trained:
        chosen = options_of(kind, name, options)
        if data.task != "classification" and name not in OF_REAL_TARGETS:
            what = "real targets" if data.task == "regression" else repr(data.likelihood())
            raise ModelError(
                f"{name}: expected data with classes, got '{data.name}' with {what}; take"
                f" {', '.join(OF_REAL_TARGETS)}, map, fitted or reduced"
            )

        def make(seed: int) -> nn.Module:
            torch.manual_seed(seed)
            return network_of(build(data, Gaussian()), name, data)

        with torch.random.fork_rng():
            return train(make, data, seed, chosen, progress)

    return run


def network_of(program: Any, name: str, data: Data) -> nn.Module:
    """The plain network of a program, which a baseline trains: that of a `BayesianNetwork`, or the
    attribute `plain` of a program written by hand.

    Raises:
        ModelError: there is none; `name` is the baseline that asks for it.
    """
    bayesian = isinstance(program, BayesianNetwork)
    net = program.net if bayesian else getattr(program, "plain", None)
    if not isinstance(net, nn.Module):
        raise ModelError(
            f"{name}: expected a model whose build returns a BayesianNetwork, got"
            f" {type(program).__name__}; take map, fitted or reduced"
        )
    own, expected = (
        type(unweighted(likelihood)).__name__
        for likelihood in (program.likelihood if bayesian else None, data.likelihood())
    )
    if bayesian and own != expected:
        raise ModelError(
            f"{name}: expected the likelihood {expected} of the data, got {own}; take map, fitted"
            " or reduced"
        )
    return net


METHODS: dict[str, Method] = {
    **{name: _of_baseline(name) for name in BASELINES},
    **{route: _of_route(route, route) for route in ROUTES},
    "snr": _of_route("snr", "reduced", EverySignalToNoise),
}
"""Name → method: the baselines, then the routes of `compare`."""


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        ModelError: there is no such method.
    """
    if name not in METHODS:
        raise ModelError(f"no method '{name}'; the methods are: {', '.join(METHODS)}")
    return METHODS[name]
