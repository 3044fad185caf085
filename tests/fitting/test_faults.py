"""Steps that cannot be taken: what counts as one, how many are skipped, and what a fit makes of
them.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.fitting.faults import Faults

X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class NotANumber(nn.Module):
    """NaN in the calls given."""

    def __init__(self, calls, value=float("nan")):
        super().__init__()
        self.calls, self.value, self.number = calls, value, 0

    def forward(self, x):
        self.number += self.training
        return x * self.value if self.training and self.number in self.calls else x


def fit(calls, value=float("nan"), **arguments):
    torch.manual_seed(0)
    program = bmr.BayesianNetwork(
        nn.Sequential(nn.Linear(3, 2), NotANumber(calls, value)),
        bmr.Gaussian(scale=1.0),
        bmr.Categorical(),
    )
    return bmr.fit(program, (X, Y), batch_size=8, progress=False, **arguments)


def test_the_averages_are_those_of_numpy_and_a_jump_is_twenty_deviations():
    faults, values = Faults(5), np.random.default_rng(0).normal(-300.0, 2.0, 100)
    assert not any(faults.jump(value) for value in values)
    assert faults.mean == pytest.approx(values.mean(), rel=1e-12) and faults.var == pytest.approx(
        values.var(), rel=1e-9
    )
    edge = values.mean() - 20 * values.std()
    assert faults.jump(edge - 0.01).startswith(
        f"the expected log likelihood fell to {edge - 0.01:.6g}, of late it was {values.mean():.6g}"
    )
    assert faults.steps == 100 and not faults.jump(edge + 0.01) and faults.steps == 101
    assert faults.mean == pytest.approx(0.99 * values.mean() + 0.01 * (edge + 0.01), rel=1e-12)
    faults.forget()
    assert not faults.jump(-1e9)


def test_none_is_a_jump_where_none_may_be_skipped():
    faults = Faults(0)
    assert not any(faults.jump(-1.0) for _ in range(200)) and not faults.jump(-1e12)
    with pytest.raises(bmr.errors.FitError, match="^wrong$"):
        faults.skip("wrong")


def test_skipped_steps_change_nothing_and_are_counted():
    with pytest.raises(
        bmr.errors.FitError,
        match=(
            r"^step 12: the loss or its gradient is not finite at 0.bias, 0.weight .*; steps"
            r" skipped before: 1$"
        ),
    ):
        fit({5, 12}, epochs=2, skip_faulty=1)
    with pytest.raises(
        bmr.errors.FitError,
        match=(
            r"^step 5: the loss or its gradient is not finite at 0.bias, 0.weight .*; lower the"
            r" learning rate"
        ),
    ):
        fit({5, 12}, epochs=2)
    result = fit({5, 12}, epochs=3, skip_faulty=2)
    assert result.history["skipped"].tolist() == [1, 2, 2] and bool(
        torch.isfinite(result.posterior["0.weight"].mean).all()
    )
    never, last = fit(set(), epochs=2), fit({16}, epochs=2, skip_faulty=1)
    before = fit(set(), epochs=2, optimizer=lambda p: StopsBefore(p, 15))
    assert torch.equal(last.posterior["0.weight"].mean, before.posterior["0.weight"].mean)
    assert not torch.equal(last.posterior["0.weight"].mean, never.posterior["0.weight"].mean)
    assert never.history["skipped"].tolist() == [0, 0]


class StopsBefore(torch.optim.Adam):
    """Takes the first `steps` steps alone."""

    def __init__(self, parameters, steps):
        super().__init__(parameters, lr=3e-3, fused=True)
        self.left = steps

    def step(self, closure=None):
        self.left -= 1
        return super().step(closure) if self.left >= 0 else None


@pytest.mark.parametrize("estimator, step", [("weight", 5), ("antithetic", 3), ("local", 5)])
def test_a_step_that_is_not_finite_names_the_sites_of_the_guide(estimator, step):
    with pytest.raises(
        bmr.errors.FitError, match=rf"^step {step}: .* not finite at 0\.bias, 0\.weight \("
    ):
        fit({5, 9}, epochs=2, guide=partial(bmr.MeanField, estimator=estimator))


def test_a_jump_of_the_loss_is_skipped_if_asked():
    assert fit({150}, 1e4, epochs=20, skip_faulty=3).history["skipped"].iloc[-1] == 1
    assert fit({150}, 1e4, epochs=20).history["skipped"].iloc[-1] == 0


def test_a_fit_that_goes_on_remembers_what_it_skipped(tmp_path):
    rule = bmr.Checkpoints(tmp_path, every_steps=8)
    with pytest.raises(bmr.errors.FitError, match="step 19.*step-000000016"):
        fit({5, 19}, epochs=3, skip_faulty=1, checkpoint=rule)
    with pytest.raises(bmr.errors.FitError, match=r"steps skipped before: 1"):
        fit({3}, epochs=3, skip_faulty=1, checkpoint=rule)  # the third step after the sixteenth
