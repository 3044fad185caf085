"""The step of a mean-field fit against the same numbers by autograd; its noise; what is left of it
after pruning.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.fitting.mean_field_step import MeanFieldStep
from pyro_bmr.fitting.noise import Noise
from tests.fitting.test_elbo import PRIORS, X, Y, hand_written, masks_for, network

ROWS, TEMPERATURE = 50, 0.4


def moved(guide):
    with torch.no_grad():
        guide.loc += 0.3 * torch.randn_like(guide.loc)
        guide.log_scale += 0.2 * torch.randn_like(guide.loc)
    return guide


def several_scales(x, y=None):
    """A prior with a mean and a scale per entry, one whose moments depend on another site, a
    positive site, and a joint one.
    """
    w = pyro.sample(
        "w",
        dist.Normal(
            torch.linspace(-0.5, 1, 4).double(), torch.linspace(0.4, 1.3, 4).double()
        ).to_event(1),
    )
    centre = pyro.sample("centre", dist.Normal(torch.tensor(0.3).double(), 0.7))
    spread = pyro.sample("spread", dist.LogNormal(torch.tensor(-0.3).double(), 0.5))
    with pyro.poutine.scale(scale=1.5):
        v = pyro.sample(
            "v",
            dist.Normal(centre.expand(4), spread * torch.linspace(0.5, 2, 4).double()).to_event(1),
        )
    u = pyro.sample(
        "u",
        dist.MultivariateNormal(
            torch.tensor([0.2, -0.1]).double(), torch.tensor([[1.3, 0.4], [0.4, 0.8]]).double()
        ),
    )
    with pyro.plate("data", ROWS, subsample=torch.arange(len(x))):
        pyro.sample("y", dist.Normal(x @ (w * v) + u.sum(), 0.9), obs=y)


def expected(program, guide, y, masks, noise):
    """Both terms of the bound, and the gradient of the loss of a fit, by autograd through
    `elbo_terms`; of two draws, the mean.
    """
    draws = [
        bmr.fitting.elbo_terms(program, guide, X, y, masks=masks, noise=n)
        for n in ((noise, -noise) if guide.estimator == "antithetic" else (noise,))
    ]
    likelihood, kl = (sum(terms) / len(draws) for terms in zip(*draws, strict=True))
    loss = (TEMPERATURE * kl - likelihood) / ROWS
    return likelihood.item(), kl.item(), torch.autograd.grad(loss, [guide.loc, guide.log_scale])


def alive(guide, masks):
    return torch.cat(
        [masks.get(s.name, torch.ones(s.shape, dtype=torch.bool)).flatten() for s in guide.latents]
    )


@pytest.mark.parametrize("estimator", ["weight", "antithetic"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("prior", [*PRIORS, None], ids=[*(repr(p)[:30] for p in PRIORS), "by hand"])
def test_value_and_gradient_are_those_of_autograd(prior, masked, estimator):
    program, y = (hand_written, X[:, 1]) if prior is None else (network(prior), Y)
    guide = moved(bmr.MeanField(program, X, y, estimator=estimator))
    masks = masks_for(guide) if masked else {}
    step = MeanFieldStep(
        program, guide, ROWS, TEMPERATURE, seed=4, network=None if prior is None else program
    )
    step.prune(masks)
    living = alive(guide, masks)
    both_signs = [
        next(number for number in range(50) if step.noise.at(number)[1] == sign)
        for sign in (1.0, -1.0)
    ]
    for number in both_signs:  # the second run of a network declares no weights
        draw = step.run((X, y), number)
        noise = torch.randn_like(guide.loc)
        noise[living] = draw.sign * draw.noise
        likelihood, kl, (loc, log_scale) = expected(program, guide, y, masks, noise)
        step.write_gradients(draw)
        assert draw.expected_log_likelihood == pytest.approx(likelihood, rel=1e-10)
        assert draw.kl == pytest.approx(kl, rel=1e-10)
        torch.testing.assert_close(step.loc.grad, loc[living], rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(step.log_scale.grad, log_scale[living], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("estimator", ["weight", "antithetic"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_priors_of_every_form(masked, estimator):
    guide = moved(bmr.MeanField(several_scales, X, X[:, 1], estimator=estimator))
    masks = (
        {
            "w": torch.tensor([True, False, True, True]),
            "v": torch.tensor([False, True, True, False]),
        }
        if masked
        else {}
    )
    step = MeanFieldStep(several_scales, guide, ROWS, TEMPERATURE, seed=4)
    step.prune(masks)
    living = alive(guide, masks)
    draw = step.run((X, X[:, 1]), 1)
    noise = torch.zeros_like(guide.loc)
    noise[living] = draw.sign * draw.noise
    _, kl, (loc, log_scale) = expected(several_scales, guide, X[:, 1], masks, noise)
    step.write_gradients(draw)
    assert draw.kl == pytest.approx(kl, rel=1e-10)
    torch.testing.assert_close(step.loc.grad, loc[living], rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(step.log_scale.grad, log_scale[living], rtol=1e-8, atol=1e-11)
    with pytest.raises(bmr.errors.ModelError, match="site 'u'.*does not split"):
        step.prune({"u": torch.tensor([True, False])})
        step.run((X, X[:, 1]), 2)


def test_large_sites_go_in_chunks():
    torch.manual_seed(2)
    program = bmr.BayesianNetwork(
        nn.Linear(4, 40_000).double(), bmr.Gaussian(0.6, mean=0.2), bmr.Categorical(size=ROWS)
    )
    guide = moved(bmr.MeanField(program, X, Y))
    step = MeanFieldStep(program, guide, ROWS, TEMPERATURE, seed=4)
    draw = step.run((X, Y), 1)
    _, kl, (loc, log_scale) = expected(program, guide, Y, {}, draw.sign * draw.noise)
    step.write_gradients(draw)
    assert draw.kl == pytest.approx(kl, rel=1e-10)
    torch.testing.assert_close(step.loc.grad, loc, rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(step.log_scale.grad, log_scale, rtol=1e-8, atol=1e-13)


def test_the_noise_is_standard_normal_new_in_each_step_and_a_function_of_seed_and_step():
    like = torch.empty(5000, dtype=torch.float64)
    vectors = torch.stack(
        [
            sign * numbers.clone()
            for numbers, sign in (Noise(like, 3).at(step) for step in range(24))
        ]
    )
    again = Noise(like, 3)
    for step in (17, 2, 16, 9):
        numbers, sign = again.at(step)
        assert torch.equal(sign * numbers, vectors[step])
    assert not torch.equal(Noise(like, 4).at(5)[0], Noise(like, 3).at(5)[0])
    for vector in vectors:
        assert stats.kstest(vector.numpy(), "norm").pvalue > 1e-4
    correlations = torch.corrcoef(vectors) - torch.eye(24)
    assert correlations.abs().max() < 5 / 5000**0.5
    # at one entry, nothing is shared between steps
    sizes = torch.corrcoef(vectors.square()) - torch.eye(24)
    assert sizes.abs().max() < 5 / 5000**0.5


def test_the_signs_are_fair():
    noise = Noise(torch.empty(1), 0)
    signs = torch.tensor([noise.at(step)[1] for step in range(400)])
    assert set(signs.tolist()) == {-1.0, 1.0} and abs(signs.mean()) < 4 / 20


def test_pruning_keeps_the_state_of_the_survivors():
    """One more step of Adam moves them as if nothing had been pruned but the drawn weights."""
    program = network(bmr.Gaussian(0.6))
    guide = moved(bmr.MeanField(program, X, Y))
    masks = masks_for(guide)
    step = MeanFieldStep(program, guide, ROWS, TEMPERATURE, seed=4)
    optimizer = torch.optim.Adam([step.loc, step.log_scale], lr=0.01)
    for number in range(3):
        step.write_gradients(step.run((X, Y), number))
        optimizer.step()
    before = {key: optimizer.state[step.loc][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    loc, whole = step.loc.detach().clone(), step.loc
    step.prune(masks, optimizer)
    living = alive(guide, masks)
    assert optimizer.param_groups[0]["params"][0] is step.loc and whole not in optimizer.state
    assert torch.equal(step.loc, loc[living]) and optimizer.state[step.loc]["step"] == 3
    for key, value in before.items():
        assert torch.equal(optimizer.state[step.loc][key], value[living])
    step.write_gradients(step.run((X, Y), 3))
    optimizer.step()
    step.write_back()
    assert torch.equal(guide.loc[living], step.loc) and torch.equal(
        guide.loc[~living], loc[~living]
    )
    assert not torch.equal(guide.loc[living], loc[living])


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_released_memory_is_taken_again_and_nothing_else_changes(pruned):
    program = network(bmr.Gaussian(0.6))
    guide = moved(bmr.MeanField(program, X, Y))
    steps = [MeanFieldStep(program, guide, ROWS, TEMPERATURE, seed=4) for _ in range(2)]
    for step in steps:
        if pruned:
            step.prune(masks_for(guide))
        step.write_gradients(step.run((X, Y), 4))
        step.run((X, Y), 5)  # as under the natural gradient, σ stands for the next step
    steps[1].release()
    assert steps[1].std.untyped_storage().nbytes() == steps[1].draw.untyped_storage().nbytes() == 0
    assert steps[1].whole_draw.untyped_storage().nbytes() == 0
    assert len(steps[1].noise.batch) == 0 and steps[1].loc.grad is None
    ends = []
    for step in steps:
        draw = step.run((X, Y), 6)
        step.write_gradients(draw)
        ends.append((draw.expected_log_likelihood, draw.kl, step.loc.grad, step.log_scale.grad))
    assert ends[0][:2] == ends[1][:2]
    assert torch.equal(ends[0][2], ends[1][2]) and torch.equal(ends[0][3], ends[1][3])
