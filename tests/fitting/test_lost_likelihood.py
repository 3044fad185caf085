"""Reductions that cost too much of the likelihood are warned of."""

import warnings

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.fitting.lost_likelihood import lost_likelihood


def history(*rows):
    return [{"kept": kept, "expected_log_likelihood": likelihood} for kept, likelihood in rows]


FALLS = history((1.0, -90.0), (1.0, -20.0), (0.5, -10.0), (0.1, -61.0))


def test_what_is_lost_is_counted_for_each_observed_number():
    assert "took 0.41 nats for each observed number" in lost_likelihood(FALLS, 100, None)
    assert "-0.2 before the first, -0.61 at the end" in lost_likelihood(FALLS, 100, None)
    assert lost_likelihood(FALLS, 300, None) is None  # 0.14


@pytest.mark.parametrize(
    "rows",
    [
        [],
        history((1.0, -20.0), (0.5, -10.0), (0.1, -30.0)),
        history((1.0, -20.0), (1.0, -80.0)),  # nothing was pruned
        history((1.0, -80.0), (0.1, -30.0)),
        history((1.0, -2600.0), (0.1, -2700.0)),  # one nat of twenty-six
    ],
)
def test_nothing_is_said_without_a_large_loss(rows):
    assert lost_likelihood(rows, 100, None) is None


def test_a_target_that_was_asked_for_may_cost_what_it_does():
    assert lost_likelihood(FALLS, 100, 0.1) is None


def messages(prior, optimizer, to=None):
    data = bmr.load("digits")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    program = bmr.BayesianNetwork(net, prior, bmr.Categorical())
    reduce = bmr.Every(1, *([to] if to else []), start=0.3, stop=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bmr.fit(
            program,
            (data.x_train[:600], data.y_train[:600]),
            epochs=20,
            batch_size=32,
            optimizer=optimizer,
            reduce=reduce,
            progress=False,
        )
    return " ".join(str(w.message) for w in caught)


@pytest.mark.slow
def test_a_fit_that_collapses_says_so_and_one_that_does_not_is_left_alone():
    collapsed = messages(bmr.Gaussian(), bmr.adam(5e-3), bmr.SpikeAndSlab())
    assert "nats for each observed number" in collapsed
    fine = messages(bmr.Gaussian("layer"), bmr.natural_gradient())
    assert "nats for each observed number" not in fine
