"""Predictions of rows as people have them: those of tensors, in the same order."""

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bmr as bmr
from tests.fitting.test_loaders import Own

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(50, 3, generator=GENERATOR)
Y = torch.randint(4, (50,), generator=GENERATOR)
FLAT = bmr.Posterior.from_moments(
    {"w": 0.3 * torch.randn(3, 4, generator=GENERATOR)},
    {"w": torch.full((3, 4), 0.1)},
    bmr.Gaussian(1.0),
)


def program_of(kind):
    def program(x, y=None):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3, 4), 1.0).to_event(2))
        output = x @ w
        with pyro.plate("data", len(x)):
            fn = {
                "classes": lambda: dist.Categorical(logits=output),
                "reals": lambda: dist.Normal(output, 0.5).to_event(1),
                "counts": lambda: dist.Poisson(output[:, 0].exp()),
            }[kind]()
            return pyro.sample("y", fn, obs=y)

    return program


TARGETS = {"classes": Y, "reals": torch.randn(50, 4, generator=GENERATOR), "counts": Y.float()}


@pytest.mark.parametrize("kind", TARGETS)
def test_rows_that_are_read_have_the_predictions_of_tensors(kind):
    program, y = program_of(kind), TARGETS[kind]
    whole = bmr.predict(program, FLAT, X, draws=4)
    for data in (
        DataLoader(Own(X, y), 7),
        Own(X, y),
        [X[:20], X[20:]],
        pd.DataFrame(X.numpy()).astype("float32").to_numpy(),
        DataLoader(TensorDataset(X), 9),
    ):
        for batch_size in (13, 1000):
            read = bmr.predict(program, FLAT, data, draws=4, batch_size=batch_size)
            assert type(read) is type(whole)
            torch.testing.assert_close(read.log_prob(y), whole.log_prob(y))
            torch.testing.assert_close(read.epistemic, whole.epistemic)


def test_a_shuffled_loader_is_refused():
    program = program_of("classes")
    for data in (TensorDataset(X, Y), Own(X, Y)):
        with pytest.raises(bmr.errors.DataError, match="the loader mixes its rows"):
            bmr.predict(program, FLAT, DataLoader(data, 7, shuffle=True))


def test_the_rows_of_a_part_are_checked():
    wrong = X.clone()
    wrong[30, 1] = torch.inf
    loader = DataLoader(Own(wrong, Y), 10)
    for size, words in (
        (50, "predict: x is NaN.* row 30"),
        (20, "from row 20 on: x is NaN.* row 10"),
    ):
        with pytest.raises(bmr.errors.DataError, match=words):
            bmr.predict(program_of("classes"), FLAT, loader, batch_size=size)


def test_widening_by_rows_that_are_read_is_that_of_tensors():
    torch.manual_seed(0)
    model = bmr.BayesianNetwork(nn.Linear(3, 4), bmr.Gaussian(), bmr.Categorical())
    fit = bmr.fit(model, (X, Y), epochs=2, progress=False)
    want = bmr.prediction.best_widening(fit.program, fit.posterior, (X, Y), draws=2, most=2.0)
    for rows in (DataLoader(Own(X, Y), 20, shuffle=True), (X.numpy(), Y.numpy())):
        got = bmr.prediction.best_widening(fit.program, fit.posterior, rows, draws=2, most=2.0)
        assert got == pytest.approx(want, rel=1e-4)
    with pytest.raises(bmr.errors.DataError, match="can be read again, got generator"):
        batches = (pair for pair in [(X, Y)])
        bmr.prediction.best_widening(fit.program, fit.posterior, batches)


def test_parts_that_are_computed_for_each_question_are_joined_to_others(monkeypatch):
    """A part of many rows, and a last one of few, which is held."""
    program, y = program_of("reals"), TARGETS["reals"]
    whole = bmr.predict(program, FLAT, X, draws=4)
    monkeypatch.setattr("pyro_bmr.prediction.predict._KEPT", 2000)
    parts = bmr.predict(program, FLAT, DataLoader(Own(X, y), 48), draws=4, batch_size=48)
    assert type(parts) is not type(whole)
    torch.testing.assert_close(parts.log_prob(y), whole.log_prob(y))
