r"""A table by Pyro's NUTS, for those who want to check the other engines, or a family without a
Gaussian approximation. It takes minutes where they take seconds.

Owns `nuts`. Next: `engine_choice.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_bmr import likelihoods
from pyro_bmr.data.table_encoding import refused
from pyro_bmr.estimators.class_families import Categorical, Ordinal
from pyro_bmr.estimators.count_families import NegativeBinomial, Poisson
from pyro_bmr.estimators.engines import Options, reduced_average, with_family
from pyro_bmr.estimators.families import Inferred
from pyro_bmr.estimators.generalised_subsets import GeneralisedLinear
from pyro_bmr.estimators.model_average import Average
from pyro_bmr.estimators.real_families import Normal, StudentT
from pyro_bmr.estimators.subset_evidence import Array, Regression
from pyro_bmr.isolation import isolated, seed_generators
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.priors.gaussian import Gaussian

_CHAINS = 2
_DEPTH = 8
_WIDE = 10.0  # standard deviation of an intercept


def nuts(
    of: Regression | GeneralisedLinear, options: Options, rng: np.random.Generator
) -> tuple[Average, Regression | GeneralisedLinear]:
    """The average, and the model with the parameters of its family at the means of the draws. There
    are two chains, with `options.steps` steps of warm-up each.

    b ~ N(0, s²), where s² is the most probable slab of the full model; the moments of the draws are
    reduced by `greedy_search`. The intercepts have wide priors.
    """
    _, _, prior_var = of.subset(np.ones(len(of.groups), dtype=np.bool_)).gaussian()
    scale = prior_var**0.5
    chains = [_chain(of, scale, options, int(rng.integers(2**31))) for _ in range(_CHAINS)]
    chained = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
    # moments, and a warning if the chains disagree
    moments = Posterior.from_samples(
        {"b": chained["b"]}, Gaussian(scale), chains=True, joint_up_to=chained["b"].shape[-1]
    ).sites["b"]
    flat = {name: values.flatten(0, 1).numpy() for name, values in chained.items()}
    draws = np.concatenate([_intercepts(of, flat), flat["b"]], 1)
    noise = flat["noise"] ** 2 if isinstance(of, Regression) else np.ones(len(draws))
    if isinstance(of, GeneralisedLinear):
        of = _with_parameters(of, flat)
    if moments.joint is None and len(moments.mean) > 1:
        rule = f"at least 10 for each of {len(moments.mean)} coefficients"
        raise refused("draws", rule, len(draws))
    joint: Any = moments.joint
    cov = torch.diag(moments.var) if joint is None else joint.cov
    found = draws.mean(0), draws, noise
    return reduced_average(of, (moments.mean, cov, prior_var), found), of


def _chain(
    of: Regression | GeneralisedLinear, scale: float, options: Options, seed: int
) -> dict[str, Tensor]:
    """The draws of one chain: b, the intercept, and the sites of the likelihood."""
    x, y = torch.as_tensor(of.x), torch.as_tensor(of.y)
    zero = x.new_zeros(sum(map(len, of.groups)))
    likelihood, rest, start = _declared(of)

    def program() -> None:
        b = pyro.sample("b", dist.Normal(zero, scale).to_event(1))
        eta = x @ b.view(x.shape[1], -1)
        if start is not None:
            eta = eta + pyro.sample("intercept", dist.Normal(start, _WIDE).to_event(1))
        if isinstance(of, GeneralisedLinear) and isinstance(of.family, Categorical):
            eta = eta @ torch.as_tensor(of.family.basis).T
        likelihood.observe(eta, y, **rest)

    return _sampled(program, options, seed)


@isolated()
def _sampled(program: Any, options: Options, seed: int) -> dict[str, Tensor]:
    seed_generators(seed)
    kernel = NUTS(program, max_tree_depth=_DEPTH)
    draws = -(-options.draws // _CHAINS)
    chain = MCMC(kernel, num_samples=draws, warmup_steps=options.steps, disable_progbar=True)
    chain.run()
    found: dict[str, Tensor] = chain.get_samples()
    return found


def _declared(of: Regression | GeneralisedLinear) -> tuple[Any, dict[str, Tensor], Tensor | None]:
    """The likelihood, what else it is given, and the mean of the intercept's prior."""
    if isinstance(of, Regression):
        return likelihoods.Normal(), {}, torch.zeros(1, dtype=torch.float64)
    family, rest = of.family, {}
    start = torch.as_tensor(np.array(family.start(of.y), dtype=np.float64))
    if isinstance(family, (Poisson, NegativeBinomial)):
        exposure = np.broadcast_to(np.exp(family.log_exposure), of.y.shape).copy()
        rest = {"exposure": torch.as_tensor(exposure)}
    match family:
        case Normal():
            return likelihoods.Normal(noise=float(family.var) ** 0.5), rest, start
        case StudentT():
            scale: Any = "learned" if "scale" in family.learned else family.scale
            df: Any = "learned" if "df" in family.learned else family.df
            return likelihoods.StudentT(df, noise=scale), rest, start
        case Poisson():
            return likelihoods.Poisson(), rest, start
        case NegativeBinomial():
            r: Any = "learned" if family.learned else family.concentration
            return likelihoods.NegativeBinomial(r), rest, start
        case Ordinal():
            return likelihoods.Ordinal(len(family.gaps) + 2), rest, None
        case Categorical():
            return likelihoods.Categorical(), rest, start
    return likelihoods.Bernoulli(), rest, start


def _intercepts(of: Regression | GeneralisedLinear, flat: dict[str, Array]) -> Array:
    """(draws, intercepts); minus the first cut point of ordered classes."""
    if "intercept" in flat:
        return flat["intercept"]
    share = flat["lowest_class"]
    return -np.log(share / (1 - share))[:, None]


def _with_parameters(of: GeneralisedLinear, flat: dict[str, Array]) -> GeneralisedLinear:
    """With the parameters of the family at the exponential means of their logs."""
    names = {"scale": "noise", "df": "df"}
    family: Any = of.family
    if not isinstance(family, Inferred) or not len(family.parameters):
        return of
    match family:
        case StudentT():
            found = np.stack([flat[names[name]] for name in family.learned], 1)
        case Ordinal():
            found = flat["gaps"]
        case _:
            found = flat["concentration"][:, None]
    return with_family(of, family.at(np.log(found).mean(0)))
