"""Adam as the fast steps take it, beside torch's own after the gradients are written."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import pyro_bmr as bmr
from pyro_bmr.fitting import chunks, flat_vectors, site_prior
from pyro_bmr.fitting.fused_adam import ChunkedAdam, PointAdam
from pyro_bmr.fitting.mean_field_step import MeanFieldStep
from pyro_bmr.fitting.optimizers import optimizer_of
from pyro_bmr.fitting.point_step import PointStep
from tests.fitting.test_elbo import X, Y, masks_for, network

ROWS, TEMPERATURE, RATE = 50, 0.4, 0.02
GUIDES = {
    "weight": bmr.MeanField,
    "antithetic": partial(bmr.MeanField, estimator="antithetic"),
    "point": bmr.Point,
}
PRIORS = [
    bmr.Gaussian(0.6),
    bmr.Gaussian(0.6, mean=0.2),
    bmr.Gaussian("layer"),
    bmr.Horseshoe(),
    {"*.bias": bmr.Gaussian(0.3), "2.*": None, "*": bmr.SpikeAndSlab()},
]


def step_of(program, guide):
    trained = [p for p in (*guide.parameters(), *program.trained) if p.requires_grad]
    if isinstance(guide, bmr.Point):
        return PointStep(program, guide, ROWS, TEMPERATURE, trained, program, (X, Y))
    others = [p for p in trained if p is not guide.loc and p is not guide.log_scale]
    return MeanFieldStep(program, guide, ROWS, TEMPERATURE, 4, program, others)


def two_steps(program, kind):
    """Two steps with the same numbers, the first with torch's Adam and the second with ours."""
    torch.manual_seed(3)
    program = copy.deepcopy(program)
    steps = [step_of(p, kind(p, X, Y)) for p in (program, copy.deepcopy(program))]
    torchs = torch.optim.Adam(steps[0].parameters, lr=RATE, fused=True)
    ours = optimizer_of(bmr.adam(RATE), steps[1], ROWS, ())
    assert type(ours) is (ChunkedAdam if kind is not bmr.Point else PointAdam)
    return steps, torchs, ours


def run(steps, torchs, ours, numbers):
    for number in numbers:
        for step, optimizer in zip(steps, (torchs, ours), strict=True):
            for parameter in step.trained:
                parameter.grad = None
            draw = step.run((X, Y), number)
            if optimizer is ours:
                ours.take_next(draw)
            else:
                with torch.no_grad():
                    step.write_gradients(draw)
                torchs.step()


def check(steps, torchs, ours):
    for one, other in zip(*(step.parameters for step in steps), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        for key, value in torchs.state[one].items():
            torch.testing.assert_close(value, ours.state[other][key], rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: repr(prior)[:40])
def test_it_is_torchs_adam(prior, kind):
    steps, torchs, ours = two_steps(network(prior), GUIDES[kind])
    before = [p.detach().clone() for p in steps[1].parameters]
    run(steps, torchs, ours, range(1, 6))
    check(steps, torchs, ours)
    moved = [bool((p != b).any()) for p, b in zip(steps[1].parameters, before, strict=True)]
    assert all(moved)
    masks = masks_for(steps[0].guide)
    for step, optimizer in zip(steps, (torchs, ours), strict=True):
        step.prune(masks, optimizer)
    run(steps, torchs, ours, range(6, 10))
    check(steps, torchs, ours)


@pytest.mark.parametrize("kind", ["weight", "point"])
def test_its_state_goes_into_another_one(kind):
    steps, torchs, ours = two_steps(network(bmr.Gaussian(0.6)), GUIDES[kind])
    run(steps, torchs, ours, range(1, 4))
    saved = copy.deepcopy(torchs.state_dict())
    again = optimizer_of(bmr.adam(7 * RATE), steps[1], ROWS, ())
    again.load_state_dict(copy.deepcopy(saved))
    run(steps, torchs, again, range(4, 7))
    check(steps, torchs, again)
    again.load_state_dict(copy.deepcopy(saved))  # moments of other tensors than those it had cut
    torchs.load_state_dict(copy.deepcopy(saved))
    run(steps, torchs, again, range(7, 9))
    check(steps, torchs, again)


def test_large_sites_go_in_chunks():
    program = bmr.BayesianNetwork(
        nn.Linear(4, 40_000).double(), bmr.Gaussian(0.6), bmr.Categorical(size=ROWS)
    )
    steps, torchs, ours = two_steps(program, bmr.MeanField)
    run(steps, torchs, ours, (1, 2, 3))
    assert len(steps[1].chunks) > 1
    check(steps, torchs, ours)


@pytest.mark.parametrize(("rate", "age"), [(3e-3, 3), (RATE, 0)])
def test_at_small_rates_a_standard_deviation_may_be_three_steps_old(rate, age, monkeypatch):
    monkeypatch.setattr(flat_vectors, "_FIRST", 2)
    monkeypatch.setattr(flat_vectors, "_LARGE", 10)
    monkeypatch.setattr(site_prior, "_LARGE", 10)
    monkeypatch.setattr(chunks, "_CHUNK", 16)
    program = network(bmr.Gaussian(0.6))
    step = step_of(program, bmr.MeanField(program, X, Y))
    optimizer = optimizer_of(bmr.adam(rate), step, ROWS, ())
    before, ages = [], set()
    for number in range(1, 21):
        before.append(step.log_scale.detach().exp())
        draw = step.run((X, Y), number)
        for chunk in step.chunks:  # at which step it was exp(log σ)
            equal = [torch.equal(b[chunk.part], chunk.std) for b in before]
            ages.add(number - 1 - equal.index(True))
        if number <= 3:
            assert ages == {0}
        torch.testing.assert_close(step.std, before[-1], rtol=4 * age * rate, atol=0.0)
        if number == 16:  # the KL is evaluated
            assert torch.equal(step.std, before[-1])
            both = Normal(step.loc.detach(), step.std), Normal(torch.zeros(()).double(), 0.6)
            assert draw.kl == pytest.approx(float(kl_divergence(*both).sum()), rel=1e-10)
        drawn = step.loc + step.std * draw.noise * draw.sign
        torch.testing.assert_close(step.draw, drawn, rtol=1e-12, atol=1e-14)
        optimizer.take_next(draw)
    assert max(ages) == age and len(step.chunks) > 3


def test_complex_parameters_have_torchs_own():
    guide = bmr.MeanField(network(bmr.Gaussian(0.6)), X, Y)
    step = step_of(network(bmr.Gaussian(0.6)), guide)
    step.trained = [torch.ones(2, dtype=torch.complex128, requires_grad=True)]
    assert type(optimizer_of(bmr.adam(RATE), step, ROWS, ())) is torch.optim.Adam
