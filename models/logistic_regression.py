"""Bayesian logistic regression as a Pyro program written by hand: `--model logistic_regression` on
data with classes.

Run it by itself: python models/logistic_regression.py
"""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
from torch import Tensor

import pyro_bmr as bmr


def build(data: bmr.Data, prior: bmr.priors.Prior) -> Callable[..., Tensor]:
    """A program of y ~ Categorical(softmax(W x + b)): W under `prior`, b under a weak prior."""
    if data.task != "classification" or data.classes is None:
        what = "real targets" if data.task == "regression" else repr(data.likelihood())
        raise bmr.errors.DataError(
            f"logistic_regression: expected classes, got the {what} of {data.name}"
        )
    features, classes = data.x_train[0].numel(), data.classes

    def program(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = prior.sample("w", (classes, features), x.new_zeros(classes, features))
        b = pyro.sample("b", dist.Normal(x.new_zeros(classes), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=x.flatten(1) @ w.T + b), obs=y)

    return program


def main() -> None:
    data = bmr.load("digits")
    fit = bmr.fit(build(data, bmr.Gaussian(1.0)), data, epochs=60, optimizer=bmr.adam(1e-2))
    reduction = bmr.reduce(fit.posterior, to={"w": bmr.Gaussian(scale=0)})
    prediction = bmr.predict(fit.program, reduction.posterior, data.x_test)
    print(
        f"accuracy {bmr.metrics.accuracy(prediction.probs, data.y_test):.3f} with"
        f" {reduction.kept:.1%} of the weights"
    )


if __name__ == "__main__":
    main()
