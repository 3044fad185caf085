"""Several draws at once are the draws one by one."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_bmr as bmr

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_full((3,), 0.3), 1.4).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(x.new_tensor(-0.5), 0.3))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def branching(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_full((3,), 0.3), 1.4).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ (w if w[0] > 0 else -2 * w), 0.4), obs=y)


def fitted(program, y):
    return bmr.Posterior.from_guide(bmr.MeanField(program, X, y), program, X, y)


@pytest.mark.parametrize("program", [regression, branching])
def test_draws_at_once_are_the_draws_one_by_one(program):
    posterior = fitted(program, X[:, 0])
    alone, together = (
        bmr.predict(program, posterior, X, draws=11, seed=2, batch_size=size) for size in (7, 40)
    )
    torch.testing.assert_close(together.locs, alone.locs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.scales, alone.scales, rtol=1e-12, atol=1e-12)
    assert together.locs.shape == (11, 7) and together.locs.std(0).min() > 1e-3


def test_classes_are_averaged_over_draws():
    torch.manual_seed(1)
    model = bmr.BayesianNetwork(
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double(),
        bmr.Gaussian("layer"),
        bmr.Categorical(),
    )
    posterior = fitted(model, torch.arange(7) % 4)
    generator = torch.Generator().manual_seed(2)
    probs = []
    for values in posterior.draws(9, generator):
        with pyro.poutine.block(), pyro.poutine.condition(data=values):
            weights = model.weights()
        probs.append(torch.func.functional_call(model.net, weights, (X,)).softmax(1))
    stacked = torch.stack(probs)
    entropy = -(stacked * stacked.log()).sum(-1).mean(0)
    for size in (3, 7, 40, 1000):  # rows in parts, one draw, several, all
        prediction = bmr.predict(model, posterior, X, draws=9, seed=2, batch_size=size)
        torch.testing.assert_close(prediction.probs, stacked.mean(0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(prediction.aleatoric, entropy, rtol=1e-10, atol=1e-12)


def test_a_label_without_probability_is_told():
    prediction = bmr.prediction.predictive.ClassPrediction(
        torch.tensor([[1.0, 0.0], [0.3, 0.7]]), torch.zeros(2), torch.zeros(2)
    )
    assert prediction.log_prob(torch.tensor([0, 1])).tolist() == pytest.approx([0.0, math.log(0.7)])
    with pytest.warns(
        bmr.PyroBMRWarning, match="1 of 2 labels have a probability of 0.*-87.3 nats"
    ):
        prediction.log_prob(torch.tensor([1, 1]))


def test_targets_that_are_nan_are_refused():
    with pytest.raises(bmr.errors.DataError, match="y is NaN in 1 of 2"):
        bmr.prediction.predictive.RealPrediction(torch.zeros(3, 2), torch.ones(3, 2)).log_prob(
            torch.tensor([0.4, math.nan])
        )
