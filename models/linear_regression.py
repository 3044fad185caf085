"""Bayesian linear regression as a Pyro program written by hand: `--model linear_regression` on
regression data.

Run it by itself: python models/linear_regression.py
"""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

import pyro_bmr as bmr


def build(data: bmr.Data, prior: bmr.priors.Prior) -> Callable[..., Tensor]:
    """A program of y = x w + b + noise, with w under `prior`.

    b and the noise have weak priors for standardised data.
    """
    if data.task != "regression":
        what = "classes" if data.task == "classification" else repr(data.likelihood())
        raise bmr.errors.DataError(
            f"linear_regression: expected real targets, got the {what} of {data.name}"
        )
    features = data.x_train[0].numel()

    def program(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = prior.sample("w", (features,), x.new_zeros(features))
        b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
        noise = pyro.sample("noise", dist.HalfNormal(x.new_ones(())))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x.flatten(1) @ w + b, noise), obs=y)

    # the same function without priors, for the baselines of a comparison
    vars(program)["plain"] = nn.Sequential(nn.Flatten(), nn.Linear(features, 1))
    return program


def main() -> None:
    data = bmr.load("diabetes")
    fit = bmr.fit(build(data, bmr.Gaussian(1.0)), data, epochs=300, optimizer=bmr.adam(1e-2))
    print(bmr.reduce(fit.posterior, to={"w": bmr.Gaussian(scale=0)}).table())


if __name__ == "__main__":
    main()
