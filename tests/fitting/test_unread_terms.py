"""Terms that the host reads later: which, when, and that a fit is the same."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.fitting import loop
from pyro_bmr.fitting.run import Run
from pyro_bmr.fitting.unread_terms import UnreadTerms, first_not_finite, number_of


def test_numbers_and_tensors_are_read_together_in_their_order():
    unread = UnreadTerms()
    unread.add(3, (torch.tensor(1.5), -2.25, torch.tensor(1e-300, dtype=torch.float64)))
    unread.add(5, (0.5, torch.tensor(4.0), 7.0))
    assert unread.read() == [(3, [1.5, -2.25, 1e-300]), (5, [0.5, 4.0, 7.0])]
    assert unread.read() == []


def test_sixteen_steps_are_due():
    unread = UnreadTerms()
    for step in range(15):
        unread.add(step, (0.0,))
    assert not unread.due
    unread.add(15, (0.0,))
    assert unread.due and len(unread.read()) == 16 and not unread.due


@pytest.mark.parametrize("term", [math.nan, math.inf, -math.inf])
def test_the_first_step_that_is_not_finite(term):
    read = [(1, [0.5, 1.0]), (2, [0.5, term]), (3, [term, term])]
    assert first_not_finite(read) == 2 and first_not_finite(read[:1]) is None
    assert first_not_finite([(4, [-math.inf, math.inf, 0.0])]) == 4


def test_a_number_has_no_graph_and_stays_on_its_device():
    value = torch.tensor([2.5], requires_grad=True) * 2
    assert number_of(value) == 5.0 and isinstance(number_of(value), float)
    elsewhere = number_of(value.to("meta"))
    assert isinstance(elsewhere, torch.Tensor)
    assert elsewhere.shape == () and not elsewhere.requires_grad


def fitted(rate=1e-2, **options):
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    program = bmr.BayesianNetwork(net, bmr.Gaussian("empirical"), bmr.Categorical())
    spike = bmr.Every(0.5, bmr.Gaussian(scale=0.0), kept=0.5, stop=0.7)
    options = {"reduce": spike, "optimizer": bmr.adam(rate), **options}
    data = x, (x[:, 0] > 0).long()
    return bmr.fit(program, data, epochs=6, batch_size=8, progress=False, **options)


def test_a_fit_whose_terms_are_read_later_is_the_same_to_the_bit(monkeypatch, tmp_path):
    want, seen = fitted(), []
    monkeypatch.setattr(Run, "looks_later", True)
    read_terms = loop.read_terms

    def read(run, wait):
        found = read_terms(run, wait)
        seen.append(len(found))
        return found

    monkeypatch.setattr(loop, "read_terms", read)
    found = fitted(checkpoint=bmr.Checkpoints(tmp_path, every_steps=20))
    # of 150 steps in six epochs; after the first, a checkpoint is written
    assert sum(seen) == 150 and max(seen) == 16 and seen.count(1) == 1 and seen.count(0) > 120
    pd.testing.assert_frame_equal(found.history, want.history)
    for name, site in want.posterior.sites.items():
        assert torch.equal(site.mean, found.posterior.sites[name].mean)
        assert torch.equal(site.var, found.posterior.sites[name].var)


def test_a_step_that_is_not_finite_stops_a_fit_that_looks_later(monkeypatch, tmp_path):
    monkeypatch.setattr(Run, "looks_later", True)
    with pytest.raises(bmr.errors.FitError, match=r"step \d+: the loss or its gradient") as error:
        fitted(rate=1e30, checkpoint=bmr.Checkpoints(tmp_path, every_steps=4))
    # of the first step, which was sound
    (saved,) = tmp_path.glob("step-*")
    assert "skip_faulty=1" in str(error.value) and str(saved) in str(error.value)
    assert saved.stem == "step-000000001"
